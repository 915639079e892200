"""Kill -9 in the middle of each stage, start again: the same tables, byte for byte, as an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stages import TABLES, run_stage

from rlaifv_nb.records import StageFolder, read_manifest, shard_paths

HERE = Path(__file__).parent


def table_bytes(folder, stage):
    "The stage's tables (and adapter weights) as bytes."
    files = [p for t in TABLES[stage] for p in shard_paths(folder, t)] + sorted(
        Path(folder).glob("adapter/*.safetensors")
    )
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def is_underway(folder, stage):
    "Some work is on the disk, but the stage is not done."
    signs = {"04_pairs": "started.json", "05_dpo": "checkpoints/checkpoint-*/complete"}
    found = list(Path(folder).glob(signs.get(stage, f"{TABLES[stage][0]}-*.jsonl")))
    if stage == "06_evaluation":
        found = list(Path(folder).glob("cases-0-*.jsonl"))
    return bool(found) and not (Path(folder) / "manifest.json").exists()


def start_and_kill(stage, inputs, out, seconds=240):
    """Runs the stage in its own process and kills it as soon as it is underway; returns whether it was killed
    before its end."""
    process = subprocess.Popen(
        [sys.executable, HERE / "stages.py", stage, inputs, out],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    limit = time.time() + seconds
    while process.poll() is None and time.time() < limit and not is_underway(out, stage):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return not (Path(out) / "manifest.json").exists()


@pytest.mark.parametrize("stage", TABLES)
def test_killed_and_resumed(stage, undisturbed, tmp_path):
    tries = (tmp_path / f"try_{k}" for k in range(5))  # a stage may be over before the signal arrives
    out = next((out for out in tries if start_and_kill(stage, undisturbed, out)), None)
    assert out, "the stage always finished before it could be killed"
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.jsonl")}
    run_stage(stage, undisturbed, out)
    assert table_bytes(out, stage) == table_bytes(undisturbed / stage, stage)
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items()), (
        "finished shards must not be written again"
    )
    assert not list(out.glob("**/.*.tmp"))


@pytest.mark.parametrize("stage", TABLES)
def test_manifest_accounts_for_every_row(stage, undisturbed):
    manifest = read_manifest(undisturbed / stage)
    if stage == "04_pairs":  # responses become pairs: one account of each
        for name, total in (("responses", "in"), ("pairs", "candidates")):
            account = manifest[name]
            assert account[total] == sum(n for key, n in account.items() if key != total), (name, account)
    else:
        assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["set_aside"].values())
    assert not {"host", "user", "path"} & {
        k for part in (manifest, manifest["parameters"], manifest["inputs"]) for k in part
    }


def test_done_stage_is_not_run_again(undisturbed):
    before = (undisturbed / "01_sampling" / "manifest.json").read_bytes()
    run_stage("01_sampling", undisturbed, undisturbed / "01_sampling")
    assert (undisturbed / "01_sampling" / "manifest.json").read_bytes() == before


def test_other_parameters_are_refused_by_name(undisturbed, tmp_path):
    shutil.copytree(undisturbed / "01_sampling", tmp_path / "again")
    started = json.loads((tmp_path / "again" / "started.json").read_text())
    with pytest.raises(ValueError, match="temperature: 0.7 -> 1.1"):
        StageFolder(
            tmp_path / "again", "sampling", started["parameters"] | {"temperature": 1.1}, started["inputs"]
        )
