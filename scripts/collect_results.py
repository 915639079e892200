"""Copy the figures of finished runs into data/results/, where the index (and so the README) reads them.

python scripts/collect_results.py runs/seed_0 runs/seed_1 runs/seed_2 --ablations runs/ablations
python scripts/collect_results.py --reward-reuse runs/reward-reuse-0 runs/reward-reuse-1
"""

import argparse
import json
import shutil
from pathlib import Path

RESULTS = Path(__file__).resolve().parent.parent / "data" / "results"
TABLES = ("06_evaluation/scores-00000.jsonl", "07_guided_decoding/curve-00000.jsonl")


def collect(run, target):
    """Copy one run's tables and its manifest (recipe, commit, versions, seconds of each step)."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for table in TABLES:
        if (run / table).exists():
            shutil.copy(run / table, target)
    shutil.copy(run / "manifest.json", target)


def main():
    """Collect the runs named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, help="finished runs of one recipe with different seeds")
    parser.add_argument("--ablations", type=Path, help="a finished run of a recipe with variants")
    parser.add_argument(
        "--reward-reuse",
        nargs="*",
        type=Path,
        default=[],
        help="finished runs of reward-reuse with different seeds",
    )
    args = parser.parse_args()
    for run in args.runs:
        seed = json.loads((run / "manifest.json").read_text())["recipe"]["seed"]
        collect(run, RESULTS / f"seed_{seed}")
    for run in sorted(p.parent for p in args.ablations.glob("*/manifest.json")) if args.ablations else ():
        collect(run, RESULTS / "ablations" / run.name)
    for runs in args.reward_reuse:
        for run in sorted(p.parent for p in runs.glob("*/manifest.json")):
            seed = json.loads((run / "manifest.json").read_text())["recipe"]["seed"]
            collect(run, RESULTS / "reward_reuse" / f"seed_{seed}" / run.name)
        for name in ("pairs.json", "cpu_seconds.json", "differences.json"):  # of scripts/reward_reuse.py
            if (runs / name).exists():
                shutil.copy(runs / name, RESULTS / "reward_reuse" / f"seed_{seed}")


if __name__ == "__main__":
    main()
