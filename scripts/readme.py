"""Write README.md from nbs/index.ipynb, without Quarto.

    python scripts/readme.py           # write README.md and README_files/
    python scripts/readme.py --check   # exit 1 if they differ from the notebook

The result depends on the notebook alone. Pictures become files, because repository pages show no data URIs.
"""

import base64
import posixpath
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK, README, PICTURES = "nbs/index.ipynb", "README.md", "README_files"
HEADER = "<!-- Written by scripts/readme.py from nbs/index.ipynb: edit that. -->"

DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", re.MULTILINE)
LINK = re.compile(r"""(\]\(|\b(?:src|href)=["'])(?![a-z][a-z0-9+.-]*:|[#/])([^)\s"']+)""")
DATA_URI = re.compile(r"data:image/(png|jpeg|gif);base64,([A-Za-z0-9+/=\s]+)")
SHOWN = "text/markdown", "text/html", "image/png", "image/jpeg", "text/plain"  # the first present is used


class Page:
    """What one notebook turns into: Markdown parts, and pictures as {path: bytes}."""

    def __init__(self, pictures_folder, relink):
        self.folder, self.relink, self.pictures = pictures_folder, relink, {}

    def add_picture(self, cell_id, kind, text):
        """Keep base64 `text` as a file and return its path, named by cell, so that a new cell renames no
        other.
        """
        stem = f"{self.folder}/{cell_id}-"
        path = f"{stem}{sum(p.startswith(stem) for p in self.pictures)}.{kind}"
        self.pictures[path] = base64.b64decode(text)
        return path

    def externalise(self, text, cell_id):
        """Move pictures from data URIs into files."""
        return DATA_URI.sub(lambda m: self.add_picture(cell_id, m[1], m[2]), text)

    def render_output(self, output, cell_id):
        """One stored output as Markdown; standard error (progress bars, warnings) is left out."""
        if output.output_type == "error":
            raise ValueError(f"cell {cell_id} holds an error: {output.ename}: {output.evalue}")
        if output.output_type == "stream":
            return f"```text\n{output.text.rstrip()}\n```" if output.name == "stdout" else ""
        kind = next((k for k in SHOWN if k in output.data), None)
        if kind is None:
            raise ValueError(f"cell {cell_id}: no way to show {sorted(output.data)}")
        text = output.data[kind]
        if kind.startswith("image/"):
            return f"![]({self.add_picture(cell_id, kind.removeprefix('image/'), text)})"
        if kind == "text/plain":
            return f"```text\n{text.rstrip()}\n```"
        if kind == "text/html":  # in Markdown, HTML ends at an empty line
            text = re.sub(r"\n\s*\n", "\n", text)
        return self.externalise(self.relink(text), cell_id)

    def render_cell(self, cell):
        """The Markdown parts of one cell, as its nbdev and Quarto directives want them."""
        if cell.cell_type == "raw":
            return []
        if cell.cell_type == "markdown":
            text = self.relink(cell.source)
            for name, data in cell.get("attachments", {}).items():
                ((kind, data),) = data.items()
                path = self.add_picture(cell.id, kind.removeprefix("image/"), data)
                text = text.replace(f"attachment:{name}", path)
            return [self.externalise(text, cell.id)]
        options = dict(DIRECTIVE.findall(cell.source))
        if options.keys() & {"hide", "export", "exporti", "default_exp"} or options.get("include") == "false":
            return []
        source = DIRECTIVE.sub("", cell.source).strip()
        parts = [f"```python\n{source}\n```"] if source and options.get("echo") != "false" else []
        if options.get("output") != "false":
            parts += [self.render_output(o, cell.id) for o in cell.outputs]
        return parts

    def render(self, path):
        """The notebook at `path` as Markdown."""
        cells = nbformat.read(path, as_version=4).cells
        parts = [part.strip() for cell in cells for part in self.render_cell(cell)]
        return "\n\n".join(filter(None, parts)) + "\n"


def relink(text):
    """Turn links that are relative to the notebook into links that are relative to README.md."""
    folder = posixpath.dirname(NOTEBOOK)
    return LINK.sub(lambda m: m[1] + posixpath.normpath(posixpath.join(folder, m[2])), text)


def render(root=ROOT):
    """The README and its pictures as {relative path: bytes}."""
    page = Page(PICTURES, relink)
    text = f"{HEADER}\n\n{page.render(root / NOTEBOOK)}"
    return {README: text.encode(), **page.pictures}


def committed(root=ROOT):
    """The README's files as they are on disk."""
    paths = [p for p in [root / README, *(root / PICTURES).glob("*")] if p.exists()]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in paths}


def differences(root=ROOT):
    """Files that differ between notebook and disk, missing and left-over ones too."""
    new, old = render(root), committed(root)
    return sorted(name for name in new | old if new.get(name) != old.get(name))


def write(root=ROOT):
    """Bring the files on disk up to date; return the names of those that changed."""
    new, changed = render(root), differences(root)
    for name in changed:
        path = root / name
        if name in new:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(new[name])
        else:
            path.unlink()
    return changed


if __name__ == "__main__":
    check = sys.argv[1:] == ["--check"]
    found = differences() if check else write()
    print(f"{'different' if check else 'written'}: {', '.join(found) or 'nothing'}")
    sys.exit(bool(check and found))
