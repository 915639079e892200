"""The decisive points of a run on one CUDA card, in a few minutes; nothing is downloaded.

`python tests/bench/gpu_check.py`; with `--smoke`, the same at toy size on a CPU, to see that it works. A part
that fails says so and the others go on; the exit status is the number of parts that failed.
"""

import argparse
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers as tf
import yaml

from rlaifv_nb.dpo import DpoOptions, new_adapter, run_dpo
from rlaifv_nb.engine.attention import PackedLayout, sharing_problem
from rlaifv_nb.engine.models import OpenModel, open_vlm
from rlaifv_nb.engine.prefix import grow, pick_tokens, read, uniform_numbers
from rlaifv_nb.feedback import run_feedback
from rlaifv_nb.records import Verdict, free_memory, read_manifest, read_table, resolve_path, shard_paths
from rlaifv_nb.runner.command import main as rlaifv

PARTS = []
EXAMPLE = {
    name: resolve_path(f"packaged:example/{name}")
    for name in ("prompts", "01_sampling", "02_claims", "03_feedback", "04_pairs")
}


def part(title):
    "Registers a function as a part of the check."

    def add(run):
        PARTS.append((title, run))
        return run

    return add


def wait(device):
    "Waits for what a card has been asked to do."
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(run, device, n=20):
    "Mean milliseconds of `run()` over `n` calls, after two to warm up."
    for _ in range(2):
        run()
    wait(device)
    began = time.perf_counter()
    for _ in range(n):
        run()
    wait(device)
    return (time.perf_counter() - began) / n * 1e3


def peak_gib(device):
    "Peak memory on the card, in words; empty on a CPU."
    return f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device == "cuda" else ""


@part("the machine")
def machine(device):
    "Versions, and the card."
    print(
        "torch",
        torch.__version__,
        "CUDA",
        torch.version.cuda,
        "torchvision",
        find_spec("torchvision") is not None,
        "flash_attn",
        find_spec("flash_attn") is not None,
    )
    if device == "cuda":
        print(
            torch.cuda.get_device_name(0),
            torch.cuda.get_device_capability(0),
            "cards:",
            torch.cuda.device_count(),
        )


@part("03_feedback on the packaged example: inputs reach the card, verdicts are those of the CPU")
def feedback(device):
    "Verdicts of the packaged labeler against the packaged ones, which a CPU has made in float32."
    with tempfile.TemporaryDirectory() as out:
        vlm = open_vlm("packaged:iconworld-vlm", device=device)
        found = run_feedback(EXAMPLE["prompts"], EXAMPLE["01_sampling"], EXAMPLE["02_claims"], out, vlm).read(
            "verdicts", Verdict
        )
    known = {v.claim_id: v for v in read_table(EXAMPLE["03_feedback"], "verdicts", Verdict)}
    flips = sum(v.label != known[v.claim_id].label for v in found)
    print(
        f"{vlm.settings['dtype']} on {vlm.device}: {flips} of {len(found)} verdicts differ from float32 on "
        "a CPU"
    )


def train_once(device, quantisation="nf4", **options):
    "A short training on the packaged pairs; prints preflight and engine."
    with tempfile.TemporaryDirectory() as out:
        run_dpo(
            EXAMPLE["prompts"],
            EXAMPLE["04_pairs"],
            out,
            partial(open_vlm, "packaged:iconworld-vlm", quantisation=quantisation, device=device),
            options=DpoOptions(
                learning_rate=5e-4, epochs=0.5, batch_size=8, evaluations=1, min_steps=1, **options
            ),
        )
        manifest = read_manifest(out)
    print(quantisation, options or "defaults", manifest["preflight"], manifest["engine"])


@part("05_dpo: cached features, none, unquantised; the drift of the preflight in 16 bits")
def training(device):
    "Features of two devices in one row, pinned memory, and the preflight's tolerance."
    for options in ({}, {"cache_gb": 0.0}, {"quantisation": "none"}, {"loader_workers": 2}):
        train_once(device, **options)


@part("attention of grouped heads under a mask: 56 query heads, 8 key heads, 384 x 2784")
def grouped_heads(device):
    "`enable_gqa` with a mask falls to a path in float32 on some cards; repeated heads do not."
    heads, groups, m, n = (56, 8, 384, 2784) if device == "cuda" else (4, 2, 16, 64)
    q = torch.randn(1, heads, m, 128, device=device, dtype=torch.bfloat16)
    k = torch.randn(1, groups, n, 128, device=device, dtype=torch.bfloat16)
    mask = torch.zeros(m, n, device=device, dtype=torch.bfloat16)

    def repeated():
        whole = k.repeat_interleave(heads // groups, 1)
        return F.scaled_dot_product_attention(q, whole, whole, mask)

    def grouped():
        return F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True)

    for run in (grouped, repeated):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        print(f"{run.__name__}: {milliseconds(run, device):.2f} ms{peak_gib(device)}")


@part("a LoRA product in float32, TF32 and bfloat16: 4096 tokens x 4096 x 64 and back")
def lora_product(device):
    "What `tf32` is worth."
    n = 4096 if device == "cuda" else 64
    x = torch.randn(n, n, device=device)
    down = torch.randn(64, n, device=device)
    up = torch.randn(n, 64, device=device)
    base = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    before = torch.get_float32_matmul_precision()
    print(f"base in bfloat16: {milliseconds(lambda: F.linear(x.bfloat16(), base), device):.3f} ms")
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        print(
            f"LoRA in float32, precision {precision}: "
            f"{milliseconds(lambda: F.linear(F.linear(x, down), up), device):.3f} ms"
        )
    torch.set_float32_matmul_precision(before)
    x, down, up = x.bfloat16(), down.bfloat16(), up.bfloat16()
    print(f"LoRA in bfloat16: {milliseconds(lambda: F.linear(F.linear(x, down), up), device):.3f} ms")


def random_llava(device):
    """A LLaVA of LLaVA-1.5-7B's language model (small on a CPU) with random weights and a tiny vision tower,
    opened for sampling.
    """
    size = dict(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    )
    if device == "cpu":
        size = dict(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
    vision = tf.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = tf.LlavaConfig(
        vision_config=vision, text_config=tf.LlamaConfig(vocab_size=32064, **size), image_token_index=32000
    )
    with torch.device(device):
        model = tf.AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    padding = type("Padding", (), {"pad_token_id": 0})()
    return OpenModel(model, padding, "random", "random", "none", sharing_problem(model))


@torch.no_grad()
def sampling_step(vlm, n_prompts, n_answers, n_prompt_tokens, room, device):
    "Milliseconds of a decoding step of `n_prompts` x `n_answers` rows, sampling included."
    prompts = [{"input_ids": torch.randint(10, 100, (1, n_prompt_tokens))} for _ in range(n_prompts)]
    index = [k for k in range(n_prompts) for _ in range(n_answers)]
    branches = grow(vlm, read(vlm, prompts), torch.tensor(index, device=device), room)
    uniform = uniform_numbers(range(len(index)), room).to(device)
    never = torch.tensor([0, 1, 32000, 32001], device=device)
    at = iter(range(room))

    def step():
        logits = vlm.core.lm_head(branches.hidden).float()
        logits[:, never] = -torch.inf
        branches.step(pick_tokens(logits, uniform[:, next(at)], 0.7, 1.0))

    return milliseconds(step, device, room - 4)


@part("a sampling step of LLaVA-1.5-7B's shape with random weights, without and with an adapter")
def sampling(device):
    "How long a step takes, which is launch-bound for few rows."
    vlm = random_llava(device)
    print("prefix shared" if vlm.shares_prefix else f"prefix not shared: {vlm.sharing_problem}")
    n_tokens, room = (636, 60) if device == "cuda" else (24, 12)
    for note in ("base", "with an adapter, not merged"):
        for n_prompts in (2, 8) if device == "cuda" else (1,):
            ms = sampling_step(vlm, n_prompts, 10, n_tokens, room, device)
            print(
                f"{note}, {n_prompts} x 10 rows: {ms:.1f} ms per step, {n_prompts * 10 / ms * 1e3:.0f} "
                f"tokens per second{peak_gib(device)}"
            )
            free_memory()
        if note == "base":
            new_adapter(vlm, 64, 16, 0)


@part("the kernels of packed rows against sdpa, forward and gradients")
def kernels(device):
    "Largest differences of output and gradients, by kernel."
    units, groups = [(40, [10, 7]), (33, [12, 5])], 2
    n = sum(prompt + sum(branches) for prompt, branches in units)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tensors = [torch.randn(1, heads, n, 64, device=device, dtype=dtype) for heads in (4, groups, groups)]
    found = {}
    for kernel in ("sdpa", "varlen", "flex") if device == "cuda" else ("sdpa",):
        q, k, v = (x.clone().requires_grad_() for x in tensors)
        out = PackedLayout(units, kernel).attend(0, q, k, v, 0.125)
        out.float().square().sum().backward()
        found[kernel] = [out.detach().float(), q.grad.float(), k.grad.float(), v.grad.float()]
        print(kernel, [f"{(x - y).abs().max():.4f}" for x, y in zip(found[kernel], found["sdpa"])])


@part("rlaifv run tiny, small: every stage through its notebook")
def whole_chain(device):
    "The tiny recipe with few prompts, from pictures to report."
    stages = {
        "05_dpo": {"epochs": 4},
        "06_evaluation": {"n_scenes": 40},
        "07_guided_decoding": {"n_scenes": 4, "n_candidates": 4},
    }
    recipe = {
        "extends": "tiny",
        "name": "small",
        "rounds": 1,
        "device": device,
        "prompts": {"n_per_round": 40, "n_dev": 8},
        "parameters": stages,
    }
    with tempfile.TemporaryDirectory() as home:
        out = Path(home) / "run"
        file = Path(home) / "small.yaml"
        file.write_text(yaml.safe_dump(recipe))
        text = StringIO()
        with redirect_stdout(text):
            status = rlaifv(["run", str(file), "--out", str(out)])
        print(text.getvalue().strip())
        if status or not shard_paths(out / "06_evaluation", "scores"):
            raise RuntimeError("the chain did not come to its end")


def main():
    "Runs the parts; returns how many failed."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="toy size on a CPU: whether the script works, not how fast anything is",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="N", type=int, help="numbers of the parts to run, from 0"
    )
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit(
            "This check needs a CUDA card and there is none here; --smoke runs the same at toy size on a CPU."
        )
    device = "cpu" if args.smoke else "cuda"
    passed, failed = [], []
    for number, (title, run) in enumerate(PARTS):
        if args.only and number not in args.only:
            continue
        print(f"\n== {number} {title}", flush=True)
        began = time.perf_counter()
        try:
            run(device)
            passed.append(number)
        except Exception:
            failed.append(number)
            print(traceback.format_exc(limit=-4))
        free_memory()
        print(f"   ({time.perf_counter() - began:.0f} s)", flush=True)
    print(
        f"\n{'smoke run, figures mean nothing; ' if args.smoke else ''}passed: {passed or 'none'}; failed: "
        f"{failed or 'none'}"
    )
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
