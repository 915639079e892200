"""The trainings of the small models go on after a kill as if nothing had happened."""

import subprocess
import sys

from safetensors.torch import load_file

TRAIN = """
import os, sys
from rlaifv_nb.iconworld.training import branch_loss, build_splitter, build_tokenizer, splitter_batch, train
tokenizer, killed_at = build_tokenizer(), int(sys.argv[2])
def batch(step):
    if step == killed_at:
        os.kill(os.getpid(), 9)
    return splitter_batch(tokenizer, step, size=2)
train(build_splitter(tokenizer).train(), batch, branch_loss, 6, sys.argv[1], warmup=2, every=2)
"""


def run(path, killed_at=-1):
    "Exit code of a training of six steps, a checkpoint every second step, that kills itself at a step."
    return subprocess.run(
        [sys.executable, "-c", TRAIN, str(path), str(killed_at)], capture_output=True
    ).returncode


def test_a_killed_training_goes_on(tmp_path):
    assert run(tmp_path / "whole.safetensors") == 0
    assert run(tmp_path / "killed.safetensors", killed_at=3) == -9
    assert run(tmp_path / "killed.safetensors", killed_at=1) == 0, (
        "steps before the last checkpoint are not repeated"
    )
    whole, killed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and any(k.startswith("optimizer") for k in whole)
    assert all((whole[k] == killed[k]).all() for k in whole)
