"""Run notebooks in place, so that they keep the outputs of a real run.

    python scripts/refresh.py nbs/04_pairs.ipynb ...

A notebook is written only if it ran to its end. Standard error (progress bars, warnings with paths of this
machine) is not kept.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def refresh(path):
    """Execute one notebook with its defaults and store its outputs."""
    nb = nbformat.read(path, as_version=4)
    NotebookClient(
        nb, kernel_name="python3", timeout=900, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(nb, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name, flush=True)
        refresh(Path(name))
