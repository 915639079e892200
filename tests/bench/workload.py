"""What the benchmarks share: a LLaVA of random weights, made-up pictures and texts, one training step of each side, and the means to measure."""

import ctypes
import gc
import json
import os
import platform
import random
import statistics
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rlaifv_nb.engine.attention import sharing_problem
from rlaifv_nb.engine.caches import get_or_compute, picture_entry, picture_key, question_inputs, to_device
from rlaifv_nb.engine.models import OpenModel, answer_ids, lora_targets, prompt_inputs
from rlaifv_nb.engine.packing import collate_rows, pack_row, row_logps
from rlaifv_nb.engine.pictures import load_image
from rlaifv_nb.records import YES_NO_SUFFIX, sha256_of

warnings.filterwarnings("ignore", category=FutureWarning)

TRL = "1.16.0"
PATCH = 14
BETA, LEARNING_RATE, RANK, ALPHA = 0.1, 1e-5, 16, 32


@dataclass(frozen=True)
class Size:
    "Shapes of a model, and how much of each work is done."

    image: int = 336
    vocabulary: int = 32000
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    intermediate: int = 2048
    vision_hidden: int = 256
    vision_layers: int = 6
    vision_heads: int = 4
    question_words: int = 22
    claim_words: int = 12
    answer: tuple = (130, 40)  # mean and standard deviation of its tokens
    pairs: int = 2
    answers: int = 10  # of an image
    claims: int = 6  # of an answer
    candidates: int = 64
    plain_claims: int = 6  # that the slow sides do; their time is scaled a claim, and a candidate
    batched_claims: int = 16
    plain_candidates: int = 8
    batch: int = 16  # of the batched side of `feedback`
    growth_claims: tuple = (1, 8, 32, 128)
    growth_candidates: tuple = (1, 8, 32)
    growth_images: tuple = (112, 224, 336, 448)
    growth_prefix_claims: int = 4  # asked of each picture size
    growth_plain: int = 8  # most claims, and candidates, that the plain side of `growth` does

    @property
    def image_tokens(self):
        "Of one picture."
        return (self.image // PATCH) ** 2


# `small`: the language model has 85 M parameters in its layers and 25 M in its head, and 25 M in embeddings, which cost nothing. LLaVA-1.5's
# vision tower has 4.5 % of its language model's parameters (0.30 of 6.7 billion): 256 x 6 layers are 5 M, 4.5 % of 110 M.
SIZES = {
    "small": Size(),
    "tiny": Size(
        image=112,
        vocabulary=1000,
        hidden=64,
        layers=2,
        heads=4,
        intermediate=172,
        vision_hidden=32,
        vision_layers=2,
        vision_heads=2,
        answer=(26, 8),
        candidates=16,
        plain_claims=6,
        batched_claims=16,
        plain_candidates=8,
        batch=8,
        growth_claims=(1, 8, 32),
        growth_candidates=(1, 4, 16),
        growth_images=(56, 112, 168),
    ),
}


def import_trl():
    "TRL's `DPOConfig` and `DPOTrainer`; a missing TRL ends the run with one sentence."
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as e:
        raise SystemExit(
            f"This benchmark compares against TRL, which is not installed: pip install trl=={TRL}"
        ) from e
    return DPOConfig, DPOTrainer


# Pictures and texts


def make_words(n, seed=0):
    "Invented words of two or three syllables."
    rng, words = random.Random(seed), {}
    while len(words) < n:
        words[
            "".join(rng.choice("bdfglmnprstvz") + rng.choice("aeiou") for _ in range(rng.choice((2, 3))))
        ] = True
    return list(words)


def make_tokenizer(size):
    "Byte-level BPE in which most of the invented words are one token, and Yes and No are."
    words = make_words(min(2000, size.vocabulary // 5))
    corpus = [f" {w}" for w in words] * 3 + [
        f"USER: <image>\nIs ?{YES_NO_SUFFIX} ASSISTANT: Yes No yes no",
        "Yes",
        "No",
        ".",
    ] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=min(size.vocabulary, 6000),
            show_progress=False,
            special_tokens=["<pad>", "<s>", "</s>", "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        clean_up_tokenization_spaces=False,
    )
    single = [w for w in words if len(fast(f" {w}", add_special_tokens=False).input_ids) == 1]
    return fast, single


def text_of(words, n, rng):
    "A text of `n` tokens, each a word."
    return " ".join(rng.choice(words) for _ in range(n))


def answer_length(size, rng):
    "Tokens of an answer: normal, and within three tenths and twice the mean."
    mean, deviation = size.answer
    return round(min(max(rng.gauss(mean, deviation), 0.3 * mean), 2 * mean))


def make_picture(path, seed):
    "A file with a smooth coloured picture of 448 x 336 pixels."
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((448, 336), Image.Resampling.BICUBIC).save(path)


def make_pairs(size, words, folder, n=None, seed=1):
    "Preference pairs: `picture` (a file), `question`, `chosen`, `rejected`."
    rng, pairs = random.Random(seed), []
    for k in range(n or size.pairs):
        path = Path(folder) / f"picture{k}.png"
        make_picture(path, k)
        pair = {"picture": str(path), "question": text_of(words, size.question_words, rng)}
        pairs.append(
            pair | {side: text_of(words, answer_length(size, rng), rng) for side in ("chosen", "rejected")}
        )
    return pairs


# The model


def make_config(size, tokenizer):
    "A LLaVA of this size."
    vision = CLIPVisionConfig(
        hidden_size=size.vision_hidden,
        intermediate_size=4 * size.vision_hidden,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=size.image,
        patch_size=PATCH,
        projection_dim=size.vision_hidden,
    )
    text = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def make_processor(size, tokenizer):
    "LLaVA's processor for pictures of this size."
    from rlaifv_nb.iconworld.training import CHAT_TEMPLATE

    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": size.image}, crop_size={"height": size.image, "width": size.image}
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def opened(model, size, tokenizer, share=True):
    "The library's handle of a model, with prefix sharing on or off."
    sharing = sharing_problem(model.eval()) if share else "off"
    if share and sharing:
        raise SystemExit(f"prefix sharing is not possible: {sharing}")
    return OpenModel(
        model, make_processor(size, tokenizer), "random-llava", sha256_of(repr(size)), "none", sharing
    )


def open_random(size, share=True):
    "A model of random weights (always the same), and the words of its vocabulary. Without `share`, it is as transformers makes it."
    tokenizer, words = make_tokenizer(size)
    torch.manual_seed(0)
    return opened(LlavaForConditionalGeneration(make_config(size, tokenizer)), size, tokenizer, share), words


def lora_config(model):
    "The adapter of a model that both sides train."
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=lora_targets(model), lora_dropout=0.0)


@torch.no_grad()
def fill_adapter(model, seed=2):
    "Gives every adapter matrix random values, the same for the same seed, so that the adapter matters."
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            std = 0.02 if "lora_B" in name else p.shape[1] ** -0.5
            p.copy_((torch.randn(p.shape, generator=generator) * std).to(p))


def with_lora(vlm):
    "The model with an adapter of random values on it."
    from peft import get_peft_model

    vlm.model = get_peft_model(vlm.model, lora_config(vlm.model))
    fill_adapter(vlm.model)
    return vlm


def start_training(model):
    "Training mode with gradient checkpointing; returns the optimiser."
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


# One training step of this library


def pair_rows(vlm, pairs, cache=None):
    "Training rows of pairs, from the picture's file on; with a cache, from what it holds of the picture, as in 05_dpo."
    rows = []
    for p in pairs:
        branches = [answer_ids(vlm, p["question"], p[k]) for k in ("chosen", "rejected")]
        if cache is None:
            rows.append(pack_row(prompt_inputs(vlm, load_image(p["picture"]), p["question"]), branches))
        else:
            key = picture_key(
                vlm, sha256_of(str(p["picture"]))
            )  # 05_dpo has the file's hash from the prompts table
            entry = get_or_compute(
                cache,
                [key],
                lambda keys: [
                    picture_entry(vlm, prompt_inputs(vlm, load_image(p["picture"]), p["question"]))
                ],
            )[0]
            inputs, positions = question_inputs(vlm, entry, p["question"])
            rows.append(pack_row(inputs | {"image_features": entry["features"]}, branches, positions))
    return rows


def pair_logps(vlm, pairs, layout, kernel="auto", cache=None):
    "Log-probabilities of chosen and rejected of each pair, one tensor an answer."
    return row_logps(
        vlm.core, to_device(collate_rows(pair_rows(vlm, pairs, cache), layout, kernel), vlm.device)
    )


@torch.no_grad()
def reference_sums(vlm, pairs, layout, kernel="auto", cache=None):
    "Summed log-probabilities (pairs, 2) without the adapter."
    training = vlm.model.training
    vlm.model.eval()
    with vlm.model.disable_adapter():
        sums = torch.stack([l.sum() for l in pair_logps(vlm, pairs, layout, kernel, cache)]).view(-1, 2)
    vlm.model.train(training)
    return sums


def loss_of_rows(vlm, rows, reference, layout, kernel="auto"):
    "The preference loss of a batch of rows."
    from rlaifv_nb.dpo import preference_loss

    logps = row_logps(vlm.core, to_device(collate_rows(rows, layout, kernel), vlm.device))
    logratio = torch.stack([l.sum() for l in logps]).view(-1, 2) - reference
    return preference_loss(logratio[:, 0] - logratio[:, 1], BETA).mean()


def step_on_rows(vlm, optimizer, rows, reference, layout, kernel="auto"):
    "One optimiser step."
    loss = loss_of_rows(vlm, rows, reference, layout, kernel)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def our_step(vlm, optimizer, pairs, reference, layout, kernel="auto", cache=None):
    "One optimiser step, rows made from pictures and texts included."
    step_on_rows(vlm, optimizer, pair_rows(vlm, pairs, cache), reference, layout, kernel)


# The same of TRL


def make_trainer(vlm, pairs, folder, **options):
    "TRL's trainer with a new adapter; its training set is this one batch."
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    DPOConfig, DPOTrainer = import_trl()
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = [
        {
            "images": [p["picture"]],
            "prompt": turn("user", p["question"]),
            "chosen": turn("assistant", p["chosen"]),
            "rejected": turn("assistant", p["rejected"]),
        }
        for p in pairs
    ]
    turns = [{"role": Value("string"), "content": Value("string")}]
    features = Features(images=List(ImageFeature()), prompt=turns, chosen=turns, rejected=turns)
    config = DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(pairs),
        learning_rate=LEARNING_RATE,
        beta=BETA,
        max_length=None,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_num_workers=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    trainer = DPOTrainer(
        model=vlm.model,
        args=config,
        train_dataset=Dataset.from_list(rows, features=features),
        processing_class=vlm.processor,
        peft_config=lora_config(vlm.model),
    )
    fill_adapter(trainer.model)
    trainer.current_gradient_accumulation_steps = 1  # which `train` would set
    return trainer, start_training(trainer.model)


def trl_step(trainer, optimizer, loader):
    "One optimiser step, collation included."
    for batch in loader:
        trainer.training_step(trainer.model, batch)
        optimizer.step()
        optimizer.zero_grad()


def trl_batch(trainer):
    "The batch in the order of the training set."
    return trainer._prepare_inputs(trainer.data_collator([dict(row) for row in trainer.train_dataset]))


@torch.no_grad()
def trl_logps(trainer):
    "Log-probabilities of chosen and rejected of each pair, in our order, computed as TRL's loss does."
    batch = trl_batch(trainer)
    mask = batch.pop("completion_mask")
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    logps = trainer.model(**batch, labels=labels, fused_lm_head=True, use_cache=False).log_probs
    rows = [row[m] for row, m in zip(logps, mask[:, 1:].bool())]
    half = len(rows) // 2
    return [row for pair in zip(rows[:half], rows[half:]) for row in pair]


# Measuring


def check_equal(what, ours, theirs, tolerance=1e-3):
    "Ends the run unless both sides give the same numbers."
    ours, theirs = ([t.float().cpu() for t in x] for x in (ours, theirs))
    if [len(a) for a in ours] != [len(b) for b in theirs]:
        raise SystemExit(f"{what}: the sides differ in the number of tokens")
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs))
    print(f"  {what}: largest difference {difference:.1e}", flush=True)
    if not difference <= tolerance:
        raise SystemExit(f"{what}: the sides differ by {difference:.1e}, more than {tolerance:.0e}")


def gradients(model):
    "Gradients of the adapter by name, which are then cleared."
    found = {
        n: p.grad.detach().float().cpu().clone() for n, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    return found


def check_gradients(what, ours, theirs, tolerance=1e-3):
    "Ends the run unless every matrix has the same gradient, relative to its norm."
    if ours.keys() != theirs.keys():
        raise SystemExit(f"{what}: the sides train different matrices")
    difference = max(
        ((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-12)).item() for n in theirs
    )
    print(f"  {what}: largest relative difference {difference:.1e} in {len(theirs)} matrices", flush=True)
    if not difference <= tolerance:
        raise SystemExit(f"{what}: gradients differ by {difference:.1e}, more than {tolerance:.0e}")


def timed(run):
    "Seconds of one call."
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    gc.collect()
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def interleave(sides, repeats):
    "Seconds of each side (name: function) after a warm-up, turn by turn."
    for run in sides.values():
        run()
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            seconds[name].append(timed(run))
    return seconds


def spread(values):
    "Interquartile range over median."
    if len(values) < 2:
        return float("nan")
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def status_bytes(field):
    "A field of this process's memory status (Linux), in bytes."
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_bytes(run):
    """Peak resident memory (bytes) during `run` above what was resident before, on Linux; elsewhere what the process's own peak grew by.

    The kernel's high-water mark is reset first: unlike `ru_maxrss`, it then has no share of the parent process or of loading."""
    gc.collect()
    if not Path("/proc/self/clear_refs").exists():
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def machine():
    "The machine and the versions of what ran, without names or paths."
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (
                line.partition(":")[2].strip()
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ),
            cpu,
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        about |= {"gpu": gpu.name, "gpu_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "flash-attn"):
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = None
    return about


def write_json(path, value):
    "Writes it whole or not at all."
    Path(f"{path}.tmp").write_text(json.dumps(value, indent=1) + "\n")
    Path(f"{path}.tmp").replace(path)


def print_cells(cells):
    "Rows of text, aligned."
    if len(cells) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*cells)]
    print()
    for row in cells:
        print("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip())
