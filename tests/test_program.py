"""Every stage notebook as the chain runs it and as a person runs it, with models other than the packaged
ones.

Qwen2.5-VL has no `<image>` in its vocabulary, LLaVA-1.5 has its published chat template; both are tiny and
have been taught a few captions, so that there are claims and pairs. A cell at the top of every notebook
counts how many models are open at once that are not packaged: never two.
"""

import ast
import builtins
import json
import re
import shutil
import symtable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import nbformat
import papermill
import pytest
from nbdev.clean import nbdev_clean
from PIL import Image
from published_models import PUBLISHED, build_published
from test_architectures import teach, write_prompts

from rlaifv_nb.engine.models import OpenModel, sharing_of
from rlaifv_nb.records import Claim, Prompt, Response, package_folder, read_manifest, write_table
from rlaifv_nb.runner import chain
from rlaifv_nb.runner.chain import (
    heading_level,
    is_example,
    is_run_cell,
    kernel_settings,
    program_of,
    run_chain,
)
from rlaifv_nb.runner.recipes import (
    EXPORT,
    STAGES,
    Step,
    chain_parameters,
    load_recipe,
    open_notebook,
)

TESTS, NOTEBOOKS = Path(__file__).resolve().parent, package_folder("nbs")
COUNTED = """import sys
sys.path.insert(0, {tests!r})
import counted_models
import published_models
counted_models.count_models({log!r})"""
PARAMETERS = {
    "01_sampling": {"n_samples": 6, "max_new_tokens": 24},
    "02_claims": {"max_new_tokens": 64},
    "03_feedback": {},
    "04_pairs": {"length_balance": False},
    "05_dpo": {
        "batch_size": 2,
        "min_steps": 1,
        "evaluations": 1,
        "epochs": 1.0,
        "lora_rank": 2,
        "lora_alpha": 4,
    },
    "06_evaluation": {"n_scenes": 2, "max_new_tokens": 16},
    "07_guided_decoding": {"n_candidates": 2, "n_scenes": 2, "max_new_tokens": 8},
    "04_reward_pairs": {"length_balance": False},
}


def counted_notebooks(folder, log):
    "The stage notebooks with the counting cell at their top."
    folder.mkdir(parents=True)
    for path in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(path, folder)
    for stage in STAGES:
        nb = nbformat.read(folder / f"{stage}.ipynb", as_version=4)
        nb.cells.insert(1, nbformat.v4.new_code_cell(COUNTED.format(tests=str(TESTS), log=str(log))))
        nbformat.write(nb, folder / f"{stage}.ipynb")
    return folder


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A function from a name to a folder with that model, taught, a splitter that is not packaged, prompts,
    and the notebooks with their counting cells."""
    made = {}

    def teach_one(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model, processor = build_published(name)
            teach(OpenModel(model, processor, name, name, "none", sharing_of(model, True)))
            for part in (model, processor):
                part.save_pretrained(folder / "model")
            shutil.copytree(package_folder("data") / "iconworld-splitter", folder / "splitter")
            write_prompts(folder)
            counted_notebooks(folder / "nbs", folder / "opened.jsonl")
            made[name] = folder
        return made[name]

    return teach_one


def recipe_for(folder, evaluate):
    "One round with the models of a folder, its own prompts, and all that may follow."
    recipe = replace(
        load_recipe("tiny"),
        policy=str(folder / "model"),
        splitter=str(folder / "splitter"),
        labeler="base",
        rounds=1,
        evaluate=evaluate,
    )
    return replace(
        recipe,
        prompts={"source": str(folder / "prompts"), "n_per_round": 4},
        parameters={k: PARAMETERS[k] for k in PARAMETERS if k != "04_reward_pairs"},
    )


def reward_steps(recipe):
    "The two steps by which the reward judges, as in a second round, on the answers of the first."
    second = replace(recipe, rounds=2, feedback=["claims", "reward"])
    steps = []
    for stage in ("07_guided_decoding", "04_reward_pairs"):
        parameters = {**PARAMETERS[stage], **chain_parameters(second, stage, 2)}
        steps.append(Step(2, stage, parameters, f"round_2/{stage}"))
    return steps


@pytest.fixture(scope="module")
def ran(taught):
    "A function from a name to the run of all eight stage notebooks as programs with that model."
    made = {}

    def run_one(name):
        if name not in made:
            folder = taught(name)
            recipe, run = recipe_for(folder, ["06_evaluation", "07_guided_decoding"]), folder / "run"
            run_chain(recipe, run, folder / "nbs")
            shutil.copytree(run / "round_1/01_sampling", run / "round_2/01_sampling")
            for step in reward_steps(recipe):
                chain.run_step(step, run, folder / "nbs")
            made[name] = run
        return made[name]

    return run_one


def steps_of(run):
    "The step.json of all steps of a run but the prompts, by folder."
    return {
        path.parent.relative_to(run).as_posix(): json.loads(path.read_text())
        for path in run.glob("*/*/step.json")
    } | {path.parent.name: json.loads(path.read_text()) for path in run.glob("0*/step.json")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_stage_notebook_runs_as_a_program(name, ran):
    run = ran(name)
    steps = steps_of(run)
    assert {folder.rpartition("/")[2] for folder in steps} == set(STAGES)
    for folder, step in steps.items():
        assert step["finished"] and "failed_check" not in step, (folder, step.get("failed_check"))
        shown = nbformat.read(run / folder / f"{step['stage']}.ipynb", as_version=4)
        assert "This is the program of" in "".join(cell.source for cell in shown.cells[:2]) and not any(
            map(is_example, shown.cells)
        )
    assert (
        read_manifest(run / "round_1/04_pairs")["rows_out"] > 1
        and (run / "round_1/05_dpo/adapter/adapter_config.json").is_file()
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_at_most_one_large_model_is_open_at_a_time_in_a_program(name, ran):
    run = ran(name)
    opened = [json.loads(line) for line in (run.parent / "opened.jsonl").read_text().splitlines()]
    assert len(opened) >= 7 and all(row["large"] for row in opened), (
        "a program opens the recipe's models and no others"
    )
    assert max(row["alive"] for row in opened) == 1


def parameters_of(step, run, out):
    "A step's parameters as papermill gives them to a notebook that writes into `out`."
    return chain.papermill_parameters(step, run) | {"out": str(out)}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_notebook_runs_as_a_whole(stage, ran, tmp_path):
    run = ran("qwen25_vl")
    recipe = recipe_for(run.parent, ["06_evaluation"])
    steps = {s.notebook: s for s in [*chain.plan_run(recipe), *reward_steps(recipe)]}
    notebook, log = run.parent / "nbs" / f"{stage}.ipynb", tmp_path / "opened.jsonl"
    nb = open_notebook(notebook)
    nb.cells[1].source = COUNTED.format(tests=str(TESTS), log=str(log))
    with chain.environment_for_kernels():
        papermill.execute_notebook(
            nb,
            str(tmp_path / notebook.name),
            parameters_of(steps[stage], run, tmp_path / "out"),
            cwd=str(tmp_path),
            progress_bar=False,
            **kernel_settings(),
        )
    opened = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    assert max([row["alive"] for row in opened], default=0) <= 1
    assert (tmp_path / "out" / "manifest.json").exists()


# what the notebooks look like


@pytest.fixture(scope="module", params=STAGES)
def notebook(request):
    return request.param, open_notebook(NOTEBOOKS / f"{request.param}.ipynb")


def calls_in(cell):
    "Names of the functions that a cell calls."
    return {
        node.func.id
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def free_cells(nb):
    "The code cells that are not exported."
    return [
        cell
        for cell in nb.cells
        if cell.cell_type == "code" and not EXPORT.search(cell.source) and not cell.source.startswith("#|")
    ]


def test_only_the_run_cell_opens_a_model_or_runs_a_stage(notebook):
    stage, nb = notebook
    cells = [cell for cell in free_cells(nb) if not is_example(cell)]
    opening = [
        cell for cell in cells if any(re.match("open_(vlm|llm)|run_", name) for name in calls_in(cell))
    ]
    assert [cell.id for cell in opening] == [cell.id for cell in cells if is_run_cell(cell)] and len(
        opening
    ) == 1, stage


def test_examples_open_the_packaged_models_alone_and_let_them_go(notebook):
    stage, nb = notebook
    held, program = set(), {"vlm", "llm"}
    for cell in filter(is_example, free_cells(nb)):
        for node in ast.walk(ast.parse(cell.source)):
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Call)
                and getattr(node.value.func, "id", "") in ("open_vlm", "open_llm")
            ):
                assert all(
                    isinstance(a, ast.Constant) and a.value.startswith("packaged:") for a in node.value.args
                ), ast.unparse(node)
                held |= {target.id for target in node.targets}
            if isinstance(node, ast.Delete):
                held -= {target.id for target in node.targets}
    assert not held and not any(
        name in ast.unparse(ast.parse(c.source)).split()
        for c in filter(is_example, free_cells(nb))
        for name in program
    ), (stage, held)


def names_of(cell):
    "The global names that a cell binds, and those that it reads (in functions and comprehensions, too)."
    bound, read, tables = set(), set(), [symtable.symtable(cell.source, cell.id, "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        for symbol in table.get_symbols():
            at_top = table.get_type() == "module"
            if at_top and symbol.is_assigned() and not symbol.is_imported():
                bound.add(symbol.get_name())
            if symbol.is_referenced() and (at_top or symbol.is_global()):
                read.add(symbol.get_name())
    return bound, read


def test_examples_change_nothing_that_the_program_reads_later(notebook):
    stage, nb = notebook
    program, examples = {}, {}
    for cell in nb.cells:
        if cell.cell_type == "markdown" or cell.source.startswith("#| default_exp"):
            continue
        bound, read = names_of(cell)
        if is_example(cell):
            examples |= dict.fromkeys(bound & program.keys(), cell.id)
            continue
        clash = {name: examples[name] for name in (read - bound) & examples.keys()}
        assert not clash, f"{stage}: cell {cell.id} reads what an example has rebound: {clash}"
        program |= dict.fromkeys(bound)
        examples = {name: by for name, by in examples.items() if name not in bound}


def first_reads(cell):
    """The global names that a cell binds (imports, too), and those that it reads while it runs, not in
    functions."""
    bound, read, tables = set(), set(), [symtable.symtable(cell.source, cell.id, "exec")]
    while tables:
        table = tables.pop()
        at_top = table.get_type() == "module"
        tables += [
            t for t in table.get_children() if t.get_name() in ("listcomp", "setcomp", "dictcomp", "genexpr")
        ]
        for symbol in table.get_symbols():
            if at_top and (symbol.is_assigned() or symbol.is_imported()):
                bound.add(symbol.get_name())
            elif symbol.is_referenced() and (at_top or symbol.is_global()):
                read.add(symbol.get_name())
    return bound, read


@pytest.mark.parametrize("whole", [True, False])
def test_no_cell_reads_a_name_before_another_has_bound_it(notebook, whole):
    stage, nb = notebook
    cells = nb.cells if whole else program_of(nb, stage).cells
    known = set(dir(builtins))
    for cell in cells:
        if cell.cell_type == "markdown" or cell.source.startswith("#| default_exp"):
            continue
        bound, read = first_reads(cell)
        assert not read - known - bound, (stage, cell.id, read - known - bound)
        known |= bound


def test_what_is_exported_or_a_parameter_is_never_an_example(notebook):
    stage, nb = notebook
    for cell in filter(is_example, nb.cells):
        assert not EXPORT.search(cell.source) and "parameters" not in cell.metadata["tags"], (stage, cell.id)


def test_a_program_has_no_heading_without_a_word_or_a_cell_below(notebook):
    stage, nb = notebook
    cells = program_of(nb, f"{stage}.ipynb").cells
    for i, cell in enumerate(cells):
        following = cells[i + 1] if i + 1 < len(cells) else None
        if 0 < heading_level(cell) and cell.source.count("\n") == 0:
            assert following is not None and not 0 < heading_level(following) <= heading_level(cell), (
                stage,
                cell.source,
            )


def marks_of(path):
    "Id, tags and source of all cells."
    return [
        (c["id"], c["metadata"].get("tags"), "".join(c["source"]))
        for c in json.loads(path.read_text())["cells"]
    ]


def test_tags_and_exports_survive_cleaning(tmp_path):
    root = TESTS.parent
    shutil.copy(root / "pyproject.toml", tmp_path)
    shutil.copytree(root / "rlaifv_nb", tmp_path / "rlaifv_nb", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "nbs").mkdir()
    for stage in STAGES:
        nb = json.loads((NOTEBOOKS / f"{stage}.ipynb").read_text())
        for cell in nb["cells"]:
            cell["metadata"]["collapsed"] = True
        (tmp_path / "nbs" / f"{stage}.ipynb").write_text(json.dumps(nb))
    with chdir(tmp_path):
        nbdev_clean()
    for stage in STAGES:
        marks = marks_of(tmp_path / "nbs" / f"{stage}.ipynb")
        assert (
            marks == marks_of(NOTEBOOKS / f"{stage}.ipynb")
            and "collapsed" not in (tmp_path / "nbs" / f"{stage}.ipynb").read_text()
        )
        assert any(tags == ["example"] for _, tags, _ in marks) and any(
            "#| export" in source for _, _, source in marks
        )


# tables that are empty, or short


def run_cells(stage, **parameters):
    "Executes the program of a stage notebook in this process, with other parameters; returns its names."
    namespace = {"__name__": "__main__"}
    for cell in program_of(open_notebook(NOTEBOOKS / f"{stage}.ipynb"), stage).cells:
        if cell.cell_type == "code" and not cell.source.startswith("#| default_exp"):
            exec(compile(cell.source, f"{stage}, cell {cell.id}", "exec"), namespace)
            if "parameters" in cell.metadata.get("tags", []):
                namespace |= parameters
    return namespace


@pytest.fixture
def tables(tmp_path, monkeypatch):
    "Prompts of two photographs, one unreadable, and a function that writes answers and claims about them."
    import matplotlib

    matplotlib.use("Agg")
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    Image.effect_noise((640, 480), 60).convert("RGB").save(prompts / "a.jpg")
    (prompts / "b.jpg").write_bytes(b"no picture")
    write_table(
        prompts,
        "prompts",
        [
            Prompt("a" * 12, "a.jpg", "", "What is this?", "mine", "train"),
            Prompt("b" * 12, "b.jpg", "", "What is this?", "mine", "dev"),
        ],
    )

    def write(stage, rows):
        write_table(tmp_path / stage, {"01": "responses", "02": "claims"}[stage], rows)
        return str(tmp_path / stage)

    return str(prompts), write, str(tmp_path / "out")


def response(prompt_id, text="A <b>red</b> cat."):
    return Response(f"{prompt_id}-00", prompt_id, 0, 0, text, "stop")


def claim(prompt_id, text="There is a <b>cat</b>.", k=0):
    return Claim(f"{prompt_id}-00-{k:02d}", f"{prompt_id}-00", text, "Is there a cat?")


def test_sampling_with_one_answer_and_a_picture_that_cannot_be_read(tables):
    prompts, _, out = tables
    found = run_cells("01_sampling", prompts=prompts, out=out, n_samples=1, max_new_tokens=4)
    assert len(found["responses"]) == 1 and read_manifest(out)["set_aside"] == {"unreadable picture": 1}


def test_sampling_where_no_picture_can_be_read(tables):
    prompts, _, out = tables
    found = run_cells("01_sampling", prompts=prompts, out=out, first_prompt=1, n_samples=2, max_new_tokens=4)
    assert found["responses"] == [] and read_manifest(out)["rows_out"] == 0


def test_splitting_when_one_answer_of_two_gives_claims(tables):
    prompts, write, out = tables
    responses = write(
        "01",
        [
            response("a" * 12, ""),
            response("b" * 12, "Two red cats are in the top left. It is a lovely picture."),
        ],
    )
    found = run_cells("02_claims", prompts=prompts, responses=responses, out=out, max_new_tokens=64)
    assert {c.response_id for c in found["claims"]} == {"b" * 12 + "-00"} and read_manifest(out)[
        "rows_in"
    ] == 2


@pytest.mark.parametrize("of_prompts", [(), ("a" * 12,), ("a" * 12, "b" * 12)])
def test_judging_no_claims_and_claims_that_are_set_aside(tables, of_prompts, capsys):
    prompts, write, out = tables
    responses = write("01", [response(p) for p in ("a" * 12, "b" * 12)])
    claims = write("02", [claim(p) for p in of_prompts])
    found = run_cells("03_feedback", prompts=prompts, responses=responses, claims=claims, out=out)
    assert len(found["verdicts"]) == len([p for p in of_prompts if p[0] == "a"])
    if of_prompts:
        html = found["claim_spans"]([claim("a" * 12), claim("b" * 12)])
        assert html.count("&lt;b&gt;cat&lt;/b&gt;") == 2 and "background:#ffffff" in html


def test_a_labeler_that_gives_nothing_to_yes_and_no(tables, monkeypatch):
    prompts, write, out = tables
    responses, claims = write("01", [response("a" * 12)]), write("02", [claim("a" * 12)])
    monkeypatch.setattr(
        "rlaifv_nb.engine.prefix.next_token_sums",
        lambda vlm, prefix, index, branches, words, *more, **options: [zeros(index) for _ in words],
    )
    found = run_cells("03_feedback", prompts=prompts, responses=responses, claims=claims, out=out)
    (verdict,) = found["verdicts"]
    assert (verdict.p_yes, verdict.p_no, verdict.label) == (0.0, 0.0, "abstain")


def zeros(index):
    import torch

    return torch.zeros(len(index))


def test_pairs_whose_scores_are_shares_can_be_drawn_and_shown(tables, monkeypatch):
    from rlaifv_nb.records import Pair

    nb = open_notebook(NOTEBOOKS / "04_pairs.ipynb")
    (chart,) = [cell for cell in free_cells(nb) if "score of chosen minus score of rejected" in cell.source]
    from collections import Counter

    import matplotlib.pyplot as plt

    for scores in ([], [(0.9, 0.4), (0.75, 0.7)], [(0.0, -2.0)]):
        pairs = [Pair(f"{k}", "p", "r", "s", "one", "two", good, bad) for k, (good, bad) in enumerate(scores)]
        exec(chart.source, {"pairs": pairs, "plt": plt, "Counter": Counter})
    plt.close("all")


def test_guided_decoding_of_photographs_draws_no_curve(tables):
    prompts, _, out = tables
    found = run_cells("07_guided_decoding", prompts=prompts, out=out, n_candidates=2, max_new_tokens=4)
    assert (
        not found["icon_world"]
        and not list(Path(out).glob("curve-*"))
        and read_manifest(out)["set_aside"] == {"unreadable picture": 4}
    )
