"""Each part of the house imports only from parts left of it, and importing the package does nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ORDER = ["version", "errors", "units", "timing", "files", "validation", "records", "sandbox", "rdf", "machine", "hub",
         "remote", "numerics", "checkpoint", "engine", "lab", "streaming", "training", "stages", "recipes", "tasks",
         "recipe", "calibration", "pace", "downloads", "planning", "journal", "store", "run", "compression", "inspection",
         "evaluation", "cluster", "analysis", "export", "fit", "study", "tables", "report", "serve", "api", "cli",
         "__main__"]
ROOT = Path(__file__).parents[1] / "src" / "tsotsallm"


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The parts of the package that a file imports from; what the package root itself offers as `tsotsallm.NAME`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = {name: name.split(".")[1] if "." in name else "" for name in names if name.partition(".")[0] == "tsotsallm"}
    return {part if part in ORDER else name for name, part in parts.items()}


@pytest.mark.parametrize("path", [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT or
                                  path.name != "__init__.py"], ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path: Path) -> None:
    mine = ORDER.index(part_of(path))
    wrong = [name for name in imports(path) if name not in ORDER or ORDER.index(name) > mine]
    assert not wrong, f"{path.name} imports from {wrong}"


@pytest.mark.parametrize(("line", "found"), [
    ("from tsotsallm import __version__", "tsotsallm.__version__"), ("from tsotsallm import compress", "tsotsallm.compress"),
    ("import tsotsallm", "tsotsallm"), ("from tsotsallm import hub", "hub"), ("import tsotsallm.hub", "hub"),
    ("from tsotsallm.run.run import run_recipe", "run")])
def test_the_package_root_stands_above_its_parts(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "part.py"
    path.write_text(line, "utf-8")
    assert imports(path) == {found}


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, tsotsallm, tsotsallm.cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_families_and_stages_are_documented() -> None:
    from tsotsallm.stages import STAGES

    readme = (ROOT.parents[1] / "README.md").read_text("utf-8")
    for name in STAGES:
        assert f"`{name}`" in readme, name


def test_what_the_package_offers_stays_callable_whatever_was_imported_before() -> None:
    code = ("import tsotsallm, tsotsallm.api.fit, tsotsallm.cli, tsotsallm.planning, tsotsallm.run.run\n"
            "print(all(callable(getattr(tsotsallm, name)) for _ in range(2) for name in tsotsallm.__all__))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"


def test_a_subpackage_that_is_called_like_a_function_does_not_take_its_place() -> None:
    code = ("import types, tsotsallm\n"
            "for name in tsotsallm.__all__:\n"
            "    setattr(tsotsallm, name, types.ModuleType(f'tsotsallm.{name}'))      # as an import does\n"
            "print(all(callable(getattr(tsotsallm, name)) for name in tsotsallm.__all__))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
