"""What is not installed, and the command that installs it."""

from __future__ import annotations

import ast
import shlex
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tsotsallm import errors

ROOT = Path(__file__).parents[1]


def extras() -> dict[str, list[str]]:
    found: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return found


@pytest.mark.parametrize("extra", sorted(extras().keys() - {"dev"}))
def test_the_command_that_installs_an_extra_is_this_environments_own(extra: str) -> None:
    python, *fixed, option, constraints = shlex.split(errors.install_command(extra))[:6]
    assert [python, *fixed, option] == [sys.executable, "-m", "pip", "install", "-c"]
    assert Path(constraints).samefile(ROOT / "constraints.txt")
    packages = shlex.split(errors.install_command(extra))[6:]
    assert sorted(map(str, map(Requirement, packages))) == sorted(map(str, map(Requirement, extras()[extra])))


def test_where_there_is_no_checkout_nothing_constrains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "site-packages" / "tsotsallm" / "errors.py"))
    message = str(errors.MissingExtraError("gguf", "gguf", "writing GGUF files"))
    assert message == ("writing GGUF files needs the package gguf, which is not installed; install it with: "
                       f'{sys.executable} -m pip install "gguf>=0.17"')


def test_every_extra_that_is_asked_for_exists() -> None:
    asked = [call.args[1].value for path in (ROOT / "src").rglob("*.py") for call in ast.walk(ast.parse(path.read_text()))
             if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "MissingExtraError"
             and isinstance(call.args[1], ast.Constant)]
    assert len(asked) > 10
    assert set(asked) <= extras().keys()


@pytest.mark.parametrize(("text", "read"), [
    ("give a text with --calibration FILE or DIR", "give a text with calibration=FILE or DIR"),
    ("--limit is 0; it takes 1 or more", "limit is 0; it takes 1 or more"),
    ("use --device cpu, or --dense bf16", 'use device="cpu", or dense="bf16"'),
    ("say how small, such as --bytes 4MB", 'say how small, such as size="4MB"'),
    ("such as --bytes 1.2 GB", 'such as size="1.2 GB"'),
    ("give it with --set questions=FILE", 'give it with given={"questions": FILE}'),
    ("take --window 512 or less", "take window=512 or less"),
    ("export with --no-verify and --keep-text FILE", "export with verify=False and keep_text=FILE"),
    ("make a copy with `tsotsallm export MODEL --hf DIR`, or --quick", "make a copy with `tsotsallm export MODEL --hf DIR`, "
                                                                       "or quick=True"),
    ("choose another name with -o, or start again with --restart", "choose another name with out=PATH, or start again with "
                                                                   "restart=True"),
    ("run both together (llama.cpp: --lora)", "run both together (llama.cpp: --lora)"),
    ("a-file--with-dashes is damaged", "a-file--with-dashes is damaged")])
def test_errors_name_arguments_in_python_and_options_on_the_command_line(text: str, read: str) -> None:
    error = errors.TsotsallmError(text)
    assert str(error) == read
    assert str(errors.TsotsallmError(f"again: {error}")) == f"again: {read}"
    with errors.read_on_a_command_line():
        assert str(error) == text
    assert str(error) == read
