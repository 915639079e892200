"""Build a plain local preview of the documentation in _docs/, for machines without Quarto.

    python scripts/docs_preview.py

nbdev prepares the notebooks exactly as for Quarto (it runs the exported cells and adds the signatures), then
pandoc turns each into a page. Search, sidebar and theme of the Quarto site are missing.
"""

import html
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pypandoc
import yaml
from nbdev.config import nbpath2html
from nbdev.serve import proc_nbs

from readme import Page

OUT = Path(__file__).resolve().parent.parent / "_docs"
STYLE = "<style>body { max-width: 60em } nav a { margin-right: 1em } img { max-width: 100% }</style>"
NOTEBOOK_LINK = re.compile(r"\]\(([\w-]+\.ipynb)")
SITE_LINK = re.compile(r"\]\(/(?=[\w-]+\.html)")  # nbdev links from the root of a site; these pages are files
SOURCE_LINK = re.compile(
    r"^\[source\]\(/blob.*\n", re.MULTILINE
)  # to a repository page, where none is configured


def relink(text):
    """Point nbdev's links to the pages of this preview."""
    text = NOTEBOOK_LINK.sub(lambda m: f"]({nbpath2html(m[1])}", text)
    return SOURCE_LINK.sub("", SITE_LINK.sub("](", text))


def front_matter(path):
    """What nbdev found in the title cell: title, description, output file."""
    cells = nbformat.read(path, as_version=4).cells
    return yaml.safe_load(next(c.source for c in cells if c.cell_type == "raw").strip().strip("-"))


def write_page(path, front, nav):
    """Write one page and its pictures; formulas become MathML, so that nothing needs a network."""
    page = Page("pictures", relink)
    text = page.render(path)
    for name, data in page.pictures.items():
        (OUT / name).write_bytes(data)
    with TemporaryDirectory() as tmp:
        head, top = Path(tmp) / "head.html", Path(tmp) / "nav.html"
        head.write_text(STYLE, encoding="utf-8")
        top.write_text(nav, encoding="utf-8")
        options = [
            "--standalone",
            "--mathml",
            "--toc",
            "--toc-depth=2",
            f"--metadata=title:{front['title']}",
            f"--metadata=subtitle:{front.get('description', '')}",
            f"--include-in-header={head}",
            f"--include-before-body={top}",
        ]
        pypandoc.convert_text(
            text, "html5", format="commonmark_x", extra_args=options, outputfile=OUT / front["output-file"]
        )


def main():
    """Prepare all notebooks afresh, then write one page each."""
    cache = proc_nbs(n_workers=1, force=True)
    fronts = {path: front_matter(path) for path in sorted(cache.glob("*.ipynb"))}
    nav = " ".join(f'<a href="{f["output-file"]}">{html.escape(f["title"])}</a>' for f in fronts.values())
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "pictures").mkdir(parents=True)
    for path, front in fronts.items():
        write_page(path, front, f"<nav>{nav}</nav>")
    print(f"{len(fronts)} pages; open {OUT.name}/index.html")


if __name__ == "__main__":  # nbdev starts worker processes that import this file
    main()
