"""From the README alone: pictures, questions, one recipe, and an adapter that five plain lines load.

The pictures lie in a folder, the questions in a file. Drawn scenes stand for pictures wherever the packaged
model has to know what it sees; README's own recipe runs on twelve real photographs where they are at hand
(../shared/official)."""

import contextlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rlaifv_nb.engine.models import folder_sha
from rlaifv_nb.iconworld.world import draw_picture, make_scene
from rlaifv_nb.records import Pair, Prompt, SetAside, package_folder, read_manifest, read_table, write_rows
from rlaifv_nb.runner.command import main

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = ROOT.parent / "shared/official/rlaifv/images"
FIVE_LINES = re.compile(r"```python\n(from peft import PeftModel\n.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What a person brings, and what `rlaifv run` makes of it.

    They bring pictures as JPEG, questions, and a recipe that makes tiny smaller."""
    home = tmp_path_factory.mktemp("home")
    (home / "pictures").mkdir()
    for i in range(14):
        draw_picture(make_scene("train", i)).save(home / f"pictures/photo{i}.jpg", quality=95)
    (home / "pictures/broken.jpg").write_bytes(b"")
    names = ["broken.jpg", *(f"photo{i}.jpg" for i in range(14))]
    write_rows(
        home / "questions.jsonl",
        [{"image": f"pictures/{name}", "question": "Describe the image in detail."} for name in names],
    )
    recipe = {
        "extends": "tiny",
        "name": "mine",
        "rounds": 1,
        "evaluate": [],
        "prompts": {"source": "./questions.jsonl", "n_per_round": 14, "n_dev": 3},
        "parameters": {
            "01_sampling": {"n_samples": 4, "max_new_tokens": 80},
            "04_pairs": {"max_pairs_per_prompt": 6},
            "05_dpo": {"epochs": 1, "batch_size": 2},
        },
    }
    (home / "my.yaml").write_text(yaml.safe_dump(recipe))
    with contextlib.chdir(home):
        assert main(["run", "my.yaml"]) == 0
    return home


def test_run_makes_an_adapter_and_names_the_broken_picture(home):
    run = home / "runs/mine"
    assert (run / "round_1/05_dpo/adapter/adapter_model.safetensors").exists() and (
        run / "report.html"
    ).exists()
    prompts = read_table(run / "prompts", "prompts", Prompt)
    assert len(prompts) == 14 and [p.split for p in prompts].count("dev") == 3
    assert [(s.row_id, s.reason) for s in read_table(run / "prompts", "set_aside-prompts", SetAside)] == [
        ("line 1", "unreadable picture")
    ]
    assert read_manifest(run)["steps"][0]["set_aside"] == {"unreadable picture": 1}
    (warning,) = read_manifest(run / "prompts")["warnings"]
    assert (
        warning.startswith("1 of 15 rows of questions.jsonl are set aside: line 1 (unreadable picture: ")
        and "broken.jpg: it is empty" in warning
    )
    assert "broken.jpg: it is empty" in (run / "report.html").read_text()


def test_the_cards_five_lines_load_the_adapter(home):
    card = (home / "runs/mine/round_1/05_dpo/adapter/README.md").read_text()
    code = FIVE_LINES.search(card)[1]
    assert code.count("\n") == 5 and "rlaifv_nb" not in code
    assert str(home) not in card
    with contextlib.chdir(home):
        Path("iconworld-vlm").symlink_to(package_folder("data") / "iconworld-vlm")
        Path("adapter").symlink_to(home / "runs/mine/round_1/05_dpo/adapter")
        names = {}
        exec(code, names)
    model, processor = names["model"].eval(), names["processor"]
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": str(home / "pictures/photo0.jpg")},
                {"type": "text", "text": "Describe the image in detail."},
            ],
        }
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        text = processor.decode(
            model.generate(**inputs, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True
        )
        adapted = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
    assert "image" in text.partition("ASSISTANT:")[2] and (adapted - base).abs().max() > 1e-3, (
        "the adapter does something"
    )


def test_the_readme_shows_the_same_five_lines(home):
    """Only the names of base and adapter differ."""

    def plain(text):
        named = r'from_pretrained\((model, )?"[^"]*"\).*'
        return re.sub(named, r"from_pretrained(\1...)", FIVE_LINES.search(text)[1])

    assert plain((ROOT / "README.md").read_text()) == plain(
        (home / "runs/mine/round_1/05_dpo/adapter/README.md").read_text()
    )


def test_started_again_it_keeps_everything(home, capsys):
    before = folder_sha(home / "runs/mine/round_1/05_dpo/adapter")
    with contextlib.chdir(home):
        assert main(["run", "my.yaml"]) == 0
    assert (
        capsys.readouterr().out.count("kept") == 6
        and folder_sha(home / "runs/mine/round_1/05_dpo/adapter") == before
    )


# photographs


def readme_recipe(name):
    """A recipe as README shows it, without what stands left of it."""
    text = re.search(
        rf"^{re.escape(name)} +(extends:.*?)(?=^\S)",
        (ROOT / "README.md").read_text(),
        re.DOTALL | re.MULTILINE,
    )[1]
    return "\n".join(line.removeprefix(" " * 21) for line in text.splitlines()) + "\n"


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Twelve real photographs, questions, and what `rlaifv run` makes of them, started from another folder.

    The pictures' folder has a name of its own, and the recipe is README's for the packaged model."""
    found = sorted(PHOTOGRAPHS.rglob("*.jpg"))[::5]
    if len(found) < 12:
        pytest.skip("needs the photographs of ../shared/official/rlaifv/images beside the checkout")
    album = tmp_path_factory.mktemp("somewhere") / "Bilder von Zoë"
    (album / "pictures").mkdir(parents=True)
    for k, path in enumerate(found[:12]):
        (album / f"pictures/photo{k}.jpg").write_bytes(path.read_bytes())
    rows = [
        {"image": f"pictures/photo{k}.jpg", "question": "Describe the image in detail."} for k in range(12)
    ]
    (album / "questions.jsonl").write_bytes(
        "".join(json.dumps(row) + "\r\n" for row in rows).encode("utf-8-sig")
    )
    (album / "plumbing.yaml").write_text(readme_recipe("plumbing.yaml"))
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        assert main(["run", str(album / "plumbing.yaml"), "--out", str(album / "runs/plumbing")]) == 0
    return album


def test_photographs_go_from_the_readme_to_an_honest_report(album):
    run = album / "runs/plumbing"
    prompts, pairs = (
        read_table(run / "prompts", "prompts", Prompt),
        read_table(run / "round_1/04_pairs", "pairs", Pair),
    )
    assert len(prompts) == 12 and [p.split for p in prompts].count("dev") == 2
    manifest = read_manifest(run / "round_1/05_dpo")
    assert manifest["train_pairs"] + manifest["dev_pairs"] == len(pairs) > 10
    page = (run / "report.html").read_text()
    assert re.search(r"<h1>(One picture is|Two pictures are) too few to tell whether this helped", page)
    assert "own base model" in page and "gave the feedback" in page, "who checks, and what follows from it"
    assert 'id="before-and-after"' in page and "06_evaluation_claims/table.md" in page
    assert "the plumbing only" in page and "are rejected" in page, (
        "the packaged model knows none of these things, and the page says so"
    )
    assert page.count("data:image/webp") >= 4 and "Not there yet" not in page
    assert str(album) not in page and 'class="unknown rejected"' in page


def remade(album, name, *settings):
    """The exit code of the run copied to another folder and made again from 04_pairs with these settings."""
    run = album / "runs" / name
    shutil.copytree(album / "runs/plumbing", run)
    given = [argument for setting in settings for argument in ("--set", setting)]
    return main(["run", str(album / "plumbing.yaml"), "--out", str(run), "--from", "04_pairs", *given])


def test_too_few_pairs_are_an_error_before_training(album, capsys):
    """Before the run everything looked well; then few answers differed by as much as was asked for."""
    assert remade(album, "few", "04_pairs.max_pairs_per_prompt=1", "05_dpo.batch_size=2") == 2
    assert re.search(
        r"05_dpo failed: .* training pairs make \d steps .* too few to learn from", capsys.readouterr().err
    )
    assert not (album / "runs/few/round_1/05_dpo/adapter").exists()
    assert main(["report", str(album / "runs/few")]) == 0
    assert (
        "not finished" in (page := (album / "runs/few/report.html").read_text())
        and "No adapter has been trained yet." in page
    )


def test_no_pair_at_all_says_why(album, capsys):
    assert remade(album, "none", "04_pairs.min_difference=1000") == 2
    assert re.search(
        r"04_pairs failed: .*no pair is left of 120 answers to 12 prompts.* "
        r"differ by less than min_difference=1000, at most by \d+: lower 04_pairs.min_difference",
        capsys.readouterr().err,
    )


def test_fewer_steps_may_be_asked_for(album, capsys):
    assert (
        remade(album, "least", "04_pairs.max_pairs_per_prompt=1", "05_dpo.batch_size=4", "05_dpo.min_steps=1")
        == 0
    )
    page = (album / "runs/least/report.html").read_text()
    assert "too few to tell" in page and re.search(r"<strong>\d → \d|<strong>\d\.\d+ → \d\.\d+", page)


def test_what_cannot_be_enough_is_refused_before_anything_runs(album, capsys):
    assert (
        main(
            [
                "run",
                str(album / "plumbing.yaml"),
                "--out",
                str(album / "runs/never"),
                "--set",
                "05_dpo.batch_size=64",
            ]
        )
        == 2
    )
    assert (
        "at most 80 pairs" in (err := capsys.readouterr().err)
        and "at most 3 steps: too few to learn from, 10 are needed" in err
    )
    assert "05_dpo.batch_size: 17 or less" in err and not (album / "runs/never/prompts").exists()
    assert (
        main(["plan", str(album / "plumbing.yaml"), "--set", "05_dpo.batch_size=64"]) == 2
        and "at most 3 steps" in capsys.readouterr().err
    )
