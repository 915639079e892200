"""The order of the house: who may import whom, in which order notebooks are read, and where nothing else may
be.

Imports inside functions count, too: what runs later leans on its module all the same.
"""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import check_notebooks
import measure_house
import next_lines
import pytest

import rlaifv_nb

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
LIBRARY = ROOT / "rlaifv_nb"

# From the ground up: a module imports from its own level (see `test_inside_a_wing`) and from those below.
# iconworld/03_training is a workshop and not a part of the ground: it makes the packaged models with the
# engine and the stages, measures them with 06, and nothing imports it. 06 reads pictures of your own, which
# is what exchange/01_inputs is for.
LEVELS = (
    ("records",),
    ("engine",),
    ("show",),
    ("iconworld.world", "iconworld.miniature"),
    ("sampling", "claims", "feedback", "pairs", "reward_pairs", "dpo"),
    ("benchmarks",),
    ("exchange",),
    ("evaluation", "guided_decoding"),
    ("iconworld.training",),
    ("runner",),
)

# Imports that go up for now, each with the reason. An entry that is no longer needed must be deleted.
UPWARD = {}


@pytest.fixture(scope="module")
def graph():
    "Module -> modules that it imports, at its top or inside a function."
    return measure_house.import_graph(ROOT)


def level_of(module):
    "The level of a module, by its own name or its wing's."
    wing = module.rpartition(".")[0]
    found = [k for k, names in enumerate(LEVELS) if module in names or wing in names]
    assert len(found) == 1, f"{module}: give it one place in LEVELS"
    return found[0]


def paths_of_modules():
    "Module -> its notebook, relative to `nbs`."
    found = {}
    for path in NOTEBOOKS:
        text = "\n".join("".join(cell["source"]) for cell in next_lines.read_cells(path))
        if target := re.search(r"^#\|\s*default_exp\s+(\S+)", text, re.MULTILINE):
            found[target[1]] = path.relative_to(ROOT / "nbs")
    return found


def test_imports_go_down(graph):
    upward = {(a, b) for a, found in graph.items() for b in found if level_of(a) < level_of(b)}
    assert upward - set(UPWARD) == set(), "import from a lower level, or move what is needed down"
    assert set(UPWARD) - upward == set(), "no longer needed: delete from UPWARD"


def test_inside_a_wing_imports_go_to_lower_numbers(graph):
    place = paths_of_modules()
    assert set(place) == set(graph)
    wrong = [
        f"{place[a]} imports from {place[b]}"
        for a, found in graph.items()
        for b in sorted(found)
        if place[a].parent == place[b].parent and place[b] >= place[a] and (a, b) not in UPWARD
    ]
    assert wrong == []


def test_no_circle(graph):
    assert measure_house.circles(graph) == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("import torch\nfrom ..records import Prompt", {"records"}),
        ("from .models import open_vlm", {"engine.models"}),
        ("from rlaifv_nb.engine import models as m", {"engine.models"}),
        ("import rlaifv_nb.records", {"records"}),
        ("def f():\n    from rlaifv_nb.engine.models import open_vlm", {"engine.models"}),
        ("from records import Prompt", set()),
    ],
)
def test_every_form_of_import_is_seen(source, found):
    modules = {"records": "", "engine.models": "", "engine.prefix": source}
    assert measure_house.imports_of("engine.prefix", source, modules, "rlaifv_nb") == found


def test_circles_and_floors_of_a_graph():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert measure_house.circles(graph) == [["b", "c"]]
    assert measure_house.floors(graph) == 3


def test_every_notebook_leads_to_the_next():
    order = next_lines.reading_order()
    assert set(order) == set(NOTEBOOKS)
    for path, after in zip(order, order[1:]):
        leads_to = [found.relative_to(ROOT).as_posix() for found in next_lines.next_of(path)]
        assert after.relative_to(ROOT).as_posix() in leads_to, f"{path}: python scripts/next_lines.py"


def test_next_lines_are_written(tmp_path):
    notebooks = tmp_path / "nbs"
    (notebooks / "engine").mkdir(parents=True)
    text = (
        '{{"cells": [{{"cell_type": "markdown", "id": "a", "source": ["# {0}\\n", "\\n", "> About {0}."]}}]}}'
    )
    paths = [notebooks / name for name in ("index.ipynb", "00_records.ipynb", "engine/01_pictures.ipynb")]
    for path in paths:
        path.write_text(text.format(path.stem))
    assert next_lines.reading_order(tmp_path) == paths
    for path, after in next_lines.wrong_lines(tmp_path).items():
        next_lines.write_line(path, after, tmp_path)
    assert next_lines.wrong_lines(tmp_path) == {}
    last = next_lines.read_cells(paths[1])[-1]["source"]
    assert last == ["Next: [engine/01_pictures](engine/01_pictures.ipynb). About 01_pictures."]


def test_only_notebooks_below_nbs():
    assert check_notebooks.left_over_files() == []


def test_a_file_beside_notebooks_is_found(tmp_path):
    (tmp_path / "nbs/x").mkdir(parents=True)
    (tmp_path / "nbs/x/started.json").write_text("{}")
    (tmp_path / "nbs/00_records.ipynb").write_text("{}")
    assert check_notebooks.left_over_files(tmp_path) == ["nbs/x/started.json"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix())
def test_a_notebook_begins_with_title_and_sentence(path):
    cells = next_lines.read_cells(path)
    assert re.fullmatch(r"# .+\n\n> .+", "".join(cells[0]["source"])), (
        "the first cell is `# Title` and `> sentence`"
    )


def test_a_module_says_what_its_notebook_says():
    for module, path in paths_of_modules().items():
        source = (LIBRARY / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(source)) == next_lines.subtitle(ROOT / "nbs" / path), module


def test_the_package_shows_what_a_builder_needs():
    names = [name for name in rlaifv_nb.__all__ if name != "__version__"]
    assert 20 <= len(names) <= 30
    for name in names:
        assert f"`{name}`" in rlaifv_nb.__doc__ and name in dir(rlaifv_nb)
        assert getattr(rlaifv_nb, name).__name__ == name
    misspelt = "open_vml"
    with pytest.raises(AttributeError, match="has no attribute 'open_vml'"):
        getattr(rlaifv_nb, misspelt)


def test_importing_the_package_loads_nothing_heavy():
    code = """import sys, rlaifv_nb
heavy = {"torch", "transformers", "datasets", "numpy", "PIL"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from rlaifv_nb import Prompt, load_recipe
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from rlaifv_nb import open_vlm
assert "torch" in sys.modules and open_vlm.__module__ == "rlaifv_nb.engine.models"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_runs_as_a_module():
    def said(*command):
        return subprocess.run(
            [*command, "recipes"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout

    as_module = said(sys.executable, "-m", "rlaifv_nb.runner.command")
    script = "from rlaifv_nb.runner.command import main; raise SystemExit(main())"
    assert as_module == said(sys.executable, "-c", script) and "tiny" in as_module
    wrong = subprocess.run(
        [sys.executable, "-m", "rlaifv_nb.runner.command", "run", "tinny"], capture_output=True, text=True
    )
    assert (
        wrong.returncode == 2 and wrong.stderr.startswith("rlaifv: ") and "did you mean tiny" in wrong.stderr
    )


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("with the name to look for:")[2].partition("Wings import downwards")[0]
    named = re.findall(r"`((?:[a-z_]+\.)+[A-Za-z_]+)`", section)
    assert len(named) >= 15
    for name in named:
        module, _, attribute = name.rpartition(".")
        if not hasattr(importlib.import_module(f"rlaifv_nb.{module}"), attribute):
            importlib.import_module(f"rlaifv_nb.{name}")
