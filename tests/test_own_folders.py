"""What people keep in a folder is never deleted or replaced: a run begins where it finds only its own."""

import json

import pytest
from PIL import Image

from rlaifv_nb.runner.command import main

RECIPE = """# remarks of my own
extends: tiny
name: mine
rounds: 1
evaluate: []
prompts: {source: ./prompts/questions.jsonl, n_dev: 1}
parameters: {01_sampling: {n_samples: 1, max_new_tokens: 4}, 05_dpo: {min_steps: 1, batch_size: 1}}
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A folder in which pictures are in `prompts`, notes in `round_1`, and a recipe with remarks beside them."
    (tmp_path / "prompts").mkdir()
    (tmp_path / "round_1/01_sampling").mkdir(parents=True)
    (tmp_path / "round_1/01_sampling/notes.txt").write_text("my notes")
    rows = []
    for k in range(12):
        Image.new("RGB", (40, 30), (20 * k, 0, 0)).save(tmp_path / f"prompts/{k}.png")
        rows.append({"image": f"{k}.png", "question": "Describe the image in detail."})
    (tmp_path / "prompts/questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    "Every file and its bytes, but the lock."
    return {
        p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--from", "prompts"],
        ["--from", "01_sampling", "--round", "1"],
        ["--seed", "3"],
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_folder_of_ones_own_is_left_as_it_is(options, home, capsys):
    before = contents(home)
    assert main(["run", "recipe.yaml", "--out", ".", *options]) == 2
    assert "was not made by this chain" in capsys.readouterr().err
    assert contents(home) == before


def test_a_recipe_of_ones_own_is_not_replaced(home, capsys):
    (home / "run").mkdir()
    (home / "run/recipe.yaml").write_text(RECIPE.replace("./prompts", "../prompts"))
    before = contents(home)
    assert main(["run", "run/recipe.yaml", "--out", "run"]) == 2
    assert "recipe.yaml was not written by this chain" in capsys.readouterr().err
    assert contents(home) == before


def test_a_file_in_the_place_of_a_folder_is_left_alone(home, capsys):
    (home / "run/round_1").mkdir(parents=True)
    (home / "run/round_1/02_claims").write_text("a list of claims")
    before = contents(home)
    assert main(["run", "recipe.yaml", "--out", "run", "--from", "02_claims", "--round", "1"]) == 2
    assert "02_claims was not made by this chain" in capsys.readouterr().err
    assert contents(home) == before


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_a_name_is_not_a_folder_that_exists(name, home, capsys):
    (home / "recipe.yaml").write_text(RECIPE.replace("name: mine", f"name: {name!r}"))
    before = contents(home)
    assert main(["run", "recipe.yaml"]) == 2
    assert "would be a folder that exists already" in capsys.readouterr().err
    assert contents(home) == before
