"""Seconds of each stage of the tiny chain: as it is, with every optimisation switched off, and in another
checkout (`--against`).

    python tests/bench/stages.py --against ../rlaifv_nb-before

Sides take turns, each turn in a process of its own with one thread; the inputs of a stage are the same for
all sides.
"""

import argparse
import importlib
import inspect
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
POLICY, SPLITTER, ADAPTER = (
    HERE / "data" / name for name in ("iconworld-vlm", "iconworld-splitter", "iconworld-aligned")
)


def given(function, **options):
    "The options that this version of the function has."
    known = inspect.signature(function).parameters
    return {
        k: v for k, v in options.items() if k in known or any(p.kind is p.VAR_KEYWORD for p in known.values())
    }


def options_class(stage):
    "The dataclass of a stage's options, or None in a checkout that has none."
    return getattr(importlib.import_module(f"rlaifv_nb.{stage}"), f"{stage.title()}Options", None)


def asked(stage, **options):
    "Keyword arguments that ask a stage of this checkout for these options: one object, or each by its name."
    made = options_class(stage)
    if made:
        return {"options": made(**options)}
    function = getattr(importlib.import_module(f"rlaifv_nb.{stage}"), f"run_{stage}")
    return given(function, **options)


def make_inputs(folder):
    "Prompts, an adapter whose lineage any version accepts, and the tables that stages 02 to 05 read."
    from rlaifv_nb.iconworld.world import write_prompts

    write_prompts(folder / "prompts", {"train": 44, "dev": 4})
    write_prompts(folder / "few", {"test": 4})
    shutil.copytree(ADAPTER, folder / "adapter")
    (folder / "adapter" / "lineage.json").unlink()
    time_stages(folder, folder, share=True)


def time_stages(inputs, out, share):
    """`{stage: seconds}` of the stages that use a model, opening it included; the tables of earlier stages
    come from `inputs`.
    """
    from rlaifv_nb.claims import run_claims
    from rlaifv_nb.dpo import run_dpo
    from rlaifv_nb.engine.models import open_llm, open_vlm
    from rlaifv_nb.evaluation import run_evaluation
    from rlaifv_nb.feedback import run_feedback
    from rlaifv_nb.guided_decoding import run_guided_decoding
    from rlaifv_nb.pairs import run_pairs
    from rlaifv_nb.sampling import run_sampling

    policy = str(POLICY)
    switch = {} if share else {"share_prefix": False}
    slow = {} if share else {"layout": "plain", "cache_gb": 0}
    opened = [partial(open_vlm, policy, quantisation="nf4") if options_class("dpo") else policy]
    table = {
        name: str(inputs / name)
        for name in ("prompts", "few", "adapter", "sampling", "claims", "feedback", "pairs")
    }

    def vlm():
        return open_vlm(policy, **given(open_vlm, **switch))

    stages = {
        "sampling": lambda o: run_sampling(
            table["prompts"], o, vlm(), **asked("sampling", max_new_tokens=128)
        ),
        "claims": lambda o: run_claims(
            table["prompts"], table["sampling"], o, open_llm(str(SPLITTER), **given(open_llm, **switch))
        ),
        "feedback": lambda o: run_feedback(table["prompts"], table["sampling"], table["claims"], o, vlm()),
        "pairs": lambda o: run_pairs(
            table["prompts"], table["sampling"], table["claims"], table["feedback"], o
        ),
        "dpo": lambda o: run_dpo(
            table["prompts"],
            table["pairs"],
            o,
            *opened,
            **asked("dpo", learning_rate=2e-4, epochs=2.0, batch_size=16, **slow),
        ),
        "evaluation": lambda o: run_evaluation(o, policy, n_scenes=100),
        "guided_decoding": lambda o: run_guided_decoding(
            table["few"],
            o,
            policy,
            table["adapter"],
            n_candidates=64,
            temperature=0.7,
            max_new_tokens=128,
            **given(run_guided_decoding, **switch),
        ),
    }
    seconds = {}
    for name, stage in stages.items():
        began = time.perf_counter()
        stage(str(out / name))
        seconds[name] = time.perf_counter() - began
    return seconds


def child(*arguments, checkout=HERE):
    "What a process with the library of that checkout prints last."
    env = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, __file__, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]


def main():
    "Runs the sides in turns; prints a table and writes stages.json."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.child:
        what, inputs = a.child[0], Path(a.child[1])
        with tempfile.TemporaryDirectory() as out:
            print(
                json.dumps(
                    make_inputs(inputs)
                    if what == "inputs"
                    else time_stages(inputs, Path(out), share=what == "on")
                )
            )
        return
    sides = {"now": ("on", HERE), "switched off": ("off", HERE)} | (
        {"before": ("on", a.against.resolve())} if a.against else {}
    )
    found = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        child("--child", "inputs", folder)
        for turn in range(a.repeats):
            for side, (what, checkout) in sides.items():
                found[side].append(json.loads(child("--child", what, folder, checkout=checkout)))
                print(f"turn {turn + 1}, {side}: {sum(found[side][-1].values()):.1f} s", flush=True)
    median = {
        side: {stage: statistics.median(turn[stage] for turn in turns) for stage in turns[0]}
        for side, turns in found.items()
    }
    for side in median:
        median[side]["all"] = statistics.median(sum(turn.values()) for turn in found[side])
    print(
        "| stage | " + " | ".join(f"{side}, s" for side in sides) + " |\n" + "|---" * (len(sides) + 1) + "|"
    )
    for stage in median["now"]:
        print(f"| {stage} | " + " | ".join(f"{median[side][stage]:.2f}" for side in sides) + " |")
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "stages.json").write_text(json.dumps({"seconds": found, "median": median}, indent=1) + "\n")


if __name__ == "__main__":
    main()
