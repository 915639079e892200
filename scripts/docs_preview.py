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
NOTEBOOK_LINK = re.compile(r"\]\(((?:[\w.-]+/)*[\w-]+\.ipynb)")
SITE_LINK = re.compile(
    r"\]\(/(?=[\w/-]+\.html)"
)  # nbdev links from the root of a site; these pages are files
SOURCE_LINK = re.compile(
    r"^\[source\]\(/blob.*\n", re.MULTILINE
)  # to a repository page, where none is configured


def relink(text, to_root):
    """Point nbdev's links to the pages of this preview, from a page whose way to the root is `to_root`."""
    text = NOTEBOOK_LINK.sub(lambda m: f"]({nbpath2html(m[1])}", text)
    return SOURCE_LINK.sub("", SITE_LINK.sub(f"]({to_root}", text))


def front_matter(path):
    """What nbdev found in the title cell: title, description, output file."""
    cells = nbformat.read(path, as_version=4).cells
    return yaml.safe_load(next(c.source for c in cells if c.cell_type == "raw").strip().strip("-"))


def navigation(fronts, to_root):
    """Links to all pages, a line for each folder."""
    lines = {}
    for path, front in fronts.items():
        link = f'<a href="{to_root}{page_path(path, front)}">{html.escape(front["title"])}</a>'
        lines.setdefault(path.parent.as_posix(), []).append(link)
    return "".join(
        f"<nav>{'' if folder == '.' else folder} {' '.join(links)}</nav>" for folder, links in lines.items()
    )


def page_path(path, front):
    """Where the page of a notebook goes, relative to the root."""
    return (path.parent / front["output-file"]).as_posix()


def write_page(cache, path, front, nav, to_root):
    """Write one page and its pictures; formulas become MathML, so that nothing needs a network."""
    folder = (OUT / path).parent
    page = Page("pictures", lambda text: relink(text, to_root))
    text = page.render(cache / path)
    for name, data in page.pictures.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
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
            text, "html5", format="commonmark_x", extra_args=options, outputfile=OUT / page_path(path, front)
        )


def main():
    """Prepare all notebooks afresh, then write one page each."""
    cache = proc_nbs(n_workers=1, force=True)
    found = sorted(cache.rglob("*.ipynb"), key=lambda path: (len(path.parts), path))
    fronts = {path.relative_to(cache): front_matter(path) for path in found}
    shutil.rmtree(OUT, ignore_errors=True)
    for path, front in fronts.items():
        (OUT / path).parent.mkdir(parents=True, exist_ok=True)
        to_root = "../" * (len(path.parts) - 1)
        write_page(cache, path, front, navigation(fronts, to_root), to_root)
    print(f"{len(fronts)} pages; open {OUT.name}/index.html")


if __name__ == "__main__":  # nbdev starts worker processes that import this file
    main()
