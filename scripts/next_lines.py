"""The order in which the notebooks are read, and the line at the end of each that leads to the next one.

python scripts/next_lines.py           write the lines that are missing or wrong
python scripts/next_lines.py --check   list them

The order is that of the file list: the index, the numbered notebooks on top, then one wing after the other. A
line that leads to the right notebook is left alone, so what follows the link can be written by hand.
"""

import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WINGS = ("engine", "iconworld", "benchmarks", "exchange", "runner", "studies")
NEXT = re.compile(r"Next: [^\n]*\]\([^)]+\.ipynb\)")
LINK = re.compile(r"\]\(([^)]+\.ipynb)\)")
CELL_ID = "next"


def reading_order(root: Path = ROOT) -> list[Path]:
    "All notebooks in reading order. Raises ValueError naming a folder that is not in `WINGS`."
    notebooks = root / "nbs"
    unknown = {path.parent.name for path in notebooks.glob("*/*.ipynb")} - set(WINGS)
    if unknown:
        raise ValueError(f"nbs/{sorted(unknown)[0]} is not one of {', '.join(WINGS)}: name it in WINGS")
    order = [notebooks / "index.ipynb", *sorted(notebooks.glob("[0-9]*.ipynb"))]
    for wing in WINGS:
        order += sorted((notebooks / wing).glob("*.ipynb"))
    return order


def read_cells(path: Path) -> list[dict]:
    "The cells of a notebook."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def subtitle(path: Path) -> str:
    "The sentence below a notebook's title."
    return re.search(r"^> (.+)$", "".join(read_cells(path)[0]["source"]), re.MULTILINE)[1]


def next_cell(cells: list[dict]) -> dict | None:
    "The last text cell that leads to another notebook."
    found = [c for c in cells if c["cell_type"] == "markdown" and NEXT.search("".join(c["source"]))]
    return found[-1] if found else None


def next_of(path: Path) -> list[Path]:
    "The notebooks to which the last `Next:` of another one leads; most have one."
    cell = next_cell(read_cells(path))
    if cell is None:
        return []
    sentence = "".join(cell["source"]).rpartition("Next: ")[2]
    return [Path(os.path.normpath(path.parent / link)) for link in LINK.findall(sentence)]


def wrong_lines(root: Path = ROOT) -> dict[Path, Path]:
    "Notebook -> the one that should come next, for each that leads elsewhere or nowhere."
    order = reading_order(root)
    return {path: after for path, after in zip(order, order[1:], strict=False) if after not in next_of(path)}


def line_to(path: Path, after: Path, root: Path = ROOT) -> str:
    "The line that leads from one notebook to another."
    name = after.relative_to(root / "nbs").with_suffix("").as_posix()
    return f"Next: [{name}]({os.path.relpath(after, path.parent)}). {subtitle(after)}"


def write_line(path: Path, after: Path, root: Path = ROOT):
    "Replaces what a notebook says from its last `Next:` on, or adds a cell at its end."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cell = next_cell(notebook["cells"])
    if cell is None:
        cell = {"cell_type": "markdown", "id": CELL_ID, "metadata": {}, "source": []}
        notebook["cells"].append(cell)
    text = "".join(cell["source"])
    kept = text[: text.rfind("Next: ")] if "Next: " in text else ""
    cell["source"] = (kept + line_to(path, after, root)).splitlines(keepends=True)
    path.write_text(
        json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8"
    )


def main() -> int:
    "Writes or lists the lines; returns how many are wrong under --check."
    found = wrong_lines()
    check = sys.argv[1:] == ["--check"]
    for path, after in found.items():
        print(f"{path.relative_to(ROOT)}: the next notebook is {after.relative_to(ROOT)}")
        if not check:
            write_line(path, after)
    return len(found) if check else 0


if __name__ == "__main__":
    sys.exit(min(main(), 1))
