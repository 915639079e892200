"""From the README alone: a folder of pictures and a file of questions, one recipe, and an adapter that five plain lines load."""
import contextlib
import re
from pathlib import Path

import pytest
import torch
import yaml

from rlaifv_nb.command import main
from rlaifv_nb.iconworld import draw_picture, make_scene
from rlaifv_nb.models import folder_sha
from rlaifv_nb.records import Prompt, SetAside, package_folder, read_manifest, read_table, write_rows

ROOT = Path(__file__).resolve().parent.parent
FIVE_LINES = re.compile(r"```python\n(from peft import PeftModel\n.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """What a person brings: pictures as JPEG, questions, a recipe that makes tiny smaller. And what `rlaifv run` makes of it."""
    home = tmp_path_factory.mktemp("home")
    (home / "pictures").mkdir()
    for i in range(14):
        draw_picture(make_scene("train", i)).save(home / f"pictures/photo{i}.jpg", quality=95)
    (home / "pictures/broken.jpg").write_bytes(b"")
    names = ["broken.jpg", *(f"photo{i}.jpg" for i in range(14))]
    write_rows(home / "questions.jsonl", [{"image": f"pictures/{name}", "question": "Describe the image in detail."} for name in names])
    recipe = {"extends": "tiny", "name": "mine", "rounds": 1, "evaluate": [], "prompts": {"source": "./questions.jsonl", "n_per_round": 14, "n_dev": 3},
              "parameters": {"01_sampling": {"n_samples": 4, "max_new_tokens": 80}, "05_dpo": {"epochs": 1, "batch_size": 8, "min_steps": 1}}}
    (home / "my.yaml").write_text(yaml.safe_dump(recipe))
    with contextlib.chdir(home):
        assert main(["run", "my.yaml"]) == 0
    return home


def test_run_makes_an_adapter_and_names_the_broken_picture(home):
    run = home / "runs/mine"
    assert (run / "round_1/05_dpo/adapter/adapter_model.safetensors").exists() and (run / "report.html").exists()
    prompts = read_table(run / "prompts", "prompts", Prompt)
    assert len(prompts) == 14 and [p.split for p in prompts].count("dev") == 3
    assert [(s.row_id, s.reason) for s in read_table(run / "prompts", "set_aside-prompts", SetAside)] == [("line 1", "unreadable picture")]
    assert read_manifest(run)["steps"][0]["set_aside"] == {"unreadable picture": 1} if (run / "manifest.json").exists() else False


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
    messages = [{"role": "user", "content": [{"type": "image", "url": str(home / "pictures/photo0.jpg")}, {"type": "text", "text": "Describe the image in detail."}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        text = processor.decode(model.generate(**inputs, max_new_tokens=40, do_sample=False)[0], skip_special_tokens=True)
        adapted = model(**inputs).logits
        with model.disable_adapter():
            base = model(**inputs).logits
    assert "image" in text.partition("ASSISTANT:")[2] and (adapted - base).abs().max() > 1e-3, "the adapter does something"


def test_the_readme_shows_the_same_five_lines(home):
    """Only the names of base and adapter differ."""
    plain = lambda text: re.sub(r'from_pretrained\((model, )?"[^"]*"\).*', r"from_pretrained(\1...)", FIVE_LINES.search(text)[1])
    assert plain((ROOT / "README.md").read_text()) == plain((home / "runs/mine/round_1/05_dpo/adapter/README.md").read_text())


def test_started_again_it_keeps_everything(home, capsys):
    before = folder_sha(home / "runs/mine/round_1/05_dpo/adapter")
    with contextlib.chdir(home):
        assert main(["run", "my.yaml"]) == 0
    assert capsys.readouterr().out.count("kept") == 6 and folder_sha(home / "runs/mine/round_1/05_dpo/adapter") == before
