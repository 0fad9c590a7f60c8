"""Counts what makes the package hard to extend: circles, arrows up, wide functions, `Any`, missing docstrings, and more.

    python benchmarks/house.py [--root src/tsotsallm] [--list NAME] [--json]

`--list docstrings` (or circles, up, wide, any, concrete) shows the places behind a count. Exit code 1: an import circle, an
arrow up, or code outside `stages/` that asks for a concrete stage.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[1]
WIDE = 9
"""Parameters from which a function counts as wide."""


def order() -> list[str]:
    """The parts of the package from the lowest to the highest, as tests/test_architecture.py asserts them."""
    tree = ast.parse((HERE / "tests" / "test_architecture.py").read_text("utf-8"))
    return next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)
                and getattr(node.targets[0], "id", "") == "ORDER")


def modules(root: Path) -> dict[str, ast.Module]:
    """Dotted name inside the package -> its syntax tree; the package root itself is ""."""
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").rstrip("."):
            ast.parse(path.read_text("utf-8")) for path in sorted(root.rglob("*.py"))}


def imports(trees: dict[str, ast.Module], package: str) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports when it is loaded, not inside functions."""
    found: dict[str, set[str]] = {}
    for name, tree in trees.items():
        asked: set[str] = set()
        for node in _loaded(tree):
            if isinstance(node, ast.Import):
                asked |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                asked |= {f"{node.module}.{alias.name}" for alias in node.names}
        inside = {one.removeprefix(f"{package}.") for one in asked if one.startswith(f"{package}.")}
        found[name] = {target for one in inside if (target := _module(one, trees)) is not None and target != name}
    return found


def _loaded(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is loaded: not the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _loaded(node)


def _module(name: str, trees: dict[str, ast.Module]) -> str | None:
    while name and name not in trees:
        name = name.rpartition(".")[0]
    return name or None


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Groups of modules that import one another (strongly connected components of two or more; Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[str] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = []
            while True:
                group.append(stack.pop())
                if group[-1] == node:
                    break
            if len(group) > 1:
                found.append(" <-> ".join(sorted(group)))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a higher part of the package, or of the package root by one of its parts."""
    ranks = {name: place for place, name in enumerate(order())}
    found = []
    for name, others in graph.items():
        for other in others:
            mine, theirs = name.partition(".")[0], other.partition(".")[0]
            if name and (not other or ranks.get(theirs, len(ranks)) > ranks.get(mine, -1)):
                found.append(f"{name} -> {other or 'the package root'}")
    return found


def root_imports(trees: dict[str, ast.Module], package: str) -> list[str]:
    """Parts that import from the package root, which stands above them all."""
    return [f"{name}:{node.lineno} from {package} import {', '.join(alias.name for alias in node.names)}"
            for name, tree in trees.items() if name for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == package
            and any(_module(alias.name, trees) is None for alias in node.names)]


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node


def wide(trees: dict[str, ast.Module]) -> list[str]:
    """Functions with nine or more parameters outside the command line."""
    found = []
    for module, tree in trees.items():
        if module.partition(".")[0] != "cli":
            for name, node in functions(tree):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                count = sum(one.arg not in ("self", "cls") for one in arguments)
                if count >= WIDE:
                    found.append(f"{module}:{node.lineno} {name} has {count}")
    return found


def undocumented(trees: dict[str, ast.Module]) -> list[str]:
    """Public functions, methods and classes without a docstring; what overrides or implements is not exempt."""
    found = []

    def look(module: str, body: list[ast.stmt], inside: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                if ast.get_docstring(node) is None:
                    found.append(f"{module}:{node.lineno} {inside}{node.name}")
                if isinstance(node, ast.ClassDef):
                    look(module, node.body, f"{node.name}.")

    for module, tree in trees.items():
        look(module, tree.body, "")
    return found


def concrete_stages(trees: dict[str, ast.Module]) -> list[str]:
    """Places outside `stages/` that ask whether a stage is of one concrete class, or read a field off any stage."""
    names = {node.name for module, tree in trees.items() if module.startswith("stages.") for node in tree.body
             if isinstance(node, ast.ClassDef) and any(
                 isinstance(one, (ast.Assign, ast.AnnAssign)) and "name" in ast.unparse(one).partition("=")[0].split(":")[0]
                 and one.value is not None for one in node.body)}
    found = []
    for module, tree in trees.items():
        if module.partition(".")[0] == "stages":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)} & names
                if asked:
                    found.append(f"{module}:{node.lineno} isinstance of {', '.join(sorted(asked))}")
    return found


def mentions_of_any(root: Path) -> list[str]:
    """Every use of `Any`, imports included."""
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            named = isinstance(node, ast.Name) and node.id == "Any"
            brought = isinstance(node, ast.ImportFrom) and any(alias.name == "Any" for alias in node.names)
            if named or brought:
                found.append(f"{path.relative_to(root)}:{getattr(node, 'lineno', 0)}")
    return found


def counted(root: Path) -> dict[str, list[str] | int]:
    """Name of a count -> the places behind it, or the number itself."""
    trees = modules(root)
    graph = imports(trees, root.name)
    return {"circles": circles(graph), "up": arrows_up(graph) + root_imports(trees, root.name), "wide": wide(trees),
            "any": mentions_of_any(root), "docstrings": undocumented(trees), "concrete": concrete_stages(trees),
            "lines": sum(path.read_text("utf-8").count("\n") for path in root.rglob("*.py")),
            "readme_bytes": (HERE / "README.md").stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE / "src" / "tsotsallm")
    parser.add_argument("--list", choices=["circles", "up", "wide", "any", "docstrings", "concrete"])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = counted(asked.root)
    if asked.list:
        places = found[asked.list]
        assert isinstance(places, list)
        print(*places, sep="\n")
        return
    counts = {name: len(value) if isinstance(value, list) else value for name, value in found.items()}
    words = {"circles": "import circles", "up": "imports of something higher", "wide": f"functions of {WIDE} parameters or "
             "more outside cli/", "any": "mentions of Any", "docstrings": "public functions and classes without docstring",
             "concrete": "isinstance of a concrete stage outside stages/", "lines": "lines of Python",
             "readme_bytes": "bytes of README.md"}
    print(json.dumps(counts) if asked.json else "\n".join(f"{value:>8}  {words[name]}" for name, value in counts.items()))
    sys.exit(bool(counts["circles"] or counts["up"] or counts["concrete"]))


if __name__ == "__main__":
    main()
