"""Check that notebooks are clean, sound, and equal to the exported library.

    python scripts/check_notebooks.py

nbdev cleans and exports in place, so both happen in a temporary copy and the working tree stays as it is.
"""

import json
import os
import re
import shutil
import sys
import warnings
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export

ROOT = Path(__file__).resolve().parent.parent
LIB = "rlaifv_nb"
# papermill would rewrite the library in the middle of a run, or change the environment it runs in.
FORBIDDEN = re.compile(r"\bnbdev_export\(|^\s*[!%]+pip\b", re.MULTILINE)
# What JupyterLab and nbdev's documentation keep beside notebooks; .gitignore names them.
TOOL_FILES = {"_quarto.yml", "nbdev.yml", "sidebar.yml", "styles.css"}


def notebooks(root=ROOT):
    """The committed notebooks by path; having none is an error, or every check would pass."""
    found = sorted((root / "nbs").rglob("*.ipynb"))
    if not found:
        raise FileNotFoundError(f"no notebooks in {root / 'nbs'}")
    return found


@contextmanager
def inside_copy(root=ROOT):
    """Work in a temporary copy of what nbdev reads and writes."""
    with TemporaryDirectory() as tmp, warnings.catch_warnings():
        copy, skip = Path(tmp), shutil.ignore_patterns("__pycache__", ".*")
        shutil.copy(root / "pyproject.toml", copy)
        for folder in ("nbs", LIB):
            shutil.copytree(root / folder, copy / folder, ignore=skip)
        # nbdev only warns about a notebook that it cannot read or export.
        warnings.simplefilter("error", UserWarning)
        # nbdev-export silently does nothing while nbdev-test sets this.
        in_test = os.environ.pop("IN_TEST", None)
        try:
            with chdir(copy):
                yield copy
        finally:
            if in_test is not None:
                os.environ["IN_TEST"] = in_test


def dirty_notebooks(root=ROOT):
    """Names of the notebooks that nbdev-clean would change."""
    with inside_copy(root) as copy:
        nbdev_clean()
        return [
            nb.relative_to(root / "nbs").as_posix()
            for nb in notebooks(root)
            if nb.read_bytes() != (copy / nb.relative_to(root)).read_bytes()
        ]


def stale_modules(root=ROOT):
    """Names of the modules that differ from what the notebooks export, missing and left-over ones too."""

    def contents(folder):
        modules = (p for p in (folder / LIB).rglob("*.py") if p.name != "__init__.py")
        return {p.relative_to(folder / LIB).as_posix(): p.read_bytes() for p in modules}

    committed = contents(root)
    with inside_copy(root) as copy:
        for name in committed:
            (copy / LIB / name).unlink()
        nbdev_export()
        exported = contents(copy)
    return sorted(n for n in committed | exported if committed.get(n) != exported.get(n))


def faulty_cells(root=ROOT):
    """Code cells with a stored error or with code that a notebook of a chain must not run."""
    faults = []
    for path in notebooks(root):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] != "code":
                continue
            where = f"{path.name}, cell {cell.get('id')}"
            if any(output["output_type"] == "error" for output in cell["outputs"]):
                faults.append(f"{where}: stored error")
            if match := FORBIDDEN.search("".join(cell["source"])):
                faults.append(f"{where}: {match.group().strip()}")
    return faults


def left_over_files(root=ROOT):
    """Files below `nbs` that are not notebooks: a demonstration wrote them to a relative path."""
    return [
        path.relative_to(root).as_posix()
        for path in sorted((root / "nbs").rglob("*"))
        if path.is_file()
        and path.suffix != ".ipynb"
        and path.name not in TOOL_FILES
        and ".ipynb_checkpoints" not in path.parts
    ]


def main():
    """Print every finding with its remedy; return the number of findings."""
    findings = [f"{n}: not clean; make clean-notebooks" for n in dirty_notebooks()]
    findings += [f"{LIB}/{n}: not what the notebooks export; make export" for n in stale_modules()]
    findings += faulty_cells()
    findings += [
        f"{name}: not a notebook; let its cell write to a temporary folder" for name in left_over_files()
    ]
    print("\n".join(findings) or f"{len(notebooks())} notebooks: clean and equal to the library")
    return len(findings)


if __name__ == "__main__":
    sys.exit(min(main(), 1))
