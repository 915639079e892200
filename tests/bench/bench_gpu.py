"""LLaVA-1.5-7B's shape with random weights on one CUDA GPU (NF4 QLoRA, bfloat16, gradient checkpointing):
speed, memory and the largest packing.

`python tests/bench/bench_gpu.py`; with `--smoke`, the same at toy size on a CPU, to see that it works.
"""

import argparse
import gc
import math
import statistics
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import LlavaForConditionalGeneration
from workload import (
    SIZES,
    TRL,
    Size,
    check_equal,
    interleave,
    machine,
    make_config,
    make_pairs,
    make_tokenizer,
    make_trainer,
    opened,
    pair_logps,
    pair_rows,
    peak_bytes,
    print_cells,
    reference_sums,
    spread,
    start_training,
    step_on_rows,
    trl_batch,
    trl_logps,
    with_lora,
    write_json,
)

from rlaifv_nb.dpo import tf32_products
from rlaifv_nb.engine.attention import KERNELS
from rlaifv_nb.engine.caches import ContentCache
from rlaifv_nb.engine.models import keep_4bit_weights_unpacked
from rlaifv_nb.engine.packing import n_tokens_of

SEVEN_B = Size(
    vocabulary=32064,
    hidden=4096,
    layers=32,
    heads=32,
    intermediate=11008,
    vision_hidden=1024,
    vision_layers=24,
    vision_heads=16,
)
# Dense bfloat16.
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "4090": 165,
    "3090": 71,
}
CAPS = (24, 40, 80)  # GB of a card, of which 2 GiB are left to the driver and to fragmentation
TOY_CAPS = (0.15, 0.25)
GIB = 2**30


# The model


def nf4_linear(bnb, layer, device, dtype):
    "A 4-bit layer of random weights in the place of an empty one."
    weight = torch.randn(layer.out_features, layer.in_features, device=device, dtype=dtype) * 0.02
    quantised = bnb.nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=dtype,
        quant_type="nf4",
        device="meta",
    )
    quantised.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
    ).to(device)
    return quantised


def fill_rest(module, device, dtype):
    "Random weights for what is still empty: norms are ones, biases zeros."
    for name, p in list(module.named_parameters(recurse=False)):
        if p.is_meta:
            empty = torch.empty(p.shape, device=device, dtype=dtype)
            values = empty.normal_(std=0.02) if p.ndim > 1 else empty.fill_(float(name == "weight"))
            setattr(module, name, nn.Parameter(values, requires_grad=False))


def open_nf4(size, share, device, dtype=torch.bfloat16):
    "A quantised model of random weights that never was larger than it is, and the words of its vocabulary."
    try:
        import bitsandbytes as bnb
    except ImportError as e:
        raise SystemExit("NF4 needs bitsandbytes, which is not installed: pip install bitsandbytes") from e
    tokenizer, words = make_tokenizer(size)
    with init_empty_weights():
        model = LlavaForConditionalGeneration(make_config(size, tokenizer))
    torch.manual_seed(0)
    for layer in model.model.language_model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, nf4_linear(bnb, child, device, dtype))
    for module in model.modules():
        fill_rest(module, device, dtype)
    model.is_loaded_in_4bit = True
    keep_4bit_weights_unpacked(model)
    return opened(model.to(device), size, tokenizer, share), words


def ours_trained(size, device):
    "Our model with an adapter in float32, as 05_dpo trains it, in training mode, and its optimiser."
    vlm = with_lora(open_nf4(size, True, device)[0])
    assert {p.dtype for p in vlm.model.parameters() if p.requires_grad} == {torch.float32}
    return vlm, start_training(vlm.model)


# Measuring


def peak_of(run, device):
    "Peak memory (bytes) of `run` above what was there before."
    if device == "cpu":
        return peak_bytes(run)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def weights_of(model):
    "Bytes of parameters and buffers."
    return sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def flops_of(size, rows, layout, passes):
    """Floating-point operations of a step in the language model, without recomputation: `passes` forwards or
    their like.
    """
    tokens = seen = answers = 0
    for row in rows:
        n, branches = len(row["prompt"]), [len(b) for b in row["branches"]]
        answers += sum(branches)
        if layout == "plain":
            tokens += sum(n + b for b in branches)
            seen += sum((n + b) * (n + b + 1) // 2 for b in branches)
        else:
            tokens += n + sum(branches)
            seen += n * (n + 1) // 2 + sum(b * n + b * (b + 1) // 2 for b in branches)
    layer = 4 * size.hidden**2 + 3 * size.hidden * size.intermediate
    return (
        passes
        * 2
        * (size.layers * (tokens * layer + 2 * seen * size.hidden) + answers * size.hidden * size.vocabulary)
    )


def peak_flops(name, given):
    "The card's dense bfloat16 rate in operations a second, if it is known."
    found = given or next((v for k, v in PEAK_TFLOPS.items() if k in name), None)
    return found and found * 1e12


def works_here(name, run):
    "Why a side cannot run here, or an empty string."
    try:
        run()
    except torch.OutOfMemoryError:
        return f"{name}: out of memory"
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as e:
        return f"{name}: not available ({str(e).strip().splitlines()[0][:120]})"
    return ""


def compare_steps(size, device, folder, repeats, peak_rate):
    """A table row for each side, and notes on those that cannot run.

    Pictures and texts are prepared beforehand on both sides: beside a GPU, workers do it."""
    vlm, optimizer = ours_trained(size, device)
    pairs = make_pairs(size, make_tokenizer(size)[1], folder)
    rows, reference = pair_rows(vlm, pairs), reference_sums(vlm, pairs, "shared")
    with_features = pair_rows(vlm, pairs, ContentCache(folder / "features", 1))

    def step(layout, kernel="sdpa", rows=rows):
        return lambda: step_on_rows(vlm, optimizer, rows, reference, layout, kernel)

    sides = {
        "plain": (step("plain"), vlm.model, "plain", 2),
        "shared": (step("shared"), vlm.model, "shared", 2),
    }
    for kernel in KERNELS[1:]:
        sides[f"packed, {kernel}"] = (step("packed", kernel), vlm.model, "packed", 2)
    sides["packed + features, auto"] = (step("packed", "auto", with_features), vlm.model, "packed", 2)
    notes = []
    if find_spec("trl") is None:
        notes.append(f"TRL: not installed (pip install trl=={TRL})")
    else:
        trainer, trl_optimizer = make_trainer(
            open_nf4(size, False, device)[0], pairs, folder / "trl", bf16=True, use_cpu=device == "cpu"
        )
        batch = trl_batch(trainer)

        def trl_step():
            trainer.training_step(trainer.model, dict(batch))
            trl_optimizer.step()
            trl_optimizer.zero_grad()

        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            theirs = trl_logps(trainer)
        with torch.no_grad():
            ours = pair_logps(vlm, pairs, "packed", "auto")
        check_equal(
            "mean log-probabilities, packed and TRL",
            *([logps.float().mean()[None] for logps in side] for side in (ours, theirs)),
            tolerance=0.05,
        )
        sides = {"TRL": (trl_step, trainer.model, "plain", 3)} | sides
    for name in list(sides):
        note = works_here(name, sides[name][0])
        if note:
            notes.append(note)
            del sides[name]
            optimizer.zero_grad()
    seconds = interleave({name: run for name, (run, *_) in sides.items()}, repeats)
    table = {}
    for name, (run, model, layout, passes) in sides.items():
        median, peak = statistics.median(seconds[name]), peak_of(run, device)
        ratios = [a / b for a, b in zip(seconds["TRL"], seconds[name])] if "TRL" in seconds else []
        table[name] = {
            "pairs_per_second": len(pairs) / median,
            "noise": spread(seconds[name]),
            "seconds": seconds[name],
            "against_trl": statistics.median(ratios) if ratios else None,
            "step_gib": peak / GIB,
            "weights_gib": weights_of(model) / GIB,
            "flop_utilisation": flops_of(size, rows, layout, passes) / median / peak_rate
            if peak_rate
            else None,
        }
    return table, notes


# The largest packing


def largest(fits, guess, tries=6):
    "The largest number found for which `fits` is true, from a guess, in steps of about 5 %."
    n, best, failed = max(1, guess), 0, math.inf
    for _ in range(tries):
        if fits(n):
            best = max(best, n)
            n = max(n + 1, math.floor(n * 1.05))
        else:
            failed = min(failed, n)
            n = min(n - 1, math.ceil(n * 0.95))
        if n <= best or n >= failed:
            break
    return best


def largest_packings(size, device, folder, caps, deadline):
    """For each cap (GB), pairs and tokens of the largest row that one training step has room for, vision
    tower and optimiser included.
    """
    vlm, optimizer = ours_trained(size, device)
    some = pair_rows(vlm, make_pairs(size, make_tokenizer(size)[1], folder))

    def rows_of(n):
        return [some[k % len(some)] for k in range(n)]

    def step(n):
        return lambda: step_on_rows(vlm, optimizer, rows_of(n), torch.zeros(n, 2, device=device), "packed")

    step(2)()
    few, many = (peak_of(step(n), device) for n in (2, 6))
    each, weights, found = max((many - few) / 4, 1), weights_of(vlm.model), {}
    for cap in caps:
        limit = (cap - 2) * GIB if device != "cpu" else cap * GIB
        if time.perf_counter() > deadline:
            found[cap] = "not measured: out of time"
            continue
        if device != "cpu" and limit > torch.cuda.get_device_properties(0).total_memory:
            found[cap] = "more than this GPU has"
            continue

        def fits(n, limit=limit):
            if device == "cpu":
                return weights + peak_of(step(n), device) <= limit
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(
                limit / torch.cuda.get_device_properties(0).total_memory
            )
            full = False
            try:
                step(n)()
            except torch.OutOfMemoryError:
                full = True
            optimizer.zero_grad()
            gc.collect()
            torch.cuda.set_per_process_memory_fraction(1.0)
            return not full

        n = largest(fits, int((limit - weights - few) / each) + 2)
        found[cap] = {"pairs": n, "tokens": sum(map(n_tokens_of, rows_of(n)))}
    return found


# The run


def show(table, notes, packings):
    "One table of everything."

    def value(x, form):
        return "" if x is None or x != x else format(x, form)

    cells = [
        ("side", "pairs/s", "noise", "against TRL", "FLOP utilisation", "peak of a step, GiB", "weights, GiB")
    ]
    for name, r in table.items():
        forms = {
            "pairs_per_second": ".3g",
            "noise": ".1%",
            "against_trl": ".2f",
            "flop_utilisation": ".1%",
            "step_gib": ".3g",
            "weights_gib": ".3g",
        }
        cells.append((name, *(value(r[key], form) for key, form in forms.items())))
    for cap, r in packings.items():
        cells.append(
            (
                f"largest row in {cap} GB",
                r if isinstance(r, str) else f"{r['pairs']} pairs, {r['tokens']} tokens",
                "",
                "",
                "",
                "",
                "",
            )
        )
    print_cells(cells)
    for note in notes:
        print(note)


def main():
    "Compares steps, looks for the largest packing, prints one table."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="toy size on a CPU: whether the script works, not how fast anything is",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peak-tflops", type=float, help="dense bfloat16 rate of the card, if this script does not know it"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=8,
        help="no new search for a largest packing begins after three quarters of this",
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    a = parser.parse_args()
    if not a.smoke and not torch.cuda.is_available():
        raise SystemExit(
            "This benchmark needs a CUDA GPU and there is none here; --smoke runs the same at toy size on a "
            "CPU."
        )
    started, device = time.perf_counter(), "cpu" if a.smoke else "cuda"
    size, repeats = (
        (replace(SIZES["tiny"], hidden=128), min(a.repeats, 2)) if a.smoke else (SEVEN_B, a.repeats)
    )
    about = machine()
    print(", ".join(f"{k} {v}" for k, v in about.items() if v is not None))
    peak_rate = None if a.smoke and not a.peak_tflops else peak_flops(about.get("gpu", ""), a.peak_tflops)
    with tempfile.TemporaryDirectory() as folder, tf32_products(device == "cuda"):
        table, notes = compare_steps(size, device, Path(folder), repeats, peak_rate)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        packings = largest_packings(
            size, device, Path(folder), TOY_CAPS if a.smoke else CAPS, started + 45 * a.minutes
        )
    a.out.mkdir(parents=True, exist_ok=True)
    took = time.perf_counter() - started
    write_json(
        a.out / "bench_gpu.json",
        {
            "machine": about,
            "smoke": a.smoke,
            "sides": table,
            "notes": notes,
            "largest": packings,
            "took_seconds": round(took, 1),
        },
    )
    show(table, notes, packings)
    print(f"{'smoke run, figures mean nothing; ' if a.smoke else ''}{took / 60:.1f} minutes")


if __name__ == "__main__":
    main()
