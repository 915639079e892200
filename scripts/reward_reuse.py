"""What the recipe `reward-reuse` cannot say: two more arms with the same round 1, the CPU seconds of feedback, and how often pairs are right.

rlaifv run reward-reuse --seed 0 --out runs/reward-reuse-0
python scripts/reward_reuse.py runs/reward-reuse-0 cpu           CPU seconds of both kinds of feedback
python scripts/reward_reuse.py runs/reward-reuse-0 reward-18     round 2 by reward, with 18 candidates: the seconds of claim feedback
python scripts/reward_reuse.py runs/reward-reuse-0 extremes      round 2 by claims, but best answers against worst ones, as the reward's pairs are
python scripts/reward_reuse.py runs/reward-reuse-0 pairs         of each arm's pairs: how often chosen has fewer, as many, more false claims
python scripts/reward_reuse.py runs/reward-reuse-* compare       each arm against claims, over all seeds, on the same pictures
"""

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rlaifv_nb.benchmarks.intervals import compare_models
from rlaifv_nb.claims import run_claims
from rlaifv_nb.engine.models import open_llm, open_vlm
from rlaifv_nb.feedback import run_feedback
from rlaifv_nb.guided_decoding import run_guided_decoding
from rlaifv_nb.iconworld.world import is_true, read_claims, scene_of
from rlaifv_nb.pairs import balance_lengths, candidate_pairs, sample_pairs, score_responses
from rlaifv_nb.records import (
    Claim,
    Pair,
    Prompt,
    Response,
    SetAside,
    StageFolder,
    Verdict,
    package_folder,
    read_table,
    write_json,
    write_table,
    write_text,
)
from rlaifv_nb.runner.chain import is_done, run_manifest, run_step, step_record
from rlaifv_nb.runner.recipes import check_recipe, load_recipe, plan_run
from rlaifv_nb.runner.report import write_report
from rlaifv_nb.sampling import run_sampling

FIGURES = ("response", "mention", "any_claim", "cover")


def more_candidates(runs, n_samples):
    """Make the run `reward-<n_samples>` beside the finished variant `reward`, and list it for the comparison."""
    source, run, notebooks = (
        (runs / "reward").resolve(),
        (runs / f"reward-{n_samples}").resolve(),
        package_folder("nbs"),
    )
    for folder in ("prompts", "round_1"):
        shutil.copytree(source / folder, run / folder, dirs_exist_ok=True)
    recipe = replace(
        check_recipe(load_recipe(str(source / "recipe.yaml")), notebooks), name=f"reward-reuse/{run.name}"
    )
    more = {"n_samples": n_samples}
    steps = [
        replace(s, parameters={**s.parameters, **more}) if (s.round, s.notebook) == (2, "01_sampling") else s
        for s in plan_run(recipe)
    ]
    write_text(run / "recipe.yaml", (source / "recipe.yaml").read_text())
    finish(runs, run, recipe, steps, {"round_2": {"01_sampling": more}})


def cpu_seconds(runs, n_prompts, n_samples):
    """CPU seconds of sampling, of claim feedback, and of the reward, for some prompts of round 2, models being open."""
    run, took = runs / "reward", {}
    policy, adapter, prompts = (
        "packaged:iconworld-vlm",
        str(run / "round_1/05_dpo/adapter"),
        str(run / "prompts"),
    )
    vlm, labeler, splitter = (
        open_vlm(policy, adapter),
        open_vlm(policy),
        open_llm("packaged:iconworld-splitter"),
    )
    with TemporaryDirectory() as tmp:
        at = {name: f"{tmp}/{name}" for name in ("sampling", "claims", "feedback", "reward")}
        work = {
            "sampling": lambda: run_sampling(
                prompts, at["sampling"], vlm, 160, n_prompts, n_samples, 0.7, max_new_tokens=128
            ),
            "claims": lambda: run_claims(prompts, at["sampling"], at["claims"], splitter),
            "feedback": lambda: run_feedback(prompts, at["sampling"], at["claims"], at["feedback"], labeler),
            "reward": lambda: run_guided_decoding(
                prompts, at["reward"], policy, adapter, responses=at["sampling"]
            ),
        }
        for name, do in work.items():
            began = time.process_time()
            do()
            took[name] = round(time.process_time() - began, 1)
    return took


def extremes(runs):
    """Make the run `claims-extremes` beside the finished variant `claims`: the same answers and verdicts, other pairs."""
    source, run, notebooks = (
        (runs / "claims").resolve(),
        (runs / "claims-extremes").resolve(),
        package_folder("nbs"),
    )
    for folder in (
        "prompts",
        "round_1",
        *(f"round_2/{stage}" for stage in ("01_sampling", "02_claims", "03_feedback")),
    ):
        shutil.copytree(source / folder, run / folder, dirs_exist_ok=True)
    shutil.copy(source / "recipe.yaml", run)
    out, (responses, claims, verdicts) = (
        run / "round_2/04_pairs",
        (
            read_table(run / "round_2" / stage, table, record)
            for stage, table, record in (
                ("01_sampling", "responses", Response),
                ("02_claims", "claims", Claim),
                ("03_feedback", "verdicts", Verdict),
            )
        ),
    )
    stage = StageFolder(out, "extreme_pairs", {"max_pairs_per_prompt": 2, "length_tolerance": 0.02})
    drawn, spare = sample_pairs(
        candidate_pairs(responses, score_responses(responses, claims, verdicts)[0])[0], 2, 0, 2, "extremes"
    )
    kept, dropped, _ = balance_lengths(drawn, spare, 0.02)
    write_table(out, "pairs", sorted(kept, key=lambda p: p.pair_id))
    stage.finish(
        len(responses), len(kept), ["pairs"], [SetAside(p.pair_id, "length balance") for p in dropped]
    )
    recipe = replace(
        check_recipe(load_recipe(str(source / "recipe.yaml")), notebooks), name="reward-reuse/claims-extremes"
    )
    for step in plan_run(recipe):
        if (step.round, step.notebook) == (2, "04_pairs"):
            write_json(
                run / step.out / "step.json",
                {
                    **step_record(step, run, notebooks),
                    "round": 2,
                    "finished": True,
                    "seconds": 0,
                    "attempts": 1,
                },
            )
    finish(
        runs,
        run,
        recipe,
        plan_run(recipe),
        {"round_2": {"04_pairs": "best against worst by rejected claims"}},
    )


def finish(runs, run, recipe, steps, note):
    """Make the steps of a run that are not done yet, its manifest and the comparison."""
    notebooks = package_folder("nbs")
    for step in steps:
        if not is_done(step, run, notebooks):
            run_step(step, run, notebooks)
    write_json(run / "manifest.json", run_manifest(recipe, steps, run) | note)
    write_json(
        runs / "variants.json",
        [*dict.fromkeys([*json.loads((runs / "variants.json").read_text()), run.name])],
    )
    write_report(run), write_report(runs)


def pair_quality(runs):
    """Of each variant's pairs of round 2: number, % whose chosen answer has fewer, as many and more false claims, and mean false claims of both."""
    found = {}
    for folder in sorted(runs.glob("*/round_2/04_*")):
        prompts = {p.prompt_id: p for p in read_table(folder.parents[1] / "prompts", "prompts", Prompt)}
        false = lambda p, text: sum(
            not is_true(scene_of(prompts[p.prompt_id]), claim) for claim in read_claims(text)
        )
        counts = [(false(p, p.chosen), false(p, p.rejected)) for p in read_table(folder, "pairs", Pair)]
        share = lambda keep: round(100 * sum(keep(a, b) for a, b in counts) / len(counts), 1)
        found[folder.parents[1].name] = {
            "n": len(counts),
            "fewer": share(int.__lt__),
            "as many": share(int.__eq__),
            "more": share(int.__gt__),
            "chosen": round(sum(a for a, _ in counts) / len(counts), 2),
            "rejected": round(sum(b for _, b in counts) / len(counts), 2),
        }
    return found


def compare(all_runs):
    """{baseline: {arm: {figure: (difference, low, high, p)}}}, in percent points; pictures are resampled, with all their seeds."""

    def counts(arm):
        rows = [
            (k, json.loads(line))
            for k, runs in enumerate(all_runs)
            for path in sorted(runs.glob(f"{arm}/06_evaluation/cases-2-*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        return {
            (k, row["scene_id"]): {
                f"{figure} {part}": row[figure][i]
                for figure in FIGURES
                for i, part in enumerate(("hits", "all"))
            }
            for k, row in rows
        }

    def difference(baseline, arm):
        first = counts(baseline)
        found = compare_models(first, counts(arm), figures, {item: item[1] for item in first})
        return {figure: [round(float(x), 4) for x in row] for figure, row in found.items()}

    figures = lambda sums: {
        figure: 100 * sums[f"{figure} hits"] / sums[f"{figure} all"] for figure in FIGURES
    }
    arms = sorted(
        {p.parents[1].name for runs in all_runs for p in runs.glob("*/06_evaluation/cases-2-00000.jsonl")}
    )
    return {
        baseline: {arm: difference(baseline, arm) for arm in arms if arm not in ("claims", baseline)}
        for baseline in ("claims", "claims-extremes")
        if baseline in arms
    }


def main():
    """What the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of the finished recipe, of several seeds")
    parser.add_argument("what", help="cpu, reward-N, extremes, pairs or compare")
    args = parser.parse_args()
    work = {
        "cpu": lambda runs: write_json(
            runs / "cpu_seconds.json", {"n_prompts": 40, "n_samples": 10, **cpu_seconds(runs, 40, 10)}
        ),
        "pairs": lambda runs: write_json(runs / "pairs.json", pair_quality(runs)),
        "extremes": extremes,
        "compare": lambda runs: write_json(runs / "differences.json", compare(args.runs)),
    }
    if args.what.startswith("reward-"):
        work[args.what] = lambda runs: more_candidates(runs, int(args.what.removeprefix("reward-")))
    if args.what not in work:
        parser.error(f"{args.what!r}: choose {', '.join(work)} or reward-N")
    for runs in args.runs:
        work[args.what](runs)


if __name__ == "__main__":
    main()
