"""What the command line says about itself."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.cli.running import tsotsallm, within
from tsotsallm import __version__
from tsotsallm.cli import FIRST, SECTIONS, app


def test_help_names_every_verb() -> None:
    text = tsotsallm("--help").stdout
    for verb in ("compress", "plan", "evaluate", "inspect", "recipes"):
        assert verb in text


def commands_in(*group: str) -> list[str]:
    """The lines of a help text about commands, headings included, on a terminal of 80 columns."""
    found = subprocess.run([sys.executable, "-m", "tsotsallm", *group, "--help"], capture_output=True, text=True, check=True,
                           env=os.environ | {"COLUMNS": "80"})
    return [line for line in found.stdout.partition("Commands:\n")[2].splitlines() if line]


@pytest.mark.parametrize("group", [[], ["study"], ["bundle"], ["tables"]])
def test_every_command_is_told_in_a_whole_line_of_80_columns(group: list[str]) -> None:
    headings = [f"  {heading}:" for heading in SECTIONS] if not group else []
    commands = [line for line in commands_in(*group) if line not in headings]
    assert len(commands) >= 2
    assert all(len(line) <= 80 and re.fullmatch(r"(  ){1,2}\S+ +\S.*[^.]\.", line) for line in commands), commands


def test_help_groups_every_command_once() -> None:
    lines = commands_in()
    headings = [line.strip(" :") for line in lines if line.endswith(":")]
    assert headings == ["Reduce", "Measure", "Search", "Use", "Share", "Lab"]
    names = [line.split()[0] for line in lines if not line.endswith(":")]
    assert len(names) == len(set(names)) == 22
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines if not line.endswith(":")}) == 1


def options_of(command: Any, name: str = "tsotsallm") -> Iterator[tuple[str, Any]]:
    for option in command.params:
        yield f"{name} {option.name}", option
    for inner, one in getattr(command, "commands", {}).items():
        yield from options_of(one, f"{name} {inner}")


def test_the_help_of_every_option_is_a_sentence() -> None:
    texts = {where: option.help for where, option in options_of(typer.main.get_command(app)) if option.name != "help"}
    assert len(texts) > 150
    assert not {where: text for where, text in texts.items() if not re.fullmatch(r"[A-Z].*\.", text) or re.search(
        r"so many|go(es)? on|anew|\btold?\b|comes? along", text)}


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
    assert "`tsotsallm fit MODEL`" in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.pages
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


@pytest.mark.parametrize("command", [["export"], ["compress"], ["fit"], ["study", "run"], ["tables", "score"]])
def test_help_names_values_in_words_and_only_the_side_of_a_switch_that_acts(command: list[str]) -> None:
    shown = within(*command, "--help").stdout
    assert not re.search(r"<(str|int|float|path|list)", shown)
    assert not re.findall(r"--no-(?!verify)\S+", shown)
