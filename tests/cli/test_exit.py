"""How commands end: exit codes, one-line errors, output that cannot be written."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import tsotsallm, within
from tsotsallm import errors
from tsotsallm.cli.common import TRACEBACK, answers


@pytest.mark.parametrize(("arguments", "message"), [
    (["inspect", "no-such-model"], "does not exist"),
    (["plan", "TINY", "wandda:2:4"], "did you mean"),
    (["compress", "TINY", "gptq:4:128", "-o", "OUT"], "usable groups"),
    (["evaluate", "TINY", "--text", "no-such-file.txt"], "does not exist"),
    (["evaluate", "TINY", "--text", "TEXT", "--protocol", "row"], "did you mean 'rows'"),
    (["evaluate", "TINY", "--text", "TEXT", "--context", "100000"], "longer than the 256 positions"),
    (["compress", "TINY", "", "-o", "/proc/nowhere/out"], "0 B are free|cannot be written"),
])
def test_a_users_error_is_one_line_and_exit_code_1(tiny: Path, text: Path, tmp_path: Path, arguments: list[str],
                                                   message: str) -> None:
    places = {"TINY": str(tiny), "TEXT": str(text), "OUT": str(tmp_path / "out")}
    found = within(*[places.get(argument, argument) for argument in arguments], check=False)
    assert found.exit_code == 1
    assert "Traceback" not in found.stderr
    assert found.stderr.startswith("tsotsallm: ")
    assert len(found.stderr.splitlines()) == 1
    assert re.search(message, found.stderr)


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "Missing argument"), (["rtn:4", "--windows", "many"], "--windows"), (["rtn:4", "--window"], "--window"),
    (["rtn:4", "--nonsense", "1"], "--nonsense"), (["rtn:4", "beyond"], "beyond")])
def test_wrong_options_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    found = tsotsallm("plan", *(["embedded", *arguments] if arguments else []), check=False)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert message in found.stderr
    assert "--help` says what there is" in found.stderr
    assert not found.stdout


@pytest.mark.parametrize("arguments", [["compres"], ["study"], ["bundle"], ["tables"], ["--nonsense"]])
def test_commands_that_are_none(arguments: list[str]) -> None:
    found = tsotsallm(*arguments, check=False)
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1


class PanicException(BaseException):
    """What Rust libraries raise through pyo3 is no Exception."""


class Speechless(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(("error", "message"), [
    (PanicException("called `Option::unwrap()`\n on a `None` value"),
     "internal error: PanicException: called `Option::unwrap()` on a `None` value; please report it"),
    (RecursionError("maximum recursion depth exceeded"), "internal error: RecursionError: maximum recursion depth "
                                                         "exceeded;"),
    (struct.error("int too large to convert"), "internal error: error: int too large"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "internal error: UnicodeDecodeError: "),
    (KeyError("model.norm.weight"), "internal error: KeyError: 'model.norm.weight';"),
    (AssertionError(), "internal error: AssertionError: no more is known;"),
    (EOFError(), "internal error: EOFError"),
    (Speechless(), "internal error: Speechless: Speechless"),
    (ExceptionGroup("two", [ValueError("one"), ValueError("two")]), "internal error: ExceptionGroup: two (2 "
                                                                    "sub-exceptions)"),
    (OSError("the hub does not answer"), "internal error: OSError: the hub does not answer"),
    (MemoryError(), "memory ran out;"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
     "memory ran out;"),
    (FileNotFoundError(2, "No such file or directory", "x.txt"), "x.txt: No such file or directory; check the path"),
    (OSError(28, "No space left on device"), "a file, or the output: No space left on device; check"),
    (errors.CheckpointError("a\nb\x1b[31m" + "c" * 5000), "a b\N{REPLACEMENT CHARACTER}[31mccc"),
    (ValueError("y" * 10_000), "internal error: ValueError: yyy"),
])
def test_whatever_goes_wrong_is_one_line_and_exit_code_1(error: BaseException, message: str,
                                                         capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, answers():
        raise error
    said = capfd.readouterr()
    assert ended.value.code == 1
    assert said.err.startswith(f"tsotsallm: {message}")
    assert said.err.endswith("\n")
    assert len(said.err.splitlines()) == 1
    assert len(said.err) <= 1020
    assert not said.out
    with pytest.raises(SystemExit) as ended, answers(as_json=True):
        raise error
    said = capfd.readouterr()
    assert ended.value.code == 1
    assert json.loads(said.out)["error"] == type(error).__name__
    assert json.loads(said.out)["message"].startswith(message)
    assert not said.err


def test_where_an_internal_error_arose_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch,
                                                          capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(SystemExit), answers():
        raise KeyError("weight")
    *lines, last = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert Path(__file__).name in "".join(lines)
    assert last.startswith("tsotsallm: internal error: KeyError")


def test_ends_that_are_no_errors_pass(capfd: pytest.CaptureFixture[str]) -> None:
    for code in (0, 1, 3):
        with pytest.raises(SystemExit) as ended, answers():
            sys.exit(code)
        assert ended.value.code == code
    with pytest.raises(SystemExit) as ended, answers():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_noise() -> None:
    process = subprocess.Popen([sys.executable, "-m", "tsotsallm", "recipes"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full device is Linux's")
@pytest.mark.parametrize("arguments", [["recipes"], ["--version"], ["--help"], ["plan", "no-such-model", "rtn:4", "--json"]])
def test_output_that_cannot_be_written_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        found = subprocess.run([sys.executable, "-m", "tsotsallm", *arguments], stdout=full, stderr=subprocess.PIPE,
                               text=True)
    assert found.returncode == 1
    assert len(found.stderr.splitlines()) == 1
    assert "No space left on device" in found.stderr


def test_a_console_that_lacks_letters_shows_others() -> None:
    found = subprocess.run([sys.executable, "-m", "tsotsallm", "evaluate", "--help"], capture_output=True,
                           env=os.environ | {"PYTHONIOENCODING": "latin-1"}, check=True)
    assert b"CO?" in found.stdout


def test_a_closed_output_is_no_error() -> None:
    subprocess.run([sys.executable, "-c", "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', "
                    "'tsotsallm', 'recipes'])"], check=True)
