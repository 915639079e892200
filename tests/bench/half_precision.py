"""What changes when the tiny recipe's stages run in bfloat16 on NF4 weights, as on a card, not in float32.

    OMP_NUM_THREADS=1 python tests/bench/half_precision.py                       # five minutes on one core
    OMP_NUM_THREADS=1 python tests/bench/half_precision.py --quantisation none   # what bfloat16 alone does

Both sides run on the same prompts, responses, claims and pairs: those of the packaged example (24 pictures,
240 responses), and `--scenes` test scenes in stage 06. Prints a Markdown table; intervals are 95% bootstrap
intervals over pictures."""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from rlaifv_nb.benchmarks.iconworld import Case, read_cases
from rlaifv_nb.claims import run_claims
from rlaifv_nb.dpo import DpoOptions, run_dpo
from rlaifv_nb.engine.models import open_llm, open_vlm
from rlaifv_nb.evaluation import run_evaluation
from rlaifv_nb.feedback import run_feedback
from rlaifv_nb.guided_decoding import read_candidates, reward_of, run_guided_decoding
from rlaifv_nb.records import (
    Claim,
    Pair,
    RefLogp,
    Response,
    Verdict,
    package_folder,
    read_manifest,
    read_table,
)
from rlaifv_nb.sampling import SamplingOptions, run_sampling

POLICY = "packaged:iconworld-vlm"
SPLITTER = "packaged:iconworld-splitter"
ADAPTER = "packaged:iconworld-aligned"
EXAMPLE = package_folder("data") / "example"
SIDES = ("float32", "bfloat16")


def interval(rows: list[tuple], figure: Callable = None, seed: int = 0, n_resamples: int = 2000) -> tuple:
    """A figure of rows of numbers, one row for each picture, with its 95% bootstrap interval over pictures.

    `figure` maps sums over pictures to the figure; without it, it is the ratio of the rows' two columns."""
    figure = figure or (lambda sums: sums[..., 0] / sums[..., 1])
    table = np.array(rows, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(table), (n_resamples, len(table)))
    low, high = np.percentile(figure(table[picks].sum(axis=1)), [2.5, 97.5])
    return float(figure(table.sum(axis=0))), float(low), float(high)


def percent(part: int, whole: int) -> Callable:
    "A figure for `interval`: one column's sum as a percentage of another's."
    return lambda sums: 100 * sums[..., part] / sums[..., whole]


def by_picture(keys: list[str], rows: list[tuple]) -> list[tuple]:
    "Rows of numbers added up by picture."
    found = {}
    for key, row in zip(keys, rows):
        found.setdefault(key, []).append(row)
    return [tuple(np.sum(group, axis=0)) for group in found.values()]


def ranks(values: np.ndarray) -> np.ndarray:
    "Ranks 0, 1, ... of values."
    return np.argsort(np.argsort(values))


def run_side(at: Path, options: dict, scenes: int) -> None:
    "All stages with models opened with `options`, into folders named by stage."
    prompts = EXAMPLE / "prompts"
    vlm = open_vlm(POLICY, **options)
    run_sampling(prompts, at / "01", vlm, options=SamplingOptions(max_new_tokens=128))
    run_claims(prompts, EXAMPLE / "01_sampling", at / "02", open_llm(SPLITTER, **options))
    run_feedback(prompts, EXAMPLE / "01_sampling", EXAMPLE / "02_claims", at / "03", vlm)
    run_dpo(
        prompts,
        EXAMPLE / "04_pairs",
        at / "05",
        partial(open_vlm, POLICY, **options),
        options=DpoOptions(learning_rate=2e-4, epochs=0.5, batch_size=16, evaluations=1, min_steps=1),
    )
    run_evaluation(at / "06", POLICY, f"aligned={ADAPTER}", n_scenes=scenes, **options)
    run_guided_decoding(prompts, at / "07", POLICY, ADAPTER, responses=EXAMPLE / "01_sampling", **options)


def compare_sampling(at: dict[str, Path]) -> list[tuple]:
    "01: tokens that are the same at the same place, of the longer answer's, and answers that are the same."
    whole, half = (read_table(at[side] / "01", "responses", Response) for side in SIDES)
    encode = open_vlm(POLICY).tokenizer
    rows = []
    for a, b in zip(whole, half):
        one, other = (encode(r.text, add_special_tokens=False).input_ids for r in (a, b))
        rows.append((sum(x == y for x, y in zip(one, other)), max(len(one), len(other)), a.text == b.text, 1))
    rows = by_picture([r.prompt_id for r in whole], rows)
    return [
        ("01 sampled tokens that are identical, same seeds, %", interval(rows, percent(0, 1))),
        ("01 answers that are identical, same seeds, %", interval(rows, percent(2, 3))),
    ]


def compare_claims(at: dict[str, Path]) -> list[tuple]:
    "02: responses that are divided into the same claims with the same questions."
    responses = read_table(EXAMPLE / "01_sampling", "responses", Response)
    found = []
    for side in SIDES:
        claims = {}
        for c in read_table(at[side] / "02", "claims", Claim):
            claims.setdefault(c.response_id, []).append((c.text, c.question))
        found.append(claims)
    same = [(found[0].get(r.response_id) == found[1].get(r.response_id), 1) for r in responses]
    rows = by_picture([r.prompt_id for r in responses], same)
    return [("02 responses with the same claims and questions, %", interval(rows, percent(0, 1)))]


def compare_verdicts(at: dict[str, Path]) -> list[tuple]:
    "03: verdicts that flip, and how far P(yes) moves."
    responses = read_table(EXAMPLE / "01_sampling", "responses", Response)
    prompt_of = {r.response_id: r.prompt_id for r in responses}
    claims = {c.claim_id: c for c in read_table(EXAMPLE / "02_claims", "claims", Claim)}
    tables = (read_table(at[side] / "03", "verdicts", Verdict) for side in SIDES)
    whole, half = ({v.claim_id: v for v in table} for table in tables)
    both = [i for i in whole if i in half]
    moved = [(whole[i].label != half[i].label, abs(whole[i].p_yes - half[i].p_yes), 1) for i in both]
    rows = by_picture([prompt_of[claims[i].response_id] for i in both], moved)
    flips = interval(rows, lambda sums: 1000 * sums[..., 0] / sums[..., 2])
    difference = interval(rows, lambda sums: sums[..., 1] / sums[..., 2])
    return [
        (f"03 verdict flips per 1,000 claims (of {len(both):,})", flips),
        ("03 mean absolute difference of P(yes)", difference),
    ]


def compare_training(at: dict[str, Path]) -> list[tuple]:
    "05: the reference's log-probabilities, and the drift that each side's preflight finds."
    whole, half = (read_table(at[side] / "05", "reference", RefLogp) for side in SIDES)
    prompt_of = {p.pair_id: p.prompt_id for p in read_table(EXAMPLE / "04_pairs", "pairs", Pair)}
    rows = []
    for a, b in zip(whole, half):
        signed = b.chosen_sum_logp - a.chosen_sum_logp + b.rejected_sum_logp - a.rejected_sum_logp
        rows.append((signed, a.chosen_n_tokens + a.rejected_n_tokens))
    rows = by_picture([prompt_of[r.pair_id] for r in whole], rows)
    lines = [("05 reference log-probability, signed difference, nats per token", interval(rows))]
    for side in SIDES:
        drift = read_manifest(at[side] / "05")["preflight"]["drift_nats_per_token"]
        lines.append((f"05 preflight's drift, {side}, nats per token", (drift, None, None)))
    return lines


def rate(case: Case, measure: str) -> int:
    "Whether a description is bad."
    return getattr(case, measure)[0]


def compare_evaluation(at: dict[str, Path]) -> list[tuple]:
    "06: response rate and any-claim rate of greedy descriptions, of both sides, and their difference."
    lines = []
    for k, model in enumerate(("base", "aligned")):
        whole, half = (read_cases(at[side] / "06", k) for side in SIDES)
        for measure in ("response", "any_claim"):
            rows = [(rate(a, measure), rate(b, measure), 1) for a, b in zip(whole, half)]
            for i, side in enumerate(SIDES):
                lines.append((f"06 {measure} rate, {model}, {side}, %", interval(rows, percent(i, 2))))
            difference = interval(rows, lambda sums: 100 * (sums[..., 1] - sums[..., 0]) / sums[..., 2])
            lines.append((f"06 {measure} rate, {model}, difference in points", difference))
        same = [(a.text == b.text, 1) for a, b in zip(whole, half)]
        lines.append((f"06 identical greedy descriptions, {model}, %", interval(same, percent(0, 1))))
    return lines


def compare_rewards(at: dict[str, Path]) -> list[tuple]:
    "07: rewards of the same answers, ranked within a picture; and their log-probabilities."
    whole, half = (read_candidates(at[side] / "07") for side in SIDES)
    assert [c.response_id for c in whole] == [c.response_id for c in half]
    lines = []
    for ranking in ("reward_mean", "reward_sum"):
        groups = {}
        for a, b in zip(whole, half):
            rewards = reward_of(a, ranking, 1.0), reward_of(b, ranking, 1.0)
            groups.setdefault(a.prompt_id, []).append(rewards)
        agreement, best = [], []
        for group in groups.values():
            one, other = (np.array(side) for side in zip(*group))
            agreement.append((np.corrcoef(ranks(one), ranks(other))[0, 1], 1))
            best.append((one.argmax() == other.argmax(), 1))
        lines.append((f"07 rank agreement of {ranking} within a picture (Spearman)", interval(agreement)))
        lines.append((f"07 pictures with the same best answer, {ranking}, %", interval(best, percent(0, 1))))
    signed = [(b.policy_sum_logp - a.policy_sum_logp, a.n_tokens) for a, b in zip(whole, half)]
    rows = by_picture([c.prompt_id for c in whole], signed)
    return [*lines, ("07 policy log-probability, signed difference, nats per token", interval(rows))]


def shown(value: float, low: float | None, high: float | None) -> str:
    "A figure with its interval, if it has one, in three significant digits."
    return f"{value:.3g}" + ("" if low is None else f" ({low:.3g} to {high:.3g})")


def main() -> None:
    "Runs both sides and prints the table."
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--scenes", type=int, default=200, help="test scenes of stage 06")
    parser.add_argument("--quantisation", choices=("nf4", "none"), default="nf4", help="of the bfloat16 side")
    parser.add_argument("--out", type=Path, help="keep the stages' folders here, and resume them")
    a = parser.parse_args()
    options = {
        "float32": {"dtype": "float32", "quantisation": "none"},
        "bfloat16": {"dtype": "bfloat16", "quantisation": a.quantisation},
    }
    with tempfile.TemporaryDirectory() as temporary:
        at = {side: (a.out or Path(temporary)) / side for side in SIDES}
        for side in SIDES:
            run_side(at[side], options[side], a.scenes)
        parts = (
            compare_sampling,
            compare_claims,
            compare_verdicts,
            compare_training,
            compare_evaluation,
            compare_rewards,
        )
        lines = [line for compare in parts for line in compare(at)]
    print(f"| bfloat16 ({a.quantisation}) against float32 | figure (95% interval over pictures) |\n|---|---|")
    for name, figures in lines:
        print(f"| {name} | {shown(*figures)} |")


if __name__ == "__main__":
    main()
