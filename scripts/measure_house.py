"""How easy the code is to read aloud, and how its modules lean on each other: measures of any checkout.

python scripts/measure_house.py                            this checkout
python scripts/measure_house.py --against ../old_checkout  two columns: that one before, this one now

Only files are read and nothing is imported, so any version can be measured, whether its modules and notebooks
are in one folder or in nested ones. The numbers are there to be looked at; none of them is a target.
"""

import argparse
import ast
import json
import re
import statistics
from collections import defaultdict
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 110
MANY_PARAMETERS = 8
EXPORT = re.compile(r"^#\|\s*exports?\b", re.MULTILINE)
# Whether a name is read or written is not a node that a reader sees.
SILENT = (ast.expr_context, ast.Module)


def settings_of(root: Path) -> dict:
    "What settings.ini of a checkout says."
    config = ConfigParser(delimiters=["="])
    config.read(root / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def read_modules(root: Path) -> dict[str, str]:
    "Dotted name below the package -> source, of every exported module."
    library = root / settings_of(root)["lib_path"]
    found = {}
    for path in sorted(library.rglob("*.py")):
        if path.stem not in ("__init__", "_modidx"):
            name = ".".join(path.relative_to(library).with_suffix("").parts)
            found[name] = path.read_text(encoding="utf-8")
    return found


def read_cells(root: Path) -> dict[str, list[str]]:
    "Module (or the path of a notebook that exports none) -> sources of its notebook's code cells."
    notebooks = root / settings_of(root)["nbs_path"]
    found = {}
    for path in sorted(notebooks.rglob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        target = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(sources), re.MULTILINE)
        found[target[1] if target else path.relative_to(root).as_posix()] = sources
    return found


def parse(source: str) -> ast.Module | None:
    "The syntax tree of a source, or None for a cell that is not plain Python."
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def functions_of(tree: ast.AST) -> list:
    "All functions and methods of a tree, inner ones included."
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def body_of(function) -> list:
    "The statements of a function without its docstring."
    has_docstring = ast.get_docstring(function, clean=False) is not None
    return function.body[1:] if has_docstring else function.body


def outer_functions(tree: ast.AST) -> list:
    "Functions and methods that do not belong to another function."
    inner = {id(f) for outer in functions_of(tree) for f in functions_of(outer) if f is not outer}
    return [f for f in functions_of(tree) if id(f) not in inner]


def nodes_and_lines(source: str) -> tuple[int, int]:
    "Syntax nodes of function bodies, and the lines of these bodies that hold code."
    lines = source.splitlines()
    n_nodes = 0
    rows = set()
    for function in outer_functions(ast.parse(source)):
        for statement in body_of(function):
            n_nodes += sum(not isinstance(node, SILENT) for node in ast.walk(statement))
            rows.update(range(statement.lineno, statement.end_lineno + 1))
    return n_nodes, sum(is_code(lines[row - 1]) for row in rows)


def is_code(line: str) -> bool:
    "Whether a line holds more than white space or a comment."
    return line.strip() != "" and not line.strip().startswith("#")


def is_named_lambda(node: ast.AST) -> bool:
    "Whether a statement gives a lambda a name."
    return isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda)


def called(node: ast.expr) -> str:
    "The text of what an expression calls; empty when it is not a call at all (`f(x).y[0]` calls `f`)."
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def is_tuple_assignment(node: ast.AST) -> bool:
    "Whether a statement assigns several values at once, each written out."
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
        return False
    return isinstance(node.targets[0], ast.Tuple)


def is_packed(node: ast.AST) -> bool:
    "Whether one tuple assignment makes two calls of different functions."
    if not is_tuple_assignment(node):
        return False
    return len({called(part) for part in node.value.elts} - {""}) > 1


def n_parameters(function) -> int:
    "Parameters of a function, `self` and `cls` not counted."
    given = function.args
    names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def public_names(tree: ast.Module) -> list[str]:
    "Top-level functions, classes and constants whose names do not begin with an underscore."
    found = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.append(node.target.id)
        elif isinstance(node, ast.Assign):
            found += [name.id for target in node.targets for name in ast.walk(target) if is_stored(name)]
    return [name for name in dict.fromkeys(found) if not name.startswith("_")]


def is_stored(node: ast.AST) -> bool:
    "Whether a node is a name that is written to."
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def names_in(source: str) -> set[str]:
    "All names that a source mentions: variables, attributes, imports; all words of other cells."
    tree = parse(source)
    if tree is None:
        return set(re.findall(r"\w+", source))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.update(node.name.split("."))
    return found


def unused_names(root: Path, modules: dict, cells: dict) -> list[str]:
    "`module.name` of each public name that no other module, notebook, test, script or entry point uses."
    texts = {f"module {name}": source for name, source in modules.items()}
    texts |= {f"cells {name}": "\n".join(sources) for name, sources in cells.items()}
    others = [path for folder in ("tests", "scripts") for path in sorted((root / folder).rglob("*.py"))]
    mentioned_by = defaultdict(set)
    for place, text in texts.items():
        for name in names_in(text):
            mentioned_by[name].add(place)
    for path in others:
        for name in names_in(path.read_text(encoding="utf-8")):
            mentioned_by[name].add(str(path))
    entry_points = set(re.findall(r":(\w+)", settings_of(root).get("console_scripts", "")))
    unused = []
    for module, source in modules.items():
        own = {f"module {module}", f"cells {module}"}
        for name in public_names(ast.parse(source)):
            if name not in entry_points and not mentioned_by[name] - own:
                unused.append(f"{module}.{name}")
    return unused


def imports_of(module: str, source: str, modules: dict, package: str, inner: bool = True) -> set[str]:
    "The modules of the package that one imports; with `inner`, inside functions too."
    tree = ast.parse(source)
    nodes = ast.walk(tree) if inner else top_level(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            targets = [alias.name.removeprefix(f"{package}.") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = absolute(module, node, package)
            targets = [base] + [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
        else:
            continue
        found.update(target for target in targets if target in modules and target != module)
    return found


def top_level(tree: ast.Module):
    "The statements that run when a module is imported, conditional ones included."
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def absolute(module: str, node: ast.ImportFrom, package: str) -> str:
    "The dotted name below the package from which an import statement takes; `?` for another package."
    if not node.level:
        name = node.module or ""
        return "" if name == package else name.removeprefix(f"{package}.") if package in name else "?"
    parents = module.split(".")[: -node.level]
    return ".".join([*parents, *([node.module] if node.module else [])])


def import_graph(root: Path, inner: bool = True) -> dict[str, set[str]]:
    "Module -> modules that it imports."
    modules = read_modules(root)
    package = settings_of(root)["lib_name"]
    return {name: imports_of(name, source, modules, package, inner) for name, source in modules.items()}


def reachable(graph: dict, start: str) -> set[str]:
    "Everything that a node leads to."
    seen = set()
    waiting = list(graph[start])
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += graph[node]
    return seen


def circles(graph: dict) -> list[list[str]]:
    "Groups of modules that import each other, directly or through others."
    beyond = {node: reachable(graph, node) for node in graph}
    groups = {
        tuple(sorted({node, *(other for other in beyond[node] if node in beyond[other])}))
        for node in graph
        if node in beyond[node]
    }
    return sorted(map(list, groups))


def floors(graph: dict) -> int:
    "Modules on the longest path of imports; the modules of one circle count as one floor."
    beyond = {node: reachable(graph, node) for node in graph}
    height = {}

    def height_of(node):
        if node not in height:
            below = [other for other in beyond[node] if node not in beyond[other]]
            height[node] = 1 + max(map(height_of, below), default=0)
        return height[node]

    return max(map(height_of, graph), default=0)


def export_cells(cells: dict) -> list[str]:
    "Exported cells that define something, without their directives."
    found = []
    for sources in cells.values():
        for source in sources:
            if EXPORT.search(source):
                text = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE)
                tree = parse(text)
                if tree is not None and definitions(tree):
                    found.append(text)
    return found


def definitions(tree: ast.Module) -> int:
    "Functions and classes that a cell defines."
    return sum(isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) for n in tree.body)


def lines_of_code(modules: dict) -> list[str]:
    "Lines of all modules that are not empty and were not written by nbdev's export."
    found = []
    for source in modules.values():
        generated = re.compile(r"^__all__ = \[.*?\]\n", re.MULTILINE | re.DOTALL)
        lines = generated.sub("", source).splitlines()
        found += [line for line in lines if line.strip() and not line.startswith(("# %%", "# AUTOGEN"))]
    return found


def measures(root: Path) -> dict[str, str]:
    "All measures of a checkout, as they are printed."
    modules = read_modules(root)
    cells = read_cells(root)
    trees = [ast.parse(source) for source in modules.values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    lines = lines_of_code(modules)
    counts = [nodes_and_lines(source) for source in modules.values()]
    exported = export_cells(cells)
    n_packed = sum(map(is_packed, nodes))
    n_tuples = sum(map(is_tuple_assignment, nodes))
    n_public = sum(len(public_names(tree)) for tree in trees)
    n_long = sum(len(line) > WIDTH for line in lines)
    functions = [f for tree in trees for f in functions_of(tree)]
    n_wide = sum(n_parameters(f) > MANY_PARAMETERS for f in functions)
    cell_definitions = [definitions(ast.parse(cell)) for cell in exported]
    body_nodes = sum(n for n, _ in counts)
    body_lines = sum(n for _, n in counts)
    found = {
        "lines of the library": f"{len(lines):,}",
        "syntax nodes per body line": f"{body_nodes / body_lines:.1f}",
        f"lines over {WIDTH} characters": f"{n_long:,} ({100 * n_long / len(lines):.1f}%)",
        "named lambdas": f"{sum(map(is_named_lambda, nodes))}",
        "tuple assignments per 1,000 lines": f"{1000 * n_tuples / len(lines):.1f}",
        "of these with calls of two functions per 1,000 lines": f"{1000 * n_packed / len(lines):.1f}",
        "median definitions per export cell": f"{statistics.median(cell_definitions):g}",
        "median lines per export cell": f"{statistics.median(map(filled_lines, exported)):g}",
        f"functions with more than {MANY_PARAMETERS} parameters": f"{n_wide}",
        "public names used nowhere else": f"{len(unused_names(root, modules, cells))} of {n_public}",
        "modules": f"{len(modules)}",
    }
    for words, inner in (("when imported", False), ("in functions too", True)):
        graph = import_graph(root, inner)
        found[f"floors, imports {words}"] = str(floors(graph))
        found[f"arrows, imports {words}"] = str(sum(map(len, graph.values())))
        found[f"circles, imports {words}"] = str(len(circles(graph)))
    return found


def filled_lines(text: str) -> int:
    "Lines of a cell that are not empty."
    return sum(line.strip() != "" for line in text.splitlines())


def table(columns: dict[str, dict[str, str]]) -> str:
    "A Markdown table with one column per checkout."
    names = list(next(iter(columns.values())))
    rows = [["measure", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *(column[name] for column in columns.values())] for name in names]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main():
    "The table of one checkout, or of two."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", type=Path, default=ROOT, help="a checkout (default: this one)")
    parser.add_argument("--against", type=Path, metavar="PATH", help="another checkout, as the first column")
    parser.add_argument("--names", action="store_true", help="list the public names used nowhere else")
    args = parser.parse_args()
    for path in filter(None, (args.path, args.against)):
        if not (path / "settings.ini").is_file():
            parser.error(f"{path} is not a checkout of this project: it has no settings.ini")
    columns = {"before": measures(args.against)} if args.against else {}
    columns["now"] = measures(args.path)
    print(table(columns))
    if args.names:
        print("\n".join(unused_names(args.path, read_modules(args.path), read_cells(args.path))))


if __name__ == "__main__":
    main()
