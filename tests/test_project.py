"""The project agrees with itself: metadata, notebooks, README, recipes and what a pip install gets."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from configparser import ConfigParser
from contextlib import chdir
from pathlib import Path
from zipfile import ZipFile

import check_notebooks
import nbformat
import pytest
import readme
import yaml
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export

import rlaifv_nb

ROOT = Path(__file__).resolve().parent.parent
# The top of paths that mean something on one machine only.
PRIVATE_PATH = re.compile(rb"(?<![\w.~-])/(?:home|root|Users|work|workspace)/[\w.-]")


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


@pytest.fixture(scope="module")
def tracked():
    """Files that git has or would add, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return sorted({name for name in listing.split("\0") if (ROOT / name).is_file()})


def test_version_is_the_one_in_settings():
    assert rlaifv_nb.__version__ == settings()["version"]


def test_pyproject_repeats_settings():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == settings()["lib_name"]
    assert project["requires-python"] == f">={settings()['min_python']}"


def test_constraints_pin_every_requirement():
    pins = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    wanted = "\n".join(settings()[f"{kind}requirements"] for kind in ("", "dev_"))
    names = [re.split(r"[\[<>=~!]", row.strip())[0].lower().replace("_", "-") for row in wanted.split()]
    assert [name for name in names if name not in pins] == []
    assert [pin for pin in pins.values() if "+" in pin] == [], "a local version resolves on one machine only"


@pytest.mark.parametrize(
    "line, private",
    [
        (b"see /home/me/runs", True),
        (b'"/root/x"', True),
        (b"(/Users/me/x)", True),
        (b"in /workspace/x", True),
        (b"nbs/root/x", False),
        (b"https://a.example/home/x", False),
        (b"~/root/x", False),
        (b"../root/x", False),
    ],
)
def test_private_path_pattern(line, private):
    assert bool(PRIVATE_PATH.search(line)) == private


def test_no_file_names_a_private_path(tracked):
    here = Path(__file__).resolve().relative_to(ROOT).as_posix()  # holds the examples above
    texts = {name: (ROOT / name).read_bytes() for name in tracked if name != here}
    found = {
        name: PRIVATE_PATH.search(text) or re.search(re.escape(bytes(ROOT)), text)
        for name, text in texts.items()
    }
    assert {name: match.group() for name, match in found.items() if match} == {}


@pytest.mark.parametrize("check", [["format", "--check"], ["check", "--output-format", "concise"]])
def test_style(check):
    """What `make check` asks of ruff; the rules are in pyproject.toml."""
    found = subprocess.run(
        [sys.executable, "-m", "ruff", *check, "nbs", "tests", "scripts"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_notebooks_are_clean():
    assert check_notebooks.dirty_notebooks() == []


def test_library_is_what_notebooks_export():
    assert check_notebooks.stale_modules() == []


def test_notebooks_hold_no_errors_and_no_forbidden_code():
    assert check_notebooks.faulty_cells() == []


def test_readme_is_the_index_notebook():
    assert readme.differences() == []


@pytest.fixture
def small_project(tmp_path):
    """A clean project of one notebook, to show that the checks above can fail."""
    for folder in ("nbs", check_notebooks.LIB):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / check_notebooks.LIB / "__init__.py").write_text('__version__ = "0"\n')
    nb, code = nbformat.v4.new_notebook(), nbformat.v4.new_code_cell
    nb.cells = [
        code("#| default_exp core"),
        code("size: int = 1  # a parameter", metadata={"tags": ["parameters"]}),
        code("#| export\ndef f(): return 1"),
    ]
    save(nb, tmp_path)
    with chdir(tmp_path):
        nbdev_clean()
        nbdev_export()
    return tmp_path


def save(nb, root):
    nbformat.write(nb, root / "nbs" / "00_core.ipynb")


def load(root):
    return nbformat.read(root / "nbs" / "00_core.ipynb", as_version=4)


def findings(root):
    return [
        check(root)
        for check in (
            check_notebooks.dirty_notebooks,
            check_notebooks.stale_modules,
            check_notebooks.faulty_cells,
        )
    ]


def test_checks_accept_a_clean_notebook_and_keep_its_parameters_tag(small_project):
    assert findings(small_project) == [[], [], []]
    assert load(small_project).cells[1].metadata.tags == ["parameters"]


def test_checks_find_stored_metadata(small_project):
    nb = load(small_project)
    nb.cells[1].execution_count = 3
    save(nb, small_project)
    assert findings(small_project)[0] == ["00_core.ipynb"]


def test_checks_find_a_changed_and_a_left_over_module(small_project, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")  # under which nbdev-export does nothing
    lib = small_project / check_notebooks.LIB
    (lib / "core.py").write_text((lib / "core.py").read_text().replace("return 1", "return 2"))
    (lib / "gone.py").write_text("")
    assert findings(small_project)[1] == ["core.py", "gone.py"]


@pytest.mark.parametrize(
    "source", ["nbdev_export()", "import nbdev; nbdev.nbdev_export()", "%pip install x", "!pip install x"]
)
def test_checks_find_forbidden_code(small_project, source):
    nb = load(small_project)
    nb.cells[1].source += f"\n{source}"
    save(nb, small_project)
    assert len(findings(small_project)[2]) == 1


def test_checks_find_a_stored_error(small_project):
    nb = load(small_project)
    nb.cells[1].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]
    save(nb, small_project)
    assert "stored error" in findings(small_project)[2][0]


def test_checks_refuse_an_empty_project(tmp_path):
    (tmp_path / "nbs").mkdir()
    with pytest.raises(FileNotFoundError):
        check_notebooks.faulty_cells(tmp_path)


def test_readme_rewrites_links_and_extracts_pictures():
    nb, picture = nbformat.v4, "iVBORw0KGgo="
    code = nb.new_code_cell(
        "#| echo: false\nshow()",
        id="c1",
        outputs=[
            nb.new_output(
                "display_data",
                {"text/html": f'<img src="data:image/png;base64,{picture}"> ok', "text/plain": "x"},
            ),
            nb.new_output("stream", name="stderr", text="progress"),
            nb.new_output("stream", name="stdout", text="done\n"),
        ],
    )
    page = readme.Page("files", readme.relink)
    assert page.render_cell(code) == ['<img src="files/c1-0.png"> ok', "", "```text\ndone\n```"]
    assert page.pictures == {"files/c1-0.png": b"\x89PNG\r\n\x1a\n"}
    assert page.render_cell(nb.new_code_cell("#| hide\nimport x")) == []
    assert readme.relink("[a](00_x.ipynb) [b](../LOG.md) [c](#d) [e](mailto:f)") == (
        "[a](nbs/00_x.ipynb) [b](LOG.md) [c](#d) [e](mailto:f)"
    )


def test_recipes_are_yaml():
    recipes = [p for p in (ROOT / "data").rglob("*") if p.suffix in (".yaml", ".yml")]
    assert recipes
    for path in recipes:
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path


def test_distributions_hold_notebooks_recipes_and_weights(tracked, tmp_path):
    """Build an sdist and, from it, a wheel, from a copy: a build leaves traces in the source folder."""
    source, dist = tmp_path / "source", tmp_path / "dist"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source],
        check=True,
        capture_output=True,
        text=True,
    )
    payload = {n for n in tracked if re.match(r"nbs/.*\.ipynb$|data/", n)}
    assert {Path(n).suffix for n in payload} >= {".ipynb", ".yaml", ".safetensors"}
    with tarfile.open(*dist.glob("*.tar.gz")) as sdist:
        assert payload <= {n.partition("/")[2] for n in sdist.getnames()}
    with ZipFile(*dist.glob("*.whl")) as wheel:
        packed = set(wheel.namelist())
        assert {f"rlaifv_nb/{n}" for n in payload} <= packed
        assert {n for n in tracked if n.startswith("rlaifv_nb/")} <= packed
        tops = {n.split("/")[0] for n in packed}
        assert tops == {"rlaifv_nb", f"rlaifv_nb-{rlaifv_nb.__version__}.dist-info"}, (
            "tests or scripts must not be packed"
        )


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda p: p.stem)
def test_imports_stand_in_cells_of_their_own(path):
    """To build the documentation, nbdev runs every cell that imports; anything else in it would run without
    the cells before.
    """
    for cell in nbformat.read(path, as_version=4).cells:
        if (
            cell.cell_type == "code"
            and not cell.source.startswith("#|")
            and "parameters" not in cell.metadata.get("tags", [])
        ):
            is_import = [
                isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell.source).body
            ]
            assert all(is_import) or not any(is_import), cell.source
