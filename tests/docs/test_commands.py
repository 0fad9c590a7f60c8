"""Every command of README.md and docs/ runs as it is written, in order, in a fresh folder for each page.

The quick blocks run in the ordinary tests, plain `tsotsallm` commands in this process, where the libraries are loaded; the
slow tests run whole pages, each command in a shell of its own, in which `tsotsallm` is this checkout's.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from tests.docs.pages import LANGUAGES, MARKS, PAGES, ROOT, Block, blocks
from tsotsallm.cli import app

SHELL = set("|&;<>$`*?~")
START_S = 180


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prepared(folder: Path) -> dict[str, str]:
    """The environment of a page's commands; `tsotsallm` and `python` are those of this checkout."""
    programs = folder.parent / f"{folder.name}-programs"
    programs.mkdir()
    for name, module in (("tsotsallm", "-m tsotsallm"), ("dask", "-m dask"), ("python", ""), ("python3", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / "examples").symlink_to(ROOT / "examples")
    return os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"),
                         "COLUMNS": "100", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def in_process(command: str) -> bool:
    """Whether the command is `tsotsallm` with plain arguments and nothing that a shell would do."""
    words = shlex.split(command, comments=True)
    return bool(words) and words[0] == "tsotsallm" and not any(set(word) & SHELL for word in words)


def run_here(command: str, code: int) -> None:
    found = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
    assert found.exit_code == code, f"{command}\n{found.output}"


def run_in_shell(command: str, folder: Path, environment: dict[str, str], code: int = 0) -> None:
    found = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True,
                           stdin=subprocess.DEVNULL)
    assert found.returncode == code, f"{command}\n{found.stdout[-3000:]}\n{found.stderr[-3000:]}"


def write_files(block: Block, folder: Path) -> None:
    path = folder / block.marks["file"]
    assert path.resolve().is_relative_to(folder), path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text + "\n", "utf-8")


def answers(url: str) -> bool:
    """Whether something listens there; http must answer 200."""
    where = urlsplit(url)
    with socket.socket() as probe:
        if probe.connect_ex((where.hostname, where.port)):
            return False
    if where.scheme == "http":
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except OSError:
            return False
    return True


@contextmanager
def running(command: str, url: str, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """The command while it runs, from when it answers at `url`; it ends with Ctrl-C."""
    waits = url != "at once"
    if waits and answers(url):
        pytest.skip(f"something else answers at {url}")
    log = folder.parent / f"{folder.name}-background.log"
    with log.open("a") as output:
        process = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=folder, env=environment, start_new_session=True,
                                   stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + START_S
            while waits and not answers(url):
                assert process.poll() is None, f"{command}\n{log.read_text()}"
                assert time.monotonic() < deadline, f"{command} does not answer at {url}"
                time.sleep(0.5)
            yield
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks(page.read_text("utf-8")):
        where = f"{page_id(page)}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: a fenced block begins with ```sh, ```text, ```yaml, ..."
        assert set(block.marks) <= set(MARKS), f"{where}: unknown mark {set(block.marks) - set(MARKS)}"
        assert all(block.marks.values()), f"{where}: a mark gives its reason"
        if "slow" in block.marks or "not run" in block.marks:
            assert block.language in ("sh", "python"), f"{where}: only commands are slow or not run"


@pytest.mark.parametrize("page", [page for page in PAGES if any(
    block.runs and not block.slow for block in blocks(page.read_text("utf-8")))], ids=page_id)
def test_quick_commands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    environment = prepared(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    for block in blocks(page.read_text("utf-8")):
        if "file" in block.marks:
            write_files(block, folder)
        elif block.runs and not block.slow and block.language == "python":
            with redirect_stdout(io.StringIO()):
                exec(compile(block.text, f"{page_id(page)}:{block.line}", "exec"), {"__name__": "page"})
        elif block.runs and not block.slow:
            for command in block.commands:
                if in_process(command):
                    run_here(command, block.code)
                else:
                    run_in_shell(command, folder, environment, block.code)


@pytest.mark.slow
@pytest.mark.pages
@pytest.mark.parametrize("page", [page for page in PAGES if any(
    block.runs and block.slow for block in blocks(page.read_text("utf-8")))], ids=page_id)
def test_all_commands(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    folder.mkdir()
    environment = prepared(folder)
    with ExitStack() as stack:
        for block in blocks(page.read_text("utf-8")):
            if "file" in block.marks:
                write_files(block, folder)
            elif block.runs and block.language == "python":
                script = folder / f"block-{block.line}.py"
                script.write_text(block.text, "utf-8")
                run_in_shell(f"python {script.name}", folder, environment)
            elif block.runs:
                *before, last = block.commands
                for command in before:
                    run_in_shell(command, folder, environment, block.code)
                if "background" in block.marks:
                    stack.enter_context(running(last, block.marks["background"], folder, environment))
                else:
                    run_in_shell(last, folder, environment, block.code)
