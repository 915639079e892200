"""Before a run: are there enough rows, pairs and steps? After it: does the report say what is not known?"""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import yaml
from PIL import Image

from rlaifv_nb.exchange.inputs import take_table
from rlaifv_nb.exchange.official import from_official, to_official
from rlaifv_nb.exchange.public import from_rlaifv_dataset, import_rows, to_rlaifv_dataset
from rlaifv_nb.pairs import PairOptions, run_pairs
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
    write_rows,
    write_table,
    write_text,
)
from rlaifv_nb.runner import chain, report
from rlaifv_nb.runner.command import main
from rlaifv_nb.runner.recipes import (
    Reach,
    RecipeError,
    check_amounts,
    check_recipe,
    load_recipe,
    packaged_recipes,
    plumbing_warning,
    prompts_per_round,
    reach_of,
    reach_problem,
)

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Twelve pictures and a question about each, in a folder whose name is not ASCII."""
    home = tmp_path / "meine Bilder ü"
    (home / "pictures").mkdir(parents=True)
    for k in range(12):
        Image.new("RGB", (40, 30), (20 * k, 90, 120)).save(home / f"pictures/photo{k}.jpg")
    write_rows(
        home / "questions.jsonl",
        [{"image": f"pictures/photo{k}.jpg", "question": "What is shown?"} for k in range(12)],
    )
    monkeypatch.chdir(home)
    return home


def recipe(**changes):
    """A recipe file that extends tiny."""
    Path("my.yaml").write_text(
        yaml.safe_dump({"extends": "tiny", "name": "mine", "rounds": 1, "evaluate": []} | changes)
    )
    return load_recipe("my.yaml")


def readme_recipe(name):
    """A recipe as README shows it, without what stands left of it."""
    text = re.search(
        rf"^{re.escape(name)} +(extends:.*?)(?=^\S)", README.read_text(), re.DOTALL | re.MULTILINE
    )[1]
    return "\n".join(line.removeprefix(" " * 21) for line in text.splitlines()) + "\n"


# enough to learn from


@pytest.fixture
def notebooks(tmp_path):
    """Notebooks that have parameters only."""
    defaults = {
        "01_sampling": "n_samples: int = 10",
        "04_pairs": "max_pairs_per_prompt: int = 2",
        "04_reward_pairs": "max_pairs_per_prompt: int = 3",
        "05_dpo": "epochs: float = 2.0\nbatch_size: int = 16\nmin_steps: int = 10",
    }
    for name, text in defaults.items():
        cell = nbformat.v4.new_code_cell(text, metadata={"tags": ["parameters"]})
        (tmp_path / "nbs").mkdir(exist_ok=True)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "nbs" / f"{name}.ipynb")
    return tmp_path / "nbs"


def test_the_most_that_a_round_can_give(home, notebooks):
    own = recipe(
        prompts={"source": "./questions.jsonl", "n_dev": 2}, parameters={"05_dpo": {"batch_size": 8}}
    )
    reach = reach_of(own, 1, notebooks)
    assert (reach.prompts, reach.pairs, reach.steps) == (10, 20, 5)
    two = replace(own, parameters={"01_sampling": {"n_samples": 2}, "04_pairs": {"max_pairs_per_prompt": 5}})
    assert reach_of(two, 1, notebooks).pairs == 10, "two answers make one pair"
    once = replace(
        own,
        parameters={
            "01_sampling": {"n_samples": 7},
            "04_pairs": {"max_pairs_per_prompt": 5, "draw": "extremes"},
        },
    )
    assert reach_of(once, 1, notebooks).pairs_per_prompt == 3, "extremes takes each answer once"
    later = replace(own, rounds=2, feedback=["claims", "reward"])
    assert reach_of(later, 2, notebooks).pairs == 30, "the reward's own number of pairs"
    assert "04_pairs.max_pairs" not in reach_problem(replace(reach, possible=2)), (
        "more pairs than there can be are no way out"
    )
    assert "04_reward_pairs.max" in reach_problem(replace(reach, pairs_stage="04_reward_pairs"))
    (notebooks / "05_dpo.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook()))
    assert reach_of(own, 1, notebooks) is None, "a notebook without these parameters does not train"


@pytest.mark.parametrize(
    "prompts, each, epochs, batch, least",
    [(10, 2, 2.0, 16, 10), (10, 2, 0.5, 8, 5), (3, 1, 1.0, 1, 8), (144, 2, 2.0, 16, 100), (7, 3, 1.5, 8, 6)],
)
def test_every_way_out_is_enough_and_one_less_is_not(prompts, each, epochs, batch, least):
    reach = Reach(1, prompts, each, epochs, batch, least)
    problem = reach_problem(reach)
    assert f"at most {reach.pairs} pairs" in problem and f"at most {reach.steps} steps" in problem

    def number(key):
        return int(re.search(rf"{key}: (?:at least )?(\d+)", problem)[1])

    more = number("n_per_round")
    ways = {
        "prompts": (prompts + more, -1),
        "pairs_per_prompt": (number("max_pairs_per_prompt"), -1),
        "epochs": (number("05_dpo.epochs"), -1),
    }
    if "05_dpo.batch_size" in problem:
        ways["batch_size"] = (number("05_dpo.batch_size"), 1)
    for key, (enough, less) in ways.items():
        assert reach_problem(replace(reach, **{key: enough})) == "", key
        assert reach_problem(replace(reach, **{key: enough + less})), key
    assert reach_problem(replace(reach, min_steps=number("05_dpo.min_steps"))) == ""
    assert "must be positive" in reach_problem(
        replace(reach, epochs=0.0)
    ) and "must be positive" in reach_problem(replace(reach, batch_size=0))


def test_too_few_steps_are_an_error_before_anything_runs(home, notebooks):
    own = recipe(
        prompts={"source": "./questions.jsonl", "n_dev": 2}, parameters={"05_dpo": {"batch_size": 16}}
    )
    with pytest.raises(
        RecipeError,
        match="my.yaml: round 1 can give at most 20 pairs .10 prompts to train on, 2 pairs each., "
        "and with epochs=2 and batch_size=16 at most 3 steps: too few",
    ):
        check_amounts(own, notebooks)
    check_amounts(replace(own, parameters={"05_dpo": {"batch_size": 4}}), notebooks)


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"prompts": {"source": "./questions.jsonl", "n_per_round": 160, "n_dev": 16}},
            "160 prompts are needed .* has 12: say 12 or less, or leave it out to take all",
        ),
        (
            {"rounds": 2, "prompts": {"source": "./questions.jsonl", "n_per_round": 7}},
            "14 prompts are needed .* has 12: say 6 or less for each of 2 rounds",
        ),
        (
            {"rounds": 2, "prompts": {"source": "./questions.jsonl"}},
            "n_per_round: say how many rows each of the 2 rounds takes; .* has 12, so at most 6",
        ),
        (
            {"prompts": {"source": "./questions.jsonl", "n_dev": 12}},
            "n_dev: 12 rows cannot be kept from training, .* has 12: at most 11",
        ),
        (
            {"prompts": {"source": "iconworld", "n_per_round": 0, "n_dev": 0}},
            "n_dev must be less than n_per_round",
        ),
        ({"prompts": {"source": "dataset:of/somebody"}}, "prompts: missing n_per_round"),
    ],
)
def test_numbers_that_do_not_fit_the_source_are_answered_with_those_that_do(home, changes, says):
    with pytest.raises(RecipeError, match=says):
        check_amounts(recipe(**changes), package_folder("nbs"))
    assert not Path("runs").exists()


def test_a_source_of_ones_own_takes_nothing_over_from_another_source(home):
    own = recipe(prompts={"source": "./questions.jsonl"})
    assert (
        own.prompts == {"source": str(home / "questions.jsonl"), "n_per_round": 0}
        and prompts_per_round(own) == 12
    )
    assert "icon" not in own.description and own.parameters == load_recipe("tiny").parameters
    assert recipe(prompts={"n_per_round": 40}).prompts == {
        "source": "iconworld",
        "n_per_round": 40,
        "n_dev": 16,
    }
    assert recipe(prompts={"source": "./questions.jsonl"}, description="my dogs").description == "my dogs"


def test_a_recipe_that_was_mended_starts_without_further_ado(home, capsys, monkeypatch):
    """A source that lacks something is found in the first step.

    What that step has left must not stand in the way of the next try."""
    Path("pictures/photo3.jpg").write_bytes(b"")
    Path("my.yaml").write_text(
        yaml.safe_dump(
            {
                "extends": "tiny",
                "name": "mine",
                "rounds": 1,
                "evaluate": [],
                "prompts": {"source": "./questions.jsonl", "n_per_round": 12, "n_dev": 2},
                "parameters": {"04_pairs": {"max_pairs_per_prompt": 10}, "05_dpo": {"batch_size": 2}},
            }
        )
    )
    assert main(["run", "my.yaml"]) == 2
    assert (
        "12 prompts are needed (rounds x n_per_round), " in (err := capsys.readouterr().err)
        and "line 4" in err
        and "photo3.jpg: it is empty" in err
    )
    Image.new("RGB", (40, 30), "red").save("pictures/photo3.jpg")
    Path("my.yaml").write_text(Path("my.yaml").read_text().replace("n_dev: 2", "n_dev: 3"))

    def stop(step, *rest):
        raise chain.StepError(f"as far as {step.notebook}")

    monkeypatch.setattr(chain, "execute_notebook", stop)
    assert main(["run", "my.yaml"]) == 2
    assert "as far as 01_sampling" in capsys.readouterr().err


@pytest.mark.parametrize("name", packaged_recipes())
def test_packaged_recipes_give_enough(name):
    found = check_recipe(load_recipe(name), package_folder("nbs"))
    for one in found.variants.values() or [found]:
        check_amounts(one, package_folder("nbs"))


def test_the_readmes_recipes_fit_twelve_photographs(home):
    for name in ("my.yaml", "plumbing.yaml"):
        Path(name).write_text(readme_recipe(name))
        found = check_recipe(load_recipe(name), package_folder("nbs"))
        check_amounts(found, package_folder("nbs"))
        reach = reach_of(found, 1, package_folder("nbs"))
        assert (prompts_per_round(found), reach.prompts, reach.pairs) == (12, 10, 80)
        assert f"at most {reach.steps} of them" in readme_recipe(name) or name == "plumbing.yaml"
        assert bool(plumbing_warning(found.policy, found.prompts["source"])) == (name == "plumbing.yaml")


# ids from elsewhere


@pytest.fixture
def tables(tmp_path):
    """Three pictures whose prompts have ids of other people: numbers, spaces, slashes, umlauts, quotes."""
    ids = ["7", "photo 1/größe-00", 'a-00-01 "<b>&#?']
    prompts = []
    for k, name in enumerate(ids):
        (tmp_path / "prompts").mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (60 * k, 9, 90)).save(tmp_path / f"prompts/{k}.png")
        prompts.append(Prompt(name, f"{k}.png", "", "What is it?", "theirs", "dev" if k == 2 else "train"))
    responses = [
        Response(f"{name}-{i:02d}", name, i, i, f"Answer {i} about it." + " More." * i, "stop")
        for name in ids
        for i in range(3)
    ]
    claims = [
        Claim(f"{r.response_id}-{k:02d}", r.response_id, f"Claim {k}.", f"Is it {k}?")
        for r in responses
        for k in range(2)
    ]
    verdicts = [
        Verdict(c.claim_id, 0.9, 0.1, "yes")
        if int(c.response_id[-1]) < k + 1
        else Verdict(c.claim_id, 0.1, 0.9, "no")
        for c in claims
        for k in [int(c.claim_id[-1])]
    ]
    for name, rows in (
        ("prompts", prompts),
        ("responses", responses),
        ("claims", claims),
        ("verdicts", verdicts),
    ):
        write_table(tmp_path / name, name, rows)
    pairs = run_pairs(
        *(tmp_path / name for name in ("prompts", "responses", "claims", "verdicts")),
        tmp_path / "pairs",
        options=PairOptions(length_balance=False),
    ).read("pairs", Pair)
    assert {p.prompt_id for p in pairs} == set(ids)
    return tmp_path, dict(prompts=prompts, responses=responses, claims=claims, verdicts=verdicts, pairs=pairs)


def test_any_prompt_id_goes_to_the_official_files_and_back(tables):
    home, rows = tables
    to_official({name: home / name for name in rows}, home / "official")
    assert len(list((home / "official/images").iterdir())) == 3, (
        "a table without hashes: each picture has a file of its own all the same"
    )
    at = {"prompts": home / "prompts", "responses": home / "back/responses", "claims": home / "back/claims"}
    from_official(home / "official/answers.jsonl", at["responses"], at["prompts"])
    from_official(home / "official/divided.gq.jsonl", at["claims"], at["prompts"], responses=at["responses"])
    from_official(home / "official/autocheck.jsonl", home / "back/verdicts", **at)
    from_official(home / "official/pairs.jsonl", home / "back/pairs", at["prompts"])
    for name, record in (("responses", Response), ("claims", Claim), ("verdicts", Verdict), ("pairs", Pair)):
        assert read_table(home / "back" / name, name, record) == rows[name], name


def test_any_prompt_id_goes_to_a_dataset_and_back(tables):
    home, rows = tables
    dataset, aside = to_rlaifv_dataset(rows["pairs"], rows["prompts"], home / "prompts")
    prompts, pairs, more = from_rlaifv_dataset(dataset, home / "back")
    assert aside == more == [] and pairs == rows["pairs"], "with ids, splits and scores"
    assert {(p.prompt_id, p.split) for p in prompts} == {(p.prompt_id, p.split) for p in rows["prompts"]}
    moved = dataset.to_list()
    moved[0]["question"] = "Another question?"
    _, others, _ = import_rows(moved[:1], home / "moved")
    assert others[0].prompt_id not in {p.prompt_id for p in rows["prompts"]}, (
        "what is said about another prompt is not taken over"
    )


def test_any_prompt_id_is_a_source_and_repeats_are_set_aside(tables):
    home, rows = tables
    write_table(home / "prompts", "prompts", [*rows["prompts"], rows["prompts"][0]])
    found, aside, n = take_table(home / "prompts", home / "run/prompts")
    assert [p.prompt_id for p in found] == [p.prompt_id for p in rows["prompts"]] and n == 4
    assert aside == [SetAside("row 4", "same prompt as another row", "7")]
    assert all(
        (home / "run/prompts" / p.image_path).resolve() == home / f"prompts/{k}.png"
        for k, p in enumerate(found)
    )


# the report


def run_of(tmp_path, manifest=None, **recipe):
    """A run about one photograph, up to a pair and its training.

    One answer has three claims, one was cut off, one could not be divided."""
    run = tmp_path / "run"
    write_text(
        run / "recipe.yaml",
        yaml.safe_dump({"name": "mine", "description": "d", "rounds": 1, "evaluate": []} | recipe),
    )
    Image.new("RGB", (900, 400), "red").save(tmp_path / "a.jpg")
    write_table(
        run / "prompts",
        "prompts",
        [Prompt("any id/1", "../../a.jpg", "sha", "What <b>is</b> it?", "q.jsonl/line 1")],
    )
    ids, ends = [f"any id/1-{i:02d}" for i in range(3)], ("stop", "length", "stop")
    here = run / "round_1"
    write_table(
        here / "01_sampling",
        "responses",
        [Response(i, "any id/1", k, 0, f"Answer {k}.", end) for k, (i, end) in enumerate(zip(ids, ends))],
    )
    write_table(
        here / "02_claims",
        "claims",
        [Claim(f"{ids[0]}-{k:02d}", ids[0], f"Claim {k}.", "?") for k in range(3)],
    )
    write_table(here / "02_claims", "set_aside-claims", [SetAside(ids[2], "no <facts>")])
    write_table(
        here / "03_feedback",
        "verdicts",
        [Verdict(f"{ids[0]}-{k:02d}", 0.5, 0.5, label) for k, label in enumerate(("yes", "no", "abstain"))],
    )
    write_table(
        here / "04_pairs",
        "pairs",
        [Pair("p", "any id/1", ids[0], ids[2], "Answer 0.", "Answer 2.", -1.0, -2.0)],
    )
    stage = StageFolder(here / "04_pairs", "pairs", {})
    stage.finish(3, 1, ["pairs"], warnings=["Only 1 of 9 prompts have a <pair>."])
    if manifest is not None:
        curve = [
            {"step": s, "split": split, "loss": 0.7, "margin": 0.1 * s, "accuracy": 1.0}
            for s in (0, 3, 6)
            for split in ("train", "dev")
        ]
        write_table(here / "05_dpo", "training", curve)
        write_json(
            here / "05_dpo/manifest.json",
            {"train_pairs": 20, "dev_pairs": 2, "best_step": 6, "best_dev_loss": 0.65} | manifest,
        )
        write_json(run / "manifest.json", {})
    return run


def page_of(run):
    return report.write_report(run).read_text()


def test_a_report_without_evaluation_says_that_nothing_more_is_known(tmp_path):
    page = page_of(run_of(tmp_path, {"dev_loss_before": 0.7}))
    assert (
        "An adapter was trained, and not evaluated." in page
        and "whether this helped on these pictures is not known" in page
    )
    assert (
        "0.700 → 0.650" in page
        and "20 + 2" in page
        and "<strong>6</strong>steps" in page
        and "finished: d" in page
    )
    assert "Not there yet" not in re.sub(
        r"<section><h2 id=\"steps\">.*?</section>", "", page, flags=re.DOTALL
    )
    assert not {"scores", "before-and-after", "best-of-n"} & set(re.findall(r'<h2 id="(.*?)">', page)), (
        "no empty chapters"
    )


@pytest.mark.parametrize(
    "manifest, learned",
    [
        ({"dev_loss_before": 0.65}, False),
        ({"dev_loss_before": 0.6}, False),
        ({"dev_loss_before": 0.66}, True),
        ({"best_step": 0}, False),
        ({}, True),
    ],
    ids=["the same", "worse", "better", "old manifest, margin 0", "old manifest, a margin"],
)
def test_finished_alone_is_not_said_of_an_adapter_that_learned_nothing(tmp_path, manifest, learned):
    page = page_of(run_of(tmp_path, manifest))
    assert (
        ("finished, but nothing was learned in round 1" in page)
        == ("The adapter learned nothing." in page)
        == (not learned)
    )


def test_an_unfinished_run_says_so(tmp_path):
    page = page_of(run_of(tmp_path))
    assert "not finished: d" in page and "No adapter has been trained yet." in page


def test_warnings_stand_first_with_the_name_of_their_stage(tmp_path):
    run = run_of(
        tmp_path,
        {"warnings": ["The loss did not fall."]},
        policy="packaged:iconworld-vlm",
        prompts={"source": "../q.jsonl"},
    )
    write_json(
        run / "round_1/03_feedback/step.json",
        {"seconds": 1, "attempts": 1, "failed_check": "AssertionError: odd"},
    )
    page = page_of(run)
    box = re.search(r"<section class=warnings>.*?</section>", page, re.DOTALL)[0]
    assert re.findall(r'href="(.*?)"', box) == [
        "recipe.yaml",
        "round_1/03_feedback/manifest.json",
        "round_1/04_pairs/manifest.json",
        "round_1/05_dpo/manifest.json",
    ]
    assert (
        "Only 1 of 9 prompts have a &lt;pair&gt;." in box
        and "The loss did not fall." in box
        and "the plumbing only" in box
    )
    assert "a cell that looks at the results failed: AssertionError: odd" in box
    assert page.index("class=warnings") < page.index('<h2 id="feedback-in-round-1">')
    assert report.stage_warnings(run / "round_1/04_pairs") == ["Only 1 of 9 prompts have a <pair>."]
    assert report.stage_warnings(run / "round_1/01_sampling") == [] == report.stage_warnings(run / "nowhere")


def test_claims_of_unknown_truth_are_coloured_by_verdict(tmp_path):
    page = page_of(run_of(tmp_path, {}))
    for kind, text in (("accepted", "✓ Claim 0."), ("rejected", "✗ Claim 1."), ("abstained", "? Claim 2.")):
        assert re.search(rf'<li class="unknown {kind}"[^>]*>{re.escape(text)}', page)
    assert "whether a claim is true is not known" in page and "green claims are true" not in page


def test_answers_without_claims_say_why_and_texts_are_escaped(tmp_path):
    run = run_of(tmp_path, {})
    assert report.lost_answers(run / "round_1") == {
        "any id/1-01": "cut off at the token limit",
        "any id/1-02": "set aside: no <facts>",
    }
    page = page_of(run)
    assert "What &lt;b&gt;is&lt;/b&gt; it?" in page and "<b>is" not in page
    bad = report.claim_list([("A", None, '"><script>')])
    assert "<script>" not in bad


def test_pictures_are_small_and_upright_and_may_have_moved(tmp_path):
    turned = Image.Exif()
    turned[274] = 6
    run = run_of(tmp_path, {})
    Image.new("RGB", (4000, 3000), "red").save(tmp_path / "a.jpg", exif=turned)
    data = re.search(r'src="data:image/webp;base64,(.*?)"', page_of(run))[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (240, 320)
    (tmp_path / "a.jpg").unlink()
    page = page_of(run)
    assert (
        "a.jpg cannot be read any more" in page and "Answer 0." in page and "claims of unknown truth" in page
    )
