"""Recipes, plan, what is kept and what is made again, the command line, and the report of unfinished runs.

Stage notebooks are stood in for by tiny ones; most tests do not even start a kernel."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

import nbformat
import papermill
import pytest
import yaml
from PIL import Image

from rlaifv_nb.records import (
    Claim,
    Pair,
    Prompt,
    Response,
    Score,
    Verdict,
    package_folder,
    read_table,
    write_json,
    write_rows,
    write_table,
)
from rlaifv_nb.runner import chain, recipes, report
from rlaifv_nb.runner import command as command_line
from rlaifv_nb.runner.chain import StepError, is_done, run_chain
from rlaifv_nb.runner.command import main
from rlaifv_nb.runner.recipes import (
    FINAL_STAGES,
    ROUND_STAGES,
    RecipeError,
    chain_parameters,
    check_library,
    check_recipe,
    load_recipe,
    plan_run,
)

ROOT = Path(__file__).resolve().parent.parent
STAGES = ROUND_STAGES + FINAL_STAGES
WRITE = """
import json, pathlib

def run_stage(out):
    manifest = {"rows_in": 1, "rows_out": 1, "set_aside": {}}
    (pathlib.Path(out) / "manifest.json").write_text(json.dumps(manifest))

run_stage(out)"""


def rows_of(stage, prompt_id, scale):
    """The table that a stage writes, with one row that depends on `scale`."""
    return {
        "01_sampling": ("responses", [Response("r", prompt_id, 0, 0, f"{scale}", "stop")]),
        "02_claims": ("claims", [Claim("c", "r", f"{scale}", "")]),
        "03_feedback": ("verdicts", [Verdict("c", scale, 1 - scale, "yes")]),
        "04_pairs": ("pairs", [Pair("q", prompt_id, "r", "r", "a", "b", scale, 0.0)]),
        "05_dpo": (
            "training",
            [{"step": 1, "split": "train", "loss": scale, "margin": 0.0, "accuracy": 0.5}],
        ),
    }[stage]


def write_notebook(folder, stage, code="pass", exported="x = 1", default="1.0", look="pass"):
    """A stand-in for a stage notebook: the parameters that the chain sets, one of its own, an exported cell,
    some code, the run, and a look.
    """
    kinds = {int: "int = 0", str: "str = ''", PurePosixPath: "str = ''", dict: "str = ''"}
    given = {"out": "", **chain_parameters(load_recipe("tiny"), stage, 2)}
    lines = [f"{name}: {kinds[type(value)]}" for name, value in given.items()] + [
        f"scale: float = {default}  # its own",
        "name: str = 'a'",
    ]
    cell = nbformat.v4.new_code_cell
    cells = [
        cell("\n".join(lines), metadata={"tags": ["parameters"]}),
        cell(f"#| export\n{exported}"),
        cell(code),
        cell(WRITE),
        cell(look),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{stage}.ipynb")


@pytest.fixture
def notebooks(tmp_path):
    folder = tmp_path / "nbs"
    folder.mkdir()
    for stage in STAGES:
        write_notebook(folder, stage)
    return folder


@pytest.fixture
def toy():
    """Two rounds of two pictures."""
    prompts = {"source": "iconworld", "n_per_round": 2, "n_dev": 1}
    return replace(load_recipe("tiny"), prompts=prompts, parameters={"04_pairs": {"scale": 2.0}}, evaluate=[])


@pytest.fixture
def executed(monkeypatch):
    """Stages without kernels: the folders that were made, in order; a row depends on its parameters."""
    made, failing = [], []

    def execute(step, run, notebooks, progress):
        if step.out in failing:
            raise StepError(f"{step.out} failed: ValueError: no luck")
        folder, scale = run / step.out, step.parameters.get("scale", 0.0)
        write_table(
            folder,
            *rows_of(step.notebook, read_table(run / "prompts", "prompts", Prompt)[0].prompt_id, scale),
        )
        if step.notebook == "05_dpo":
            (folder / "adapter").mkdir(exist_ok=True)
            (folder / "adapter" / "weights").write_text(str(scale))
        write_json(folder / "manifest.json", {"rows_in": 1, "rows_out": 1, "set_aside": {}})
        made.append(step.out)
        return ""

    monkeypatch.setattr(chain, "execute_notebook", execute)
    made_and_failing = type("Made", (), {"made": made, "failing": failing, "clear": made.clear})
    return made_and_failing


def recipe_file(tmp_path, text=None, **changes):
    path = tmp_path / "my.yaml"
    path.write_text(text if text is not None else yaml.safe_dump({"extends": "tiny"} | changes))
    return str(path)


# recipes


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"rouds": 3}, "unknown 'rouds'; did you mean rounds"),
        ({"rounds": "two"}, "rounds must be a whole number, not 'two'"),
        ({"rounds": True}, "rounds must be a whole number"),
        ({"rounds": 6}, "rounds: from 1 to 5, not 6"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"name": "a b"}, "name: only letters"),
        ({"policy": None}, "policy must be a string"),
        ({"policy": "./no-such-model"}, "policy: there is no"),
        ({"evaluate": ["06_evaluatoin"]}, "did you mean 06_evaluation"),
        ({"evaluate": "06_evaluation"}, "evaluate must be a list"),
        ({"prompts": {"n_pre_round": 3}}, "did you mean n_per_round"),
        ({"prompts": {"n_per_round": 10, "n_dev": 10}}, "n_dev must be less"),
        ({"prompts": {"source": "./elsewhere"}}, "prompts.source: no prompts-*.jsonl"),
        ({"parameters": {"05_dop": {"beta": 1}}}, "unknown '05_dop'; did you mean 05_dpo"),
        ({"parameters": {"05_dpo": None}}, "parameters.05_dpo must be a mapping"),
        ({"parameters": []}, "parameters must be a mapping"),
        (
            {"variants": {"a": {"parameters": {"01_smpling": {}}}}},
            "variants.a, parameters: unknown '01_smpling'",
        ),
        ({"variants": {"a": 1}}, "variants.a must be a mapping"),
        ({"extends": "tinny"}, "did you mean tiny"),
        ({"extends": "my.yaml"}, "extends itself"),
    ],
)
def test_recipe_errors_name_the_key_and_what_is_valid(tmp_path, changes, says):
    with pytest.raises(RecipeError) as e:
        load_recipe(recipe_file(tmp_path, **changes))
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("rounds: [1", "my.yaml: "),
        ("rounds: 1\nrounds: 2", "'rounds' appears twice"),
        ("- a", "maps keys to values"),
        ("", "maps keys to values"),
        ("rounds: 1", "the key 'name' is missing"),
        ("extends: tiny\nparameters: {05_dpo: {beta: 1, beta: 2}}", "'beta' appears twice"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, says):
    with pytest.raises(RecipeError, match=says) as e:
        load_recipe(recipe_file(tmp_path, text))
    assert "\n" not in str(e.value)


def test_numbers_with_exponents_are_numbers(tmp_path):
    path = recipe_file(
        tmp_path,
        "extends: tiny\nparameters: {05_dpo: {learning_rate: 2e-4}, 01_sampling: {temperature: 1}}\n",
    )
    assert load_recipe(path).parameters["05_dpo"]["learning_rate"] == 2e-4
    assert (
        load_recipe(path).parameters["05_dpo"]["beta"] == load_recipe("tiny").parameters["05_dpo"]["beta"]
    ), "the rest is kept"


def test_paths_in_a_recipe_start_at_its_file_and_stay_valid_in_the_run_folder(tmp_path):
    (tmp_path / "model").mkdir()
    recipe = load_recipe(recipe_file(tmp_path, policy="./model"))
    assert recipe.policy == str(tmp_path / "model")
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipes.recipe_text(recipe, run))
    assert str(tmp_path) not in (run / "recipe.yaml").read_text()
    assert load_recipe(str(run / "recipe.yaml")) == recipe


def test_command_line_goes_over_the_recipe_and_variants_go_over_the_command_line():
    recipe = load_recipe("ablations", {"rounds": 3, "seed": 5})
    assert recipe.rounds == 3 and {name: r.rounds for name, r in recipe.variants.items()} == {
        "full": 3,
        "whole": 3,
        "confounded": 3,
        "offline": 1,
        "extremes": 3,
    }
    assert {r.seed for r in recipe.variants.values()} == {5} and recipe.variants[
        "full"
    ].name == "ablations/full"


@pytest.mark.parametrize(
    "parameters, says",
    [
        ({"scael": 1.0}, "parameters.05_dpo: unknown 'scael'; did you mean scale"),
        ({"scale": "1"}, "05_dpo.scale must be a number, not '1'"),
        ({"scale": True}, "must be a number"),
        ({"name": 1}, "05_dpo.name must be a string"),
        ({"seed": 1}, "'seed' is set by the chain"),
        ({"out": "x"}, "'out' is set by the chain"),
        ({"zzz": 1}, "there are: scale, name"),
    ],
)
def test_parameters_are_checked_against_the_notebook(notebooks, toy, parameters, says):
    with pytest.raises(RecipeError, match=says):
        check_recipe(replace(toy, parameters={"05_dpo": parameters}), notebooks)


def test_whole_numbers_become_floats_where_the_notebook_wants_floats(notebooks, toy):
    checked = check_recipe(replace(toy, parameters={"05_dpo": {"scale": 2}}, variants={"v": toy}), notebooks)
    assert (
        repr(checked.parameters["05_dpo"]["scale"]) == "2.0"
        and checked.variants["v"].parameters == toy.parameters
    )


def test_a_notebook_without_what_the_chain_sets_is_refused(notebooks, toy):
    path = notebooks / "02_claims.ipynb"
    path.write_text(path.read_text().replace("splitter: str", "spliter: str"))
    with pytest.raises(
        RecipeError,
        match="02_claims.ipynb, which the chain gives a parameter 'splitter': unknown 'splitter'; did you "
        "mean spliter",
    ):
        check_recipe(toy, notebooks)
    path.unlink()
    with pytest.raises(RecipeError, match="there is no notebook 02_claims.ipynb"):
        check_recipe(toy, notebooks)


missing = [s for s in STAGES if not (ROOT / "nbs" / f"{s}.ipynb").exists()]


@pytest.mark.skipif(bool(missing), reason=f"notebooks not there yet: {', '.join(missing)}")
@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "data" / "recipes").glob("*.yaml")))
def test_packaged_recipes_fit_the_notebooks(name):
    recipe = check_recipe(load_recipe(name), package_folder("nbs"))
    for each in [recipe, *recipe.variants.values()]:
        assert plan_run(each)[0].notebook == "prompts"


@pytest.mark.skipif(bool(missing), reason=f"notebooks not there yet: {', '.join(missing)}")
@pytest.mark.parametrize("stage", STAGES)
def test_papermill_reads_the_parameters_that_the_chain_reads(stage):
    path = package_folder("nbs") / f"{stage}.ipynb"
    found = papermill.inspect_notebook(recipes.open_notebook(path))
    ours = recipes.notebook_parameters(path)
    lost = sorted(set(ours) - set(found))
    assert not lost, (
        f"papermill loses {lost} of {path.name}: a default or a help comment on these lines has a second `=`"
    )
    assert {name: p["inferred_type_name"] for name, p in found.items()} == {
        name: kind.__name__ for name, kind in ours.items()
    }


# the plan


def test_plan_hands_on_adapters_prompts_and_a_frozen_labeler():
    steps = {s.out: s for s in plan_run(load_recipe("tiny", {"rounds": 3}))}
    assert list(steps) == [
        "prompts",
        *(f"round_{k}/{s}" for k in (1, 2, 3) for s in ROUND_STAGES),
        *FINAL_STAGES,
    ]
    sampling = [steps[f"round_{k}/01_sampling"].parameters for k in (1, 2, 3)]
    assert [str(p["adapter"]) for p in sampling] == ["", "round_1/05_dpo/adapter", "round_2/05_dpo/adapter"]
    n = load_recipe("tiny").prompts["n_per_round"]
    assert [(p["first_prompt"], p["n_prompts"]) for p in sampling] == [(0, n), (n, n), (2 * n, n)]
    assert {steps[f"round_{k}/03_feedback"].parameters["labeler_adapter"] for k in (1, 2, 3)} == {""}
    assert str(steps["07_guided_decoding"].parameters["adapter"]) == "round_3/05_dpo/adapter"
    assert recipes.stored(steps["06_evaluation"].parameters["adapters"], ".") == ",".join(
        f"round_{k}=round_{k}/05_dpo/adapter" for k in (1, 2, 3)
    )


@pytest.mark.parametrize(
    "labeler, expected",
    [("base", ("P", "")), ("policy", ("P", "round_1/05_dpo/adapter")), ("some/model", ("some/model", ""))],
)
def test_labelers(labeler, expected):
    p = chain_parameters(replace(load_recipe("tiny"), policy="P", labeler=labeler), "03_feedback", 2)
    assert (p["labeler"], str(p["labeler_adapter"])) == expected


# what is kept and what is made again


def test_a_finished_run_is_kept_as_it_is(tmp_path, notebooks, toy, executed):
    manifest = run_chain(toy, tmp_path / "run", notebooks)
    assert len(executed.made) == 10 and [s["folder"] for s in manifest["steps"]] == [
        "prompts",
        *executed.made,
    ]
    assert (
        manifest == json.loads((tmp_path / "run" / "manifest.json").read_text())
        and manifest["recipe"]["name"] == "tiny"
    )
    executed.clear()
    run_chain(toy, tmp_path / "run", notebooks)
    assert executed.made == []


def test_files_of_a_run_name_no_absolute_path(tmp_path, notebooks, toy, executed):
    run_chain(toy, tmp_path / "run", notebooks)
    for path in (tmp_path / "run").rglob("*"):
        if path.suffix in (".json", ".yaml", ".jsonl"):
            assert str(tmp_path) not in path.read_text(), path


@pytest.mark.parametrize(
    "stage, name, compared",
    [("01_sampling", "batch_size", False), ("05_dpo", "max_tokens", False), ("05_dpo", "batch_size", True)],
)
def test_how_a_stage_works_may_change_between_attempts(
    tmp_path, notebooks, toy, executed, stage, name, compared
):
    path = notebooks / f"{stage}.ipynb"
    path.write_text(
        path.read_text().replace(
            "scale: float = 1.0  # its own", f"scale: float = 1.0  # its own\\n{name}: int = 16"
        )
    )
    run, out = tmp_path / "run", f"round_2/{stage}"
    first, smaller = (replace(toy, parameters=toy.parameters | {stage: {name: n}}) for n in (16, 4))
    executed.failing.append(out)
    with pytest.raises(StepError, match="no luck"):
        run_chain(first, run, notebooks)
    executed.failing.clear(), executed.clear()
    if compared:
        with pytest.raises(StepError, match=f"round_1/{stage} was made with other settings .{name}: 16 -> 4"):
            run_chain(smaller, run, notebooks)
        return
    run_chain(smaller, run, notebooks)
    assert executed.made[0] == out and f"round_1/{stage}" not in executed.made, "it goes on where it was"
    record = json.loads((run / out / "step.json").read_text())
    assert (record["parameters"][name], record["attempts"]) == (4, 2)
    executed.clear()
    run_chain(first, run, notebooks)
    assert executed.made == [], "what is finished is kept, whatever the batch"


def test_a_failed_run_goes_on_with_the_failed_step(tmp_path, notebooks, toy, executed):
    executed.failing.append("round_2/02_claims")
    with pytest.raises(StepError, match="no luck"):
        run_chain(toy, tmp_path / "run", notebooks)
    assert executed.made[-1] == "round_2/01_sampling" and not (tmp_path / "run" / "manifest.json").exists()
    executed.failing.clear(), executed.clear()
    run_chain(toy, tmp_path / "run", notebooks)
    assert executed.made == [f"round_2/{s}" for s in ROUND_STAGES[1:]]
    assert json.loads((tmp_path / "run" / "round_2" / "02_claims" / "step.json").read_text())["attempts"] == 2


def test_the_machine_is_looked_at_before_anything_is_made_or_deleted(tmp_path, notebooks, toy, executed):
    run, bad = tmp_path / "run", replace(toy, labeler="no such model")
    with pytest.raises(
        RecipeError,
        match="tiny cannot start: no such model is neither a folder nor the name of a model on the Hub",
    ):
        run_chain(bad, run, notebooks)
    assert executed.made == [] and not (run / "recipe.yaml").exists()
    run_chain(toy, run, notebooks)
    executed.clear()
    with pytest.raises(RecipeError, match="cannot start"):
        run_chain(bad, run, notebooks, remake="03_feedback", remake_round=1)
    assert executed.made == [] and (run / "round_1" / "03_feedback" / "manifest.json").exists()


def test_a_finished_run_needs_no_models(tmp_path, notebooks, toy, executed, monkeypatch):
    run_chain(toy, tmp_path / "run", notebooks)
    monkeypatch.setattr(chain, "check_machine", lambda recipe, steps: pytest.fail("nothing is to be done"))
    run_chain(toy, tmp_path / "run", notebooks)
    shutil.rmtree(tmp_path / "run" / "round_2" / "04_pairs")
    looked = []
    monkeypatch.setattr(chain, "check_machine", lambda recipe, steps: looked.extend(s.out for s in steps))
    run_chain(toy, tmp_path / "run", notebooks)
    assert looked == ["round_2/04_pairs"]


def test_a_notebook_that_stopped_after_its_manifest_runs_again(tmp_path, notebooks, toy, executed):
    run = tmp_path / "run"
    run_chain(toy, run, notebooks)
    plan = run / "round_1" / "03_feedback" / "step.json"
    write_json(plan, json.loads(plan.read_text()) | {"finished": False})
    executed.clear()
    run_chain(toy, run, notebooks)
    assert executed.made == ["round_1/03_feedback"], "the same result: what follows is kept"


def test_changed_parameters_are_refused_before_anything_is_touched(tmp_path, notebooks, toy, executed):
    run = tmp_path / "run"
    run_chain(toy, run, notebooks)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    executed.clear()
    for other, says in (
        (
            replace(toy, parameters={"04_pairs": {"scale": 3.0}}),
            "round_1/04_pairs .*scale: 2.0 -> 3.0.*--from 04_pairs --round 1",
        ),
        (replace(toy, seed=1), "prompts was made .*seed: 0 -> 1.*--from prompts"),
        (replace(toy, parameters={}), "scale: 2.0 -> None"),
        (replace(toy, splitter="other"), "splitter: 'packaged:iconworld-splitter' -> 'other'"),
    ):
        with pytest.raises(StepError, match=says):
            run_chain(other, run, notebooks)
    assert executed.made == [] and before == {
        p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_from_makes_a_step_and_all_later_ones_again(tmp_path, notebooks, toy, executed):
    run, other = tmp_path / "run", replace(toy, parameters={"04_pairs": {"scale": 3.0}})
    run_chain(toy, run, notebooks)
    executed.clear()
    with pytest.raises(StepError, match="round_1/04_pairs was made with other settings"):
        run_chain(other, run, notebooks, "04_pairs", 2)
    assert executed.made == [] and (run / "round_2" / "05_dpo" / "manifest.json").exists(), (
        "refused, so nothing was deleted"
    )
    run_chain(other, run, notebooks, "04_pairs", 1)
    assert executed.made == ["round_1/04_pairs", "round_1/05_dpo", *(f"round_2/{s}" for s in ROUND_STAGES)]
    executed.clear()
    run_chain(other, run, notebooks, "prompts")
    assert len(executed.made) == 10


@pytest.mark.parametrize(
    "remake, round, says",
    [
        ("05_dpo", 0, "--round 1 or 2"),
        ("05_dpo", 3, "--round 1 or 2"),
        ("prompts", 2, "there is no round 2"),
        ("05_dop", 0, "did you mean 05_dpo"),
    ],
)
def test_from_needs_a_step_of_the_plan(tmp_path, notebooks, toy, executed, remake, round, says):
    with pytest.raises(RecipeError, match=says):
        run_chain(toy, tmp_path / "run", notebooks, remake, round)


def test_deleting_a_folder_by_hand_makes_that_step_again(tmp_path, notebooks, toy, executed):
    run = tmp_path / "run"
    run_chain(toy, run, notebooks)
    executed.clear()
    shutil.rmtree(run / "round_1" / "02_claims")
    run_chain(toy, run, notebooks)
    assert executed.made == ["round_1/02_claims"], "its table is the same as before, so nothing else changes"
    write_rows(run / "round_1" / "02_claims" / "claims-00000.jsonl", [{"scale": 9}])
    with pytest.raises(
        StepError, match="round_1/03_feedback was made with other settings .content of round_1/02_claims"
    ):
        run_chain(toy, run, notebooks)


@pytest.mark.parametrize("change", [{"exported": "x = 2"}, {"default": "5.0"}])
def test_changed_code_is_refused_unless_told_to_keep(tmp_path, notebooks, toy, executed, change):
    run = tmp_path / "run"
    run_chain(toy, run, notebooks)
    executed.clear()
    write_notebook(notebooks, "02_claims", code="print('prose, charts and other cells may change')")
    run_chain(toy, run, notebooks)
    write_notebook(notebooks, "02_claims", **change)
    with pytest.raises(
        StepError,
        match="round_1/02_claims .*code of the notebook.*--from 02_claims --round 1, or keep it with "
        "--keep-code",
    ):
        run_chain(toy, run, notebooks)
    run_chain(toy, run, notebooks, keep_code=True)
    assert executed.made == []


def test_a_third_round_extends_prompts_and_keeps_two_rounds(tmp_path, notebooks, toy, executed):
    run = tmp_path / "run"
    run_chain(toy, run, notebooks)
    before = read_table(run / "prompts", "prompts", Prompt)
    executed.clear()
    run_chain(replace(toy, rounds=3), run, notebooks)
    after = read_table(run / "prompts", "prompts", Prompt)
    assert (
        executed.made == [f"round_3/{s}" for s in ROUND_STAGES]
        and after[:4] == before
        and [p.split for p in after] == ["train", "dev"] * 3
    )


def test_a_folder_that_the_chain_did_not_make_is_refused(tmp_path, notebooks, toy, executed):
    write_json(tmp_path / "run" / "round_1" / "01_sampling" / "manifest.json", {})
    with pytest.raises(StepError, match="was not made by this chain"):
        run_chain(toy, tmp_path / "run", notebooks)


def test_only_one_chain_at_a_time(tmp_path, notebooks, toy, executed):
    with chain.run_lock(tmp_path / "run"):
        with pytest.raises(StepError, match="another chain is running"):
            run_chain(toy, tmp_path / "run", notebooks)
    run_chain(toy, tmp_path / "run", notebooks)


def test_prompts_of_ones_own(tmp_path, notebooks, toy, executed):
    source = tmp_path / "mine"
    source.mkdir()
    Image.new("RGB", (8, 8)).save(source / "a.png")
    rows = [Prompt(f"{i:012x}", "a.png", "sha", f"question {i}", "mine", "train") for i in range(5)]
    write_table(source, "prompts", rows)
    own = replace(toy, prompts={"source": str(source), "n_per_round": 2})
    run_chain(own, tmp_path / "run", notebooks)
    taken = read_table(tmp_path / "run" / "prompts", "prompts", Prompt)
    assert [p.prompt_id for p in taken] == [p.prompt_id for p in rows[:4]]
    assert (tmp_path / "run" / "prompts" / taken[0].image_path).resolve() == source / "a.png"
    with pytest.raises(
        RecipeError, match="6 prompts are needed .* has 5: say 1 or less for each of 3 rounds"
    ):
        run_chain(replace(own, rounds=3), tmp_path / "run3", notebooks)
    write_table(source, "prompts", [rows[0]] * 4)
    with pytest.raises(
        RecipeError,
        match="4 prompts are needed .* has 1 and 3 unusable rows .3 same prompt as another row; the first: "
        "row 2",
    ):
        run_chain(own, tmp_path / "twice", notebooks)


# papermill itself


def test_papermill_runs_a_step_in_the_run_folder(tmp_path, notebooks, toy, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    run = tmp_path / "a {b} run"
    step = plan_run(toy)[4]
    write_notebook(
        notebooks,
        step.notebook,
        code="import os\nassert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'\n"
        "assert os.path.isabs(responses) and scale == 2.0\nprint(os.getcwd())",
    )
    chain.run_step(step, run, notebooks)
    assert is_done(step, run, notebooks) and "OMP_WAIT_POLICY" not in os.environ
    shown = nbformat.read(run / step.out / f"{step.notebook}.ipynb", as_version=4)
    assert any(str(run) in str(cell.get("outputs")) for cell in shown.cells)


@pytest.mark.parametrize(
    "code, says",
    [
        (
            "raise ValueError('one\\ntwo')",
            "round_1/04_pairs failed: ValueError: one two. The notebook as far as it came: "
            ".*04_pairs.ipynb. When the",
        ),
        ("import os; os._exit(1)", "failed: its kernel died"),
        ("x = 1\nassert x == 2", "failed: AssertionError: `assert x == 2`. The"),
    ],
)
def test_failures_are_told_in_one_line(tmp_path, notebooks, toy, code, says):
    step = plan_run(toy)[4]
    write_notebook(notebooks, step.notebook, code=code)
    with pytest.raises(StepError, match=says) as e:
        chain.run_step(step, tmp_path / "run", notebooks)
    assert "\n" not in str(e.value) and not is_done(step, tmp_path / "run", notebooks)
    assert (tmp_path / "run" / step.out / f"{step.notebook}.ipynb").exists()


@pytest.mark.parametrize(
    "look, says",
    [
        ("assert 1 == 2", "AssertionError: `assert 1 == 2`"),
        ("max([])", "ValueError: max"),
        ("import os; os._exit(1)", "its kernel died"),
    ],
)
def test_a_check_behind_the_run_cannot_undo_the_stage(tmp_path, notebooks, toy, capsys, look, says):
    step = plan_run(toy)[4]
    write_notebook(notebooks, step.notebook, look=look)
    chain.run_step(step, tmp_path / "run", notebooks)
    assert is_done(step, tmp_path / "run", notebooks)
    told = [line for line in capsys.readouterr().out.splitlines() if "is done and kept" in line]
    cell_id = nbformat.read(notebooks / f"{step.notebook}.ipynb", as_version=4).cells[-1].id
    assert len(told) == 1 and f"failed: cell {cell_id}: {says}" in told[0]
    record = json.loads((tmp_path / "run" / step.out / "step.json").read_text())
    assert record["finished"] and record["failed_check"].startswith(f"cell {cell_id}: {says}")


def test_a_run_cell_that_refuses_is_a_failure_though_a_manifest_is_there(tmp_path, notebooks, toy):
    step, run = plan_run(toy)[4], tmp_path / "run"
    chain.run_step(step, run, notebooks)
    write_notebook(notebooks, step.notebook)
    path = notebooks / f"{step.notebook}.ipynb"
    for refusal in ("raise ValueError('was started with other settings')", "import os; os._exit(1)"):
        path.write_text(path.read_text().replace("    (pathlib", f"    {refusal}\\n    (pathlib"))
        with pytest.raises(StepError, match="other settings|kernel died"):
            chain.run_step(step, run, notebooks)
        assert not is_done(step, run, notebooks)
        write_notebook(notebooks, step.notebook)


def test_the_chain_leaves_examples_out(tmp_path, notebooks, toy):
    step = plan_run(toy)[4]
    path = notebooks / f"{step.notebook}.ipynb"
    nb, code, text = (
        nbformat.read(path, as_version=4),
        nbformat.v4.new_code_cell,
        nbformat.v4.new_markdown_cell,
    )
    tagged = {"tags": ["example"]}
    nb.cells = [
        text("# A stage"),
        *nb.cells[:2],
        text("## Shown"),
        code("raise ValueError", metadata=tagged),
        text("### More of it"),
        code("raise ValueError", metadata=tagged),
        text("## Half of it is shown"),
        text("Shown first:"),
        code("raise ValueError", metadata=tagged),
        text("Then done:"),
        *nb.cells[2:],
        text("One more:"),
        code("raise ValueError", metadata=tagged),
        text("Not for a run", metadata=tagged),
        text("## Words alone"),
        text("Next: another"),
    ]
    nbformat.write(nb, path)
    chain.run_step(step, tmp_path / "run", notebooks)
    shown = nbformat.read(tmp_path / "run" / step.out / path.name, as_version=4)
    lines = [cell.source for cell in shown.cells if cell.cell_type == "markdown"]
    assert lines.pop(1).startswith(
        f"*This is the program of `{path.name}` as the chain runs it: 4 cells that demonstrate or check"
    )
    assert lines == ["# A stage", "## Half of it is shown", "Then done:", "## Words alone", "Next: another"]
    assert not any("ValueError" in cell.source for cell in shown.cells)


@pytest.mark.parametrize(
    "environment, n_devices, expected",
    [
        ({}, 0, {"OMP_WAIT_POLICY": "PASSIVE", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": "backend:native"}, 1, {}),
        (
            {"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"},
            2,
            {"CUDA_VISIBLE_DEVICES": "0"},
        ),
        (
            {"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": "x", "CUDA_VISIBLE_DEVICES": "2, 3"},
            2,
            {"CUDA_VISIBLE_DEVICES": "2"},
        ),
        (
            {"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": "x", "CUDA_VISIBLE_DEVICES": "GPU-5a,GPU-6b"},
            2,
            {"CUDA_VISIBLE_DEVICES": "GPU-5a"},
        ),
        ({"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": "x", "CUDA_VISIBLE_DEVICES": "1"}, 1, {}),
        ({"OMP_WAIT_POLICY": "ACTIVE", "PYTORCH_ALLOC_CONF": "x", "CUDA_VISIBLE_DEVICES": ""}, 0, {}),
    ],
)
def test_kernels_see_one_card_and_what_the_person_has_set(environment, n_devices, expected):
    assert chain.kernel_environment(environment, n_devices) == expected


def test_a_kernel_finds_that_environment_and_the_chain_keeps_its_own(tmp_path, notebooks, toy, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("CUDA_VISIBLE_DEVICES", *chain.ALLOCATOR_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    step, before = plan_run(toy)[4], dict(os.environ)
    write_notebook(
        notebooks,
        step.notebook,
        code="import os\nassert os.environ['CUDA_VISIBLE_DEVICES'] == '0'\n"
        "assert os.environ['PYTORCH_CUDA_ALLOC_CONF'] == 'expandable_segments:True'",
    )
    chain.run_step(step, tmp_path / "run", notebooks)
    assert dict(os.environ) == before


def test_a_terminal_shows_how_far_a_stage_is(tmp_path, notebooks, toy, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    step = plan_run(toy)[4]
    work = (
        "import time\nfrom rlaifv_nb.records import StageFolder\nstage = StageFolder(out + '/part', "
        "'sampling', {})\n"
        "stage.map('responses', range(4), lambda batch: (time.sleep(1) or [], []), 1)"
    )
    write_notebook(notebooks, step.notebook, code=work)
    chain.run_step(step, tmp_path / "run", notebooks)
    lines = capsys.readouterr().out.replace("\x1b[K", "").split("\r")
    assert any(line.endswith("sampling: responses 2/4") for line in lines), lines
    assert lines[-1].endswith("  1 rows\n") and lines[-1].startswith(step.out)


def test_while_a_model_is_trained_the_last_checkpoint_is_shown(tmp_path):
    progress = chain.Progress(tmp_path)
    progress.write("Loading weights: 100%|██████████| 291/291 [00:01<00:00, 250.00it/s]")
    assert progress.text() == "Loading weights 291/291"
    for n in (90, 100):
        (tmp_path / f"checkpoints/checkpoint-{n}").mkdir(parents=True)
    assert progress.text() == "checkpoint after step 100"


def test_a_notebook_without_manifest_is_a_failure(tmp_path, notebooks, toy):
    step = plan_run(toy)[4]
    write_notebook(notebooks, step.notebook, code="pass")
    path = notebooks / f"{step.notebook}.ipynb"
    path.write_text(path.read_text().replace("manifest.json", "other.json"))
    with pytest.raises(StepError, match="ended without a manifest.json"):
        chain.run_step(step, tmp_path / "run", notebooks)


def test_prompt_files_of_a_recipe_stand_beside_it(tmp_path, monkeypatch):
    (tmp_path / "facts.txt").write_text("{question} {response}")
    recipe = {
        "extends": "tiny",
        "name": "own",
        "parameters": {
            "02_claims": {"facts_prompt": "./facts.txt", "question_prompt": "packaged:prompts/question.txt"}
        },
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    found = load_recipe(tmp_path / "own.yaml")
    assert found.parameters["02_claims"] == {
        "facts_prompt": str(tmp_path / "facts.txt"),
        "question_prompt": "packaged:prompts/question.txt",
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(recipes.recipe_text(found, tmp_path / "run"))
    assert (
        str(tmp_path) not in (tmp_path / "run/recipe.yaml").read_text()
        and load_recipe(tmp_path / "run/recipe.yaml") == found
    )
    monkeypatch.chdir(tmp_path)
    assert load_recipe("tiny", {"parameters": {"02_claims": {"facts_prompt": "./facts.txt"}}}).parameters[
        "02_claims"
    ]["facts_prompt"] == str(tmp_path / "facts.txt")
    with pytest.raises(
        RecipeError, match="parameters.02_claims.question_prompt: there is no file .*nothing.txt"
    ):
        load_recipe("tiny", {"parameters": {"02_claims": {"question_prompt": "./nothing.txt"}}})


# notebooks and library


def test_check_library_compares_cell_by_cell(tmp_path):
    library, nbs = tmp_path / "rlaifv_nb", tmp_path / "nbs"
    library.mkdir(), nbs.mkdir()
    cell = nbformat.v4.new_code_cell
    cells = [
        cell("#| default_exp part"),
        cell("#| export\nfrom rlaifv_nb import records\nfrom rlaifv_nb.records import Prompt"),
        cell("#| export\ndef f():\n    from rlaifv_nb.engine.models import g\n    return 1"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), nbs / "00_part.ipynb")
    good = (
        "# AUTOGENERATED\n\n# %% auto #0\n__all__ = ['f']\n\n# %% ../nbs/00_part.ipynb #a\nfrom . import "
        "records\nfrom .records import Prompt\n\n"
        "# %% ../nbs/00_part.ipynb #b\ndef f():\n    from rlaifv_nb.engine.models import g\n    return 1\n"
    )
    (library / "part.py").write_text(good)
    check_library(nbs, library)
    for bad in (
        good.replace("return 1", "return 2"),
        good + "\n# %% ../nbs/00_part.ipynb #c\nextra = 1\n",
        "",
    ):
        (library / "part.py").write_text(bad)
        with pytest.raises(RecipeError, match="not what the notebooks export: 00_part.ipynb"):
            check_library(nbs, library)
    (library / "part.py").unlink()
    with pytest.raises(RecipeError, match="00_part.ipynb"):
        check_library(nbs, library)


# the command


@pytest.fixture
def command(monkeypatch, notebooks, tmp_path, executed):
    """The command with stand-in notebooks, in an empty folder, with recipes for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        command_line, "package_folder", lambda name: {"nbs": notebooks}.get(name) or package_folder(name)
    )
    small = {"prompts": {"n_per_round": 2, "n_dev": 1}, "evaluate": [], "rounds": 1, "extends": "bare.yaml"}
    bare = yaml.safe_load((ROOT / "data" / "recipes" / "tiny.yaml").read_text()) | {"parameters": {}}
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(bare))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small | {"name": "small"}))
    variants = {"one": {}, "two": {"parameters": {"04_pairs": {"scale": 3.0}}}}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(small | {"name": "both", "variants": variants}))
    return executed


def test_run_writes_a_run_and_its_report(command, capsys):
    assert main(["run", "small.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 8 and "report: runs/small/report.html" in out
    assert "round 1 of 1 has ended: 1 pairs, the policy's adapter in round_1/05_dpo/adapter" in out
    assert "Not there yet" in Path("runs/small/report.html").read_text()
    assert main(["run", "small.yaml"]) == 0 and capsys.readouterr().out.count("kept") == 6
    assert (
        main(["run", "runs/small/recipe.yaml", "--out", "runs/small"]) == 0
        and capsys.readouterr().out.count("kept") == 6
    )


def test_run_takes_settings_and_remakes(command, capsys):
    assert (
        main(
            [
                "run",
                "small.yaml",
                "--out",
                "x",
                "--set",
                "04_pairs.scale=2",
                "--set",
                "04_pairs.name=b",
                "--seed",
                "3",
            ]
        )
        == 0
    )
    recipe = yaml.safe_load(Path("x/recipe.yaml").read_text())
    assert recipe["parameters"] == {"04_pairs": {"scale": 2.0, "name": "b"}} and recipe["seed"] == 3
    command.clear()
    assert main(["run", "x/recipe.yaml", "--out", "x", "--from", "05_dpo"]) == 0 and command.made == [
        "round_1/05_dpo"
    ]
    assert main(["run", "x/recipe.yaml", "--out", "x", "--set", "05_dpo.scale=7e-1"]) == 2
    assert "scale: None -> 0.7" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, says",
    [
        ([], "required"),
        (["rnu"], "invalid choice"),
        (["run"], "recipe"),
        (["run", "tinny"], "did you mean tiny"),
        (["run", "no.yaml"], "no recipe file"),
        (["run", "small.yaml", "--ot", "x"], "unrecognized arguments: --ot"),
        (["run", "small.yaml", "--rounds", "two"], "--rounds"),
        (["run", "small.yaml", "--set", "05_dpo.scael=1"], "did you mean scale"),
        (["run", "small.yaml", "--set", "scale=1"], "NOTEBOOK.PARAMETER=VALUE"),
        (["run", "small.yaml", "--round", "1"], "give both"),
        (["run", "small.yaml", "--from", "05"], "unknown '05'"),
        (["run", "small.yaml", "--out", "a,b"], "cannot have a comma"),
        (["run", "both.yaml", "--from", "05_dpo"], "--from works on one run"),
        (["report", "nowhere"], "is no run folder"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(command, capsys, argv, says):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert says in err and err.startswith("rlaifv: ") and err.count("\n") == 1


def test_interrupt_says_how_to_resume(command, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(chain, "execute_notebook", interrupted)
    assert main(["run", "small.yaml"]) == 130
    assert "resumes from here" in capsys.readouterr().err


def test_variants_run_side_by_side_and_are_compared(command, capsys):
    assert main(["run", "both.yaml"]) == 0
    assert command.made == [f"round_1/{s}" for s in ROUND_STAGES] * 2
    assert json.loads(Path("runs/both/variants.json").read_text()) == ["one", "two"]
    for value, name in ((10.0, "one"), (20.0, "two")):
        scores = [
            Score(m, "response", v, 5, v - 1, v + 1, "p-1") for m, v in (("base", 40.0), ("round_1", value))
        ]
        write_table(f"runs/both/{name}/06_evaluation", "scores", scores)
    assert main(["report", "runs/both"]) == 0
    page = Path("runs/both/report.html").read_text()
    assert (
        "before <b class=num>40.0%" in page
        and "one <b class=num>10.0%</b>, two <b class=num>20.0%" in page
        and 'href="one/report.html"' in page
    )


def test_help_version_and_recipes(capsys):
    for argv, says in (
        (["--help"], "rlaifv run tiny"),
        (["--version"], "rlaifv_nb "),
        (["run", "--help"], "--set NOTEBOOK.PARAMETER=VALUE"),
    ):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 0 and says in capsys.readouterr().out
    assert main(["recipes"]) == 0
    assert all(name in capsys.readouterr().out or name for name in recipes.packaged_recipes())


def test_help_and_recipes_load_nothing_heavy():
    code = (
        "import sys\nfrom rlaifv_nb.runner.command import main\nmain(['recipes'])\n"
        "assert not {'torch', 'transformers', 'papermill', 'matplotlib', 'nbformat', 'PIL'} & "
        "set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


# the report


def test_report_of_an_empty_run_says_what_is_missing(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: empty\ndescription: <nothing>\nrounds: 1\n")
    page = report.write_report(tmp_path).read_text()
    assert page.count("Not there yet") == 8 and str(tmp_path) not in page and "&lt;nothing&gt;" in page


def test_report_shows_pictures_of_other_prompts_without_truth(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: other\ndescription: d\nrounds: 1\n")
    (tmp_path / "prompts").mkdir()
    Image.new("RGB", (900, 400), "red").save(tmp_path / "prompts" / "a.jpg")
    write_table(tmp_path / "prompts", "prompts", [Prompt("p", "a.jpg", "sha", "What?", "mine")])
    here = tmp_path / "round_1"
    write_table(here / "01_sampling", "responses", [Response("p-00", "p", 0, 0, "A <b>cat</b>.", "stop")])
    write_table(
        here / "02_claims", "claims", [Claim("p-00-00", "p-00", "There is a cat.", "Is there a cat?")]
    )
    write_table(here / "03_feedback", "verdicts", [Verdict("p-00-00", 0.1, 0.9, "no")])
    page = report.write_report(tmp_path).read_text()
    assert (
        'class="unknown rejected"' in page
        and "✗ There is a cat." in page
        and "A &lt;b&gt;cat&lt;/b&gt;." in page
    )
    assert (
        "claims of unknown truth" in page
        and "The labeler was right" not in page
        and "data:image/webp" in page
    )
