"""Measures this library against what else one would use, side by side: `python tests/bench/bench.py`.

README.md says what each work is.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from workload import (
    SIZES,
    answer_length,
    check_equal,
    check_gradients,
    gradients,
    import_trl,
    interleave,
    loss_of_rows,
    machine,
    make_pairs,
    make_picture,
    make_trainer,
    open_random,
    our_step,
    pair_logps,
    pair_rows,
    peak_bytes,
    print_cells,
    reference_sums,
    spread,
    start_training,
    status_bytes,
    text_of,
    trl_batch,
    trl_logps,
    trl_step,
    with_lora,
    write_json,
)

from rlaifv_nb.engine.caches import ContentCache
from rlaifv_nb.engine.models import prompt_inputs, prompt_positions, surface_ids, unsampled_ids
from rlaifv_nb.engine.packing import collate_rows, pack_row, row_logps
from rlaifv_nb.engine.pictures import load_image
from rlaifv_nb.engine.prefix import branch_logps, read_prompts, sample_branches, stack_inputs, yes_no_asker
from rlaifv_nb.records import YES_NO_SUFFIX


@dataclass
class Run:
    "One run of this script: its size, how often sides alternate, and a folder for temporary files."

    size: object
    repeats: int
    folder: Path


@dataclass
class Work:
    """Sides (name: (function, units it does)) that do the same work, and what is compared: (label, slow side,
    fast sides whose times are added, the least ratio that is asked for, or None).
    """

    unit: str
    sides: dict
    comparisons: list
    profiled: str


# DPO


def ours_trained(run, share=True):
    "Our model with an adapter, in training mode, and its optimiser."
    vlm = with_lora(open_random(run.size, share)[0])
    return vlm, start_training(vlm.model)


def pairs_of(run):
    "The batch of pairs."
    return make_pairs(run.size, open_random(replace(run.size, layers=1))[1], run.folder)


def check_step(vlm, pairs, theirs, name, settings):
    "Checks log-probabilities of every setting (name: (layout, cache)) against the other side's."
    for label, (layout, cache) in settings.items():
        with torch.no_grad():
            check_equal(
                f"log-probabilities, {label} and {name}", pair_logps(vlm, pairs, layout, cache=cache), theirs
            )


def dpo_trl(run):
    """Training steps against TRL's, collation included.

    TRL computes the reference in every step; ours is known, or counted as one pass an epoch.
    """
    import_trl()
    pairs = pairs_of(run)
    trainer, trl_optimizer = make_trainer(
        open_random(run.size, share=False)[0], pairs, run.folder / "trl", bf16=False, use_cpu=True
    )
    loader = trainer.get_train_dataloader()
    vlm, optimizer = ours_trained(run)
    cache = ContentCache(run.folder / "features", 1)
    settings = {
        "shared": ("shared", None),
        "packed": ("packed", None),
        "packed + features": ("packed", cache),
    }
    check_step(vlm, pairs, trl_logps(trainer), "TRL", settings)
    reference = reference_sums(vlm, pairs, "shared")
    theirs, ours = (
        trainer.training_step(trainer.model, trl_batch(trainer)),
        loss_of_rows(vlm, pair_rows(vlm, pairs), reference, "packed"),
    )
    ours.backward()
    check_equal("loss, packed and TRL", [ours.detach()[None]], [theirs[None]])
    check_gradients("gradients, packed and TRL", gradients(vlm.model), gradients(trainer.model))

    def step(layout, cache):
        return lambda: our_step(vlm, optimizer, pairs, reference, layout, cache=cache)

    n = len(pairs)
    sides = {"TRL": (lambda: trl_step(trainer, trl_optimizer, loader), n)} | {
        name: (step(*how), n) for name, how in settings.items()
    }
    sides |= {"reference pass": (lambda: reference_sums(vlm, pairs, "packed"), n)}
    best = "packed + features"
    return Work(
        "pair",
        sides,
        [
            ("shared", "TRL", ["shared"], 2.5),
            ("packed", "TRL", ["packed"], 2.5),
            (best, "TRL", [best], 3.0),
            (f"{best}, including the reference pass, one epoch", "TRL", [best, "reference pass"], None),
        ],
        best,
    )


def dpo_plain(run):
    "Training steps against our own rows of one answer each, the image read twice a pair."
    pairs = pairs_of(run)
    plain, plain_optimizer = ours_trained(run, share=False)
    vlm, optimizer = ours_trained(run)
    with torch.no_grad():
        theirs = pair_logps(plain, pairs, "plain")
    check_step(vlm, pairs, theirs, "plain", {"shared": ("shared", None), "packed": ("packed", None)})
    reference, n = reference_sums(vlm, pairs, "shared"), len(pairs)

    def step(layout):
        return lambda: our_step(vlm, optimizer, pairs, reference, layout), n

    sides = {
        "plain": (lambda: our_step(plain, plain_optimizer, pairs, reference, "plain"), n),
        "shared": step("shared"),
        "packed": step("packed"),
    }
    return Work(
        "pair", sides, [("shared", "plain", ["shared"], 1.7), ("packed", "plain", ["packed"], 1.7)], "packed"
    )


NO_OP = "no-op: a side against itself"
MEMORY_SIDES = ("TRL", "shared", "packed", "packed + features")


def memory_of(run, side):
    """Peak memory (bytes) of one training step above what was there before it, and the peak of the whole
    process; for a process of its own.
    """
    pairs = pairs_of(run)
    if side == "TRL":
        trainer, optimizer = make_trainer(
            open_random(run.size, share=False)[0], pairs, run.folder / "trl", bf16=False, use_cpu=True
        )
        loader = trainer.get_train_dataloader()
        above = peak_bytes(lambda: trl_step(trainer, optimizer, loader))
    else:
        vlm, optimizer = ours_trained(run)
        layout, cache = (
            side.split()[0],
            ContentCache(run.folder / "features", 1) if "features" in side else None,
        )
        reference = reference_sums(vlm, pairs, layout, cache=cache)
        above = peak_bytes(lambda: our_step(vlm, optimizer, pairs, reference, layout, cache=cache))
    return {"step": above, "process": status_bytes("VmHWM") if Path("/proc/self/status").exists() else None}


def dpo_memory(run):
    "Peak memory of one training step, each side in processes of its own, in turns."
    import_trl()
    name = next(k for k, v in SIZES.items() if v == run.size)
    found = {side: [] for side in MEMORY_SIDES}
    for _ in range(min(run.repeats, 2)):
        for side in MEMORY_SIDES:
            command = [sys.executable, __file__, "--size", name, "--memory-of", side]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{side}: {done.stderr.strip().splitlines()[-1]}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    gib = {side: [x["step"] / 2**30 for x in found[side]] for side in found}
    result = summary("GiB / step", gib, [(side, "TRL", [side], 2.0) for side in MEMORY_SIDES[1:]])
    return result | {"process_bytes": {side: [x["process"] for x in found[side]] for side in found}}


# Feedback


def claims_of(run, words, n, seed=3):
    "Yes/no questions, about 20 tokens each with their suffix."
    rng = random.Random(seed)
    return [f"Is {text_of(words, run.size.claim_words, rng)}?" for _ in range(n)]


@torch.no_grad()
def probabilities(plain, words, inputs, **kwargs):
    "For each of `words` (token lists), its probability after each prompt."
    probs = (
        plain.model(**inputs, logits_to_keep=1, use_cache=False, **kwargs).logits[:, -1].float().softmax(-1)
    )
    return torch.stack([probs[:, ids].sum(1) for ids in words], 1)


def ask_singly(plain, words, picture, questions):
    "P(yes) and P(no) of each question with a forward of its whole prompt, as the official code does."
    return torch.cat(
        [probabilities(plain, words, prompt_inputs(plain, picture, q + YES_NO_SUFFIX)) for q in questions]
    )


def ask_in_batches(plain, words, picture, questions, n):
    "The same in padded batches of `n` whole prompts."
    found = []
    for k in range(0, len(questions), n):
        inputs = [prompt_inputs(plain, picture, q + YES_NO_SUFFIX) for q in questions[k : k + n]]
        batch = stack_inputs(inputs, plain.tokenizer.pad_token_id, plain.device)
        found.append(probabilities(plain, words, batch, position_ids=prompt_positions(plain.core, batch)))
    return torch.cat(found)


def picture_of(run, seed=0):
    "One picture."
    make_picture(run.folder / f"one{seed}.png", seed)
    return load_image(run.folder / f"one{seed}.png")


def feedback(run):
    "Claims a second about one image. The slow sides do fewer claims."
    (plain, names), (vlm, _), picture = (
        open_random(run.size, share=False),
        open_random(run.size),
        picture_of(run),
    )
    questions = claims_of(run, names, run.size.answers * run.size.claims)
    words, ask = [surface_ids(vlm.tokenizer, w) for w in ("yes", "no")], yes_no_asker(vlm)
    few, some = questions[: run.size.plain_claims], questions[: run.size.batched_claims]
    ours = torch.tensor(ask([picture], [questions])[0]).log()
    check_equal(
        "log P(yes), log P(no), shared and singly",
        ours[: len(few)],
        ask_singly(plain, words, picture, few).log(),
    )
    check_equal(
        "log P(yes), log P(no), shared and in batches",
        ours[: len(some)],
        ask_in_batches(plain, words, picture, some, run.size.batch).log(),
    )
    shared = (lambda: ask([picture], [questions]), len(questions))
    sides = {
        "one forward a claim": (lambda: ask_singly(plain, words, picture, few), len(few)),
        "in batches": (lambda: ask_in_batches(plain, words, picture, some, run.size.batch), len(some)),
        "shared": shared,
        "shared again": shared,
    }
    return Work(
        "claim",
        sides,
        [
            ("shared", "one forward a claim", ["shared"], 15.0),
            ("shared", "in batches", ["shared"], 4.0),
            (NO_OP, "shared again", ["shared"], None),
        ],
        "shared",
    )


# Sampling and scoring


def word_ids(vlm, words):
    "The token of each word."
    return vlm.tokenizer("".join(f" {w}" for w in words), add_special_tokens=False).input_ids


def answers_of(run, words, n, seed=4):
    "`n` answers from a list of token ids."
    rng = random.Random(seed)
    return [[rng.choice(words) for _ in range(answer_length(run.size, rng))] for _ in range(n)]


@torch.no_grad()
def sampling(run):
    "Ten answers to one prompt against `generate`; both go on to the last token, from the same distribution."
    (plain, names), (vlm, _) = open_random(run.size, share=False), open_random(run.size)
    n, length = run.size.answers, run.size.answer[0]
    inputs = prompt_inputs(vlm, picture_of(run), text_of(names, run.size.question_words, random.Random(5)))
    eos, pad, never = (
        vlm.tokenizer.eos_token_id,
        vlm.tokenizer.pad_token_id,
        [*unsampled_ids(vlm), vlm.tokenizer.eos_token_id],
    )

    def generate(max_new_tokens=length, **kwargs):
        return plain.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            eos_token_id=eos,
            pad_token_id=pad,
            suppress_tokens=never,
            return_dict_in_generate=True,
            **kwargs,
        )

    def sample(max_new_tokens=length, temperature=1.0):
        return sample_branches(
            vlm,
            read_prompts(vlm, [inputs]),
            [0] * n,
            range(n),
            temperature,
            max_new_tokens=max_new_tokens,
            never=never,
        )

    start, short = inputs["input_ids"].shape[1], min(16, length)
    greedy = generate(short, do_sample=False).sequences[0, start:].tolist()
    if any(ids != greedy for ids, _ in sample(short, temperature=0)):
        raise SystemExit("greedy answers differ from those of generate")
    random_mode = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n)
    torch.manual_seed(0)
    drawn = generate(short, output_logits=True, **random_mode)
    tokens = drawn.sequences[:, start:]
    theirs = torch.stack(drawn.logits, 1).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    check_equal(
        "log-probabilities of sampled tokens, shared and generate",
        score_shared(vlm, inputs, tokens.tolist()),
        theirs,
    )
    if {len(ids) for ids, _ in sample()} != {length} or generate(**random_mode).sequences.shape != (
        n,
        start + length,
    ):
        raise SystemExit("the sides do not sample the same number of tokens")
    sides = {"generate": (lambda: generate(**random_mode), n), "shared": (sample, n)}
    return Work("answer", sides, [("shared", "generate", ["shared"], 2.0)], "shared")


@torch.no_grad()
def score_plain(vlm, inputs, branches, batch=8):
    """Log-probabilities of answers under the model as it is, in batches of whole rows; only where an answer's
    token is predicted.
    """
    rows, found = [pack_row(inputs, [b]) for b in branches], []
    for k in range(0, len(rows), batch):
        found += row_logps(vlm.core, collate_rows(rows[k : k + batch], "plain"))
    return found


def score_shared(vlm, inputs, branches):
    "The same with one reading of the prompt."
    return branch_logps(vlm, read_prompts(vlm, [inputs]), [0] * len(branches), branches)


def on_and_off(vlm, score, *args):
    "Scores with the adapter and without it."
    with vlm.model.disable_adapter():
        off = score(vlm, *args)
    return score(vlm, *args) + off


def best_of_64(run):
    """The reward of every candidate: its log-probability with and without the adapter.

    The plain side does fewer candidates.
    """
    (plain, names), (vlm, _) = open_random(run.size, share=False), open_random(run.size)
    plain, vlm, n = with_lora(plain), with_lora(vlm), run.size.candidates
    plain.model.eval(), vlm.model.eval()
    inputs = prompt_inputs(vlm, picture_of(run), text_of(names, run.size.question_words, random.Random(6)))
    branches = answers_of(run, word_ids(vlm, names), n)
    some = branches[:: n // run.size.plain_candidates]
    check_equal(
        "log-probabilities, shared and plain, adapter on and off",
        on_and_off(vlm, score_shared, inputs, some[:8]),
        on_and_off(plain, score_plain, inputs, some[:8]),
    )
    shared = (lambda: on_and_off(vlm, score_shared, inputs, branches), n)
    sides = {
        "plain batches": (lambda: on_and_off(plain, score_plain, inputs, some), len(some)),
        "shared": shared,
    }
    return Work("candidate", sides, [("shared", "plain batches", ["shared"], 4.0)], "shared")


# Growth


def claims_point(run, size, n):
    "Both ways to ask `n` claims."
    (plain, names), (vlm, _), picture = open_random(size, share=False), open_random(size), picture_of(run)
    words, ask, questions = (
        [surface_ids(vlm.tokenizer, w) for w in ("yes", "no")],
        yes_no_asker(vlm),
        claims_of(run, names, n),
    )
    return {
        "shared": lambda: ask([picture], [questions]),
        "plain": lambda: ask_in_batches(plain, words, picture, questions, size.batch),
    }


def candidates_point(run, size, n):
    "Both ways to score `n` candidates."
    (plain, names), (vlm, _) = open_random(size, share=False), open_random(size)
    inputs = prompt_inputs(vlm, picture_of(run), text_of(names, size.question_words, random.Random(6)))
    branches = answers_of(run, word_ids(vlm, names), n)
    return {
        "shared": lambda: score_shared(vlm, inputs, branches),
        "plain": lambda: score_plain(plain, inputs, branches),
    }


def line(xs, ys):
    "Least-squares line: what is paid once, and what is paid for each more."
    slope, constant = statistics.linear_regression(xs, ys)
    return {"constant": constant, "each": slope}


def growth(run):
    """Time and peak memory against the number of claims, of candidates, and the length of the prefix, shared
    and plain.
    """
    size, panels = run.size, {}
    for what, point, counts in (
        ("claims", claims_point, size.growth_claims),
        ("candidates", candidates_point, size.growth_candidates),
        ("image tokens", claims_point, size.growth_images),
    ):
        found = {"shared": [], "plain": []}
        for count in counts:
            here = replace(size, image=count) if what == "image tokens" else size
            x = here.image_tokens if what == "image tokens" else count
            sides = point(run, here, size.growth_prefix_claims if what == "image tokens" else count)
            if what != "image tokens" and count > size.growth_plain:
                del sides["plain"]
            seconds = interleave(sides, min(run.repeats, 2))
            for side, f in sides.items():
                found[side].append({"x": x, "seconds": seconds[side], "peak_bytes": peak_bytes(f)})
        panels[what] = {
            side: {"points": points}
            | line([p["x"] for p in points], [statistics.median(p["seconds"]) for p in points])
            for side, points in found.items()
        }
        for side, panel in panels[what].items():
            print(
                f"  {what}, {side}: {panel['constant']:.3g} s once and {panel['each']:.3g} s for each more",
                flush=True,
            )
    return {"panels": panels, "rows": []}


# The run


def summary(unit, values, comparisons):
    "Medians and noise of every side, and the ratios: of each alternation, then their median."
    rows = []
    for label, slow, fast, target in comparisons:
        ratios = [s / sum(values[f][k] for f in fast) for k, s in enumerate(values[slow])]
        ratio = statistics.median(ratios)
        rows.append(
            {
                "label": label,
                "against": slow,
                "ratio": ratio,
                "noise": spread(ratios),
                "target": target,
                "reached": None if target is None else ratio >= target,
            }
        )
    return {
        "unit": unit,
        "values": values,
        "median": {k: statistics.median(v) for k, v in values.items()},
        "noise": {k: spread(v) for k, v in values.items()},
        "rows": rows,
    }


def measure(work, repeats):
    "Interleaves a work's sides; values are seconds a unit."
    seconds = interleave({name: f for name, (f, _) in work.sides.items()}, repeats)
    return summary(
        f"seconds / {work.unit}",
        {name: [s / work.sides[name][1] for s in seconds[name]] for name in seconds},
        work.comparisons,
    )


WORKS = {
    "dpo_trl": dpo_trl,
    "dpo_plain": dpo_plain,
    "feedback": feedback,
    "sampling": sampling,
    "best_of_64": best_of_64,
}
OTHERS = {"dpo_memory": dpo_memory, "growth": growth}
NAMES = ("dpo_trl", "dpo_memory", "dpo_plain", "feedback", "sampling", "best_of_64", "growth")
NEEDS_TRL = ("dpo_trl", "dpo_memory")


def profile(work, rows=20):
    "The operators in which our side of a work spends its time."
    run = work.sides[work.profiled][0]
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=False) as p:
        run()
    print(f"our side: {work.profiled}")
    print(p.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=60))


def print_table(works):
    "Every ratio with its target, then every side."

    def percent(x):
        return "" if x != x else f"{100 * x:.1f} %"

    cells = [("work", "ours", "against", "ratio", "noise", "asked", "reached")]
    for name, result in works.items():
        for r in result["rows"]:
            asked, reached = (
                ("", "") if r["target"] is None else (f"{r['target']:.1f}x", "yes" if r["reached"] else "no")
            )
            cells.append(
                (name, r["label"], r["against"], f"{r['ratio']:.2f}x", percent(r["noise"]), asked, reached)
            )
    print_cells(cells)
    cells = [("work", "side", "median", "noise", "unit")]
    for name, result in works.items():
        cells += [
            (name, side, f"{m:.4g}", percent(result["noise"][side]), result["unit"])
            for side, m in result.get("median", {}).items()
        ]
    print_cells(cells)


def plot_ratios(works, path):
    "Bars of all ratios that have a target, with the target."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(name, r) for name, result in works.items() for r in result["rows"] if r["target"]]
    if not rows:
        return
    fig, ax = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.2), constrained_layout=True)
    places = range(len(rows))[::-1]
    ax.hlines(
        places,
        [min(r["ratio"], r["target"]) for _, r in rows],
        [max(r["ratio"], r["target"]) for _, r in rows],
        color="lightgrey",
    )
    ax.scatter([r["ratio"] for _, r in rows], places, s=60, color="tab:blue", label="measured", zorder=3)
    ax.scatter(
        [r["target"] for _, r in rows], places, marker="|", s=300, color="black", label="asked for", zorder=3
    )
    ax.set_yticks(places, [f"{name}: {r['label']}\nagainst {r['against']}" for name, r in rows], fontsize=8)
    ax.axvline(1, color="grey", lw=0.8)
    ax.set_xscale("log")
    ticks = [
        t for t in (1, 2, 3, 5, 10, 20, 40) if t <= 1.5 * max(max(r["ratio"], r["target"]) for _, r in rows)
    ]
    ax.set_xticks(ticks, [f"{t}x" for t in ticks])
    ax.minorticks_off()
    ax.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_growth(panels, path):
    "Time above, peak memory below, against claims, candidates and prefix length."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        2, len(panels), figsize=(4 * len(panels), 6), constrained_layout=True, sharex="col"
    )
    for column, (what, sides) in zip(axes.T, panels.items()):
        for side, marker in (("shared", "o"), ("plain", "s")):
            points = sides[side]["points"]
            column[0].plot(
                [p["x"] for p in points],
                [statistics.median(p["seconds"]) for p in points],
                marker=marker,
                label=side,
            )
            column[1].plot(
                [p["x"] for p in points], [p["peak_bytes"] / 2**20 for p in points], marker=marker, label=side
            )
        column[1].set_xlabel(what)
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("peak memory, MiB")
    axes[0, 0].legend()
    for ax in axes.flat:
        ax.set_ylim(bottom=0)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def arguments():
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES)
    )
    parser.add_argument("--repeats", type=int, default=5, help="alternations after the warm-up")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-results"), help="folder of bench.json and the plots"
    )
    parser.add_argument(
        "--profile",
        choices=WORKS,
        metavar="NAME",
        help="only profile our side of a work: " + ", ".join(WORKS),
    )
    parser.add_argument("--memory-of", choices=MEMORY_SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    "Runs the works that were asked for; results are written after each."
    a = arguments()
    with tempfile.TemporaryDirectory() as folder:
        run = Run(SIZES[a.size], a.repeats, Path(folder))
        if a.memory_of:
            print(json.dumps(memory_of(run, a.memory_of)))
            return
        if a.profile:
            profile(WORKS[a.profile](run))
            return
        if set(a.only) & set(NEEDS_TRL):
            import_trl()
        a.out.mkdir(parents=True, exist_ok=True)
        result = {
            "machine": machine(),
            "size": {"name": a.size} | asdict(run.size),
            "repeats": a.repeats,
            "works": {},
        }
        print(", ".join(f"{k} {v}" for k, v in result["machine"].items() if v is not None))
        for name in (n for n in NAMES if n in a.only):
            print(f"{name} ...", flush=True)
            started = time.perf_counter()
            result["works"][name] = (
                OTHERS[name](run) if name in OTHERS else measure(WORKS[name](run), a.repeats)
            )
            result["works"][name]["took_seconds"] = round(time.perf_counter() - started, 1)
            write_json(a.out / "bench.json", result)
        print_table(result["works"])
        plot_ratios(result["works"], a.out / "ratios.png")
        if "growth" in result["works"]:
            plot_growth(result["works"]["growth"]["panels"], a.out / "growth.png")
        print(
            f"\nwritten to {a.out}"
            + (" (fewer than 5 alternations: not a measurement)" if a.repeats < 5 else "")
        )


if __name__ == "__main__":
    main()
