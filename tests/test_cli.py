"""The command line as a user meets it: exit codes, one-line errors, JSON."""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import shlex
import signal
import struct
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from tsotsallm import __version__, errors
from tsotsallm.cli import FIRST, app
from tsotsallm.cli.common import TRACEBACK, answers

ROOT = Path(__file__).parents[1]


def tsotsallm(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    found = subprocess.run([sys.executable, "-m", "tsotsallm", *map(str, arguments)], capture_output=True, text=True)
    if check:
        assert found.returncode == 0, found.stderr
    return found


def within(*arguments: object, check: bool = True) -> Any:
    """As `tsotsallm`, in this process, where the libraries are loaded already."""
    found = CliRunner().invoke(app, list(map(str, arguments)))
    if check:
        assert found.exit_code == 0, found.stderr
    return found


def test_help_names_every_verb() -> None:
    text = tsotsallm("--help").stdout
    for verb in ("compress", "plan", "evaluate", "inspect", "recipes"):
        assert verb in text


@pytest.mark.parametrize("group", [[], ["study"], ["bundle"], ["tables"]])
def test_every_command_is_told_in_a_whole_line_of_80_columns(group: list[str]) -> None:
    found = subprocess.run([sys.executable, "-m", "tsotsallm", *group, "--help"], capture_output=True, text=True, check=True,
                           env=os.environ | {"COLUMNS": "80"})
    commands = found.stdout.partition("Commands:\n")[2].splitlines()
    assert len(commands) >= 2
    assert all(len(line) <= 80 and re.fullmatch(r"  \S+ +\S.*[^.]\.", line) for line in commands), commands


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells no processor time of ended processes")
def test_help_and_version_answer_in_half_a_second() -> None:
    """Of processor time, so that other programs do not count."""
    for option, told in (("--help", "Commands:"), ("--version", f"tsotsallm {__version__}")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert told in tsotsallm(option).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_alone_it_shows_three_commands_to_begin_with() -> None:
    said = tsotsallm().stdout
    assert [line.strip() for line in said.splitlines() if line.startswith("  ")] == list(FIRST)
    assert len(FIRST) == 3
    assert "tsotsallm --help lists all commands" in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.slow
def test_the_commands_to_begin_with_run_one_after_another(tmp_path: Path) -> None:
    for line in FIRST:
        name, *arguments = shlex.split(line)
        assert name == "tsotsallm"
        subprocess.run([sys.executable, "-m", "tsotsallm", *arguments], check=True, capture_output=True, cwd=tmp_path)


@pytest.mark.parametrize("arguments", [
    ["compress"], ["plan"], ["evaluate"], ["fit"], ["study", "run"], ["analyze"], ["franken"], ["report"], ["generate"],
    ["chat"], ["serve"], ["studio"], ["annotate"], ["export"], ["worker"]])
def test_what_computes_takes_a_number_of_threads(arguments: list[str]) -> None:
    said = within(*arguments, "--help").stdout
    assert "--threads" in said
    assert "TSOTSALLM_THREADS" in said


def test_compress_evaluate_inspect_plan_speak_json(tiny: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--calibration", text, "--windows", 4, "--window", 64, "--json"]
    result = json.loads(within("compress", tiny, "wanda:2:4, gptq:4:32", "-o", out, *options).stdout)
    assert result["path"] == str(out)
    assert json.loads(within("inspect", out, "--json").stdout)["layers"] == 4
    assert json.loads(within("plan", tiny, "gptq:4:32", "--json").stdout)["result_bytes"] > 0
    found = json.loads(within("evaluate", out, "--text", text, "--context", 64, "--limit", 5, "--reference", tiny,
                                 "--json").stdout)
    assert found["kl"] > 0
    assert found["protocol"]["context"] == 64
    assert "gptq4" in json.loads(within("recipes", "--json").stdout)


def test_tables_are_printed_for_people(tiny: Path, text: Path, tmp_path: Path) -> None:
    assert "floor of time" in within("plan", tiny, "gptq:4:32").stdout
    assert "embeddings" in within("inspect", tiny).stdout
    assert "model   " in within("compress", tiny, "", "-o", tmp_path / "o").stdout
    assert "perplexity" in within("evaluate", tiny, "--text", text, "--context", 64, "--limit", 3).stdout


def test_a_table_after_every_stage(tiny: Path, text: Path, tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text("kind: perplexity\ncontext: 64\nlayouts:\n  - text: '{{text}}'\n")
    adapt = "{adapt: {steps: 2, batch: 2, window: 48, rank: 2}}"
    recipe = f"['wanda:1:4', {adapt}, 'gptq:4:32', 'eora:2']"
    common = ["--calibration", text, "--windows", 4, "--window", 48, "--task", task, "--data", text, "--limit", 3]
    shown = within("compress", tiny, recipe, "-o", tmp_path / "out", *common).stdout
    assert "held-out loss" in shown
    assert all(name in shown for name in ("After every stage", "1-sparsity", "2-adapt", "3-quantize", "perplexity", "bytes"))
    assert (tmp_path / "out" / "training-1-adapt.png").exists()
    found = json.loads(within("compress", tiny, recipe, "-o", tmp_path / "again", *common, "--json").stdout)
    assert len(found["examination"]["models"]) == 5
    assert found["training"][0]["stage"] == "adapt"
    refused = within("compress", tiny, recipe, "-o", tmp_path / "x", "--limit", 3, check=False)
    assert "belong to --task" in refused.stderr
    assert "adapt, resident" in within("plan", tiny, recipe).stdout


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
    assert "test_cli.py" in "".join(lines)
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


# -- what is not installed ---------------------------------------------------------------------------------------------


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


@pytest.mark.slow
def test_ctrl_c_and_kill_lose_at_most_a_layer(tmp_path: Path, text: Path) -> None:
    """kill -9 after five different steps and one Ctrl-C; the result equals an uninterrupted one byte for byte."""
    from tests.conftest import build

    source = build(tmp_path / "source", "llama3", num_hidden_layers=12, hidden_size=256, intermediate_size=512)
    recipe = "[{depth: {remove: 2, protect: {first: 1, last: 1}}}, {sparsity: {prune: 2, group: 4}}, " \
             "{quantize: {bits: 4, group: 64}}]"
    common = ["--calibration", text, "--windows", 32, "--window", 128]
    tsotsallm("compress", source, recipe, "-o", tmp_path / "whole", *common)
    command = [sys.executable, "-m", "tsotsallm", "compress", str(source), recipe, "-o", str(tmp_path / "cut"),
               *map(str, common)]
    journal = tmp_path / "cut.partial" / "journal.jsonl"

    def steps() -> int:
        return len(journal.read_bytes().splitlines()) if journal.exists() else 0

    for kill in [signal.SIGKILL] * 5 + [signal.SIGINT]:
        done = steps()
        # a shell starts background jobs with Ctrl-C ignored, and so would this one's children
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while steps() <= done and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, kill)
        _, errors = process.communicate()
        assert "Traceback" not in errors
        assert process.returncode == (130 if kill == signal.SIGINT else -kill)
        assert not (tmp_path / "cut").exists()
    left = steps()
    subprocess.run(command, check=True, capture_output=True)
    assert left > 5
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()
    assert not (tmp_path / "cut.partial").exists()
