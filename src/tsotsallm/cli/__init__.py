"""The command line: parse, print, exit code. The only place with handlers, progress bars and exits.

Every verb has a file, which holds the command and its printing.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tsotsallm.cli import (
    analyze,
    annotate,
    bundle,
    chat,
    compress,
    devices,
    evaluate,
    export,
    fit,
    franken,
    generate,
    inspect,
    plan,
    push,
    recipes,
    report,
    serve,
    studio,
    study,
    tables,
    tasks,
    worker,
)
from tsotsallm.cli.common import answers, close_output
from tsotsallm.machine import PROGRESS, wait_passively

FIRST = ("tsotsallm inspect embedded", "tsotsallm compress embedded gptq:mixed:4.5 -o tiny --windows 16 --window 256",
         "tsotsallm evaluate tiny --reference embedded --limit 20")
"""What to try first."""
SECTIONS: dict[str, tuple[Any, ...]] = {
    "Reduce": (compress.compress, plan.plan, recipes.recipes),
    "Measure": (inspect.inspect, evaluate.evaluate, tasks.tasks, analyze.analyze),
    "Search": (fit.fit, devices.devices, study.app, worker.worker),
    "Use": (generate.generate, chat.chat, serve.serve, studio.studio),
    "Share": (export.export, report.report, bundle.app, push.push),
    "Lab": (franken.franken, annotate.annotate, tables.app)}
"""Heading in the help -> its commands: functions, and groups of commands."""


class Sections(TyperGroup):
    """Commands that the help lists under headings, each in one whole line."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the headings of SECTIONS with their commands below; all descriptions begin in the same column."""
        width = max(map(len, self.commands))
        with formatter.section("Commands"):
            for heading, commands in SECTIONS.items():
                with formatter.section(heading):
                    formatter.write_dl([(name.ljust(width), self.commands[name].get_short_help_str(formatter.width))
                                        for name in map(name_of, commands)])


class Command(TyperCommand):
    """A command whose help names values in words instead of Python's types, and of a switch only the side that acts."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        shown: list[Any] = self.params
        for option in shown:
            if option.param_type_name == "argument":
                option.metavar = option.metavar or str(option.name).upper() + "..." * (option.nargs == -1)
                option.display_type = lambda ctx: ""        # newer versions of typer put the type behind the name
            elif not getattr(option, "is_flag", False):
                option.metavar = option.metavar or value_in_words(option)
            elif option.secondary_opts and not option.default:
                option.secondary_opts, option.show_default = [], False


def value_in_words(option: Any) -> str:
    """What stands for an option's value in its help."""
    kind = str(getattr(getattr(option, "type_descriptor", None), "annotation", getattr(option, "type", ""))).lower()
    return "PATH" if "path" in kind else "NUMBER" if "int" in kind or "float" in kind else "TEXT"


def name_of(command: Any) -> str:
    """What a user types for a command or a group of commands."""
    return str(command.info.name if isinstance(command, typer.Typer) else command.__name__)


app = typer.Typer(cls=Sections, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for command in (one for commands in SECTIONS.values() for one in commands):
    if isinstance(command, typer.Typer):
        app.add_typer(command)
    else:
        app.command()(command)
for one in (app, *(group.typer_instance for group in app.registered_groups)):
    for info in one.registered_commands if one is not None else ():
        info.cls = Command


def _show_version(asked: bool) -> None:
    from tsotsallm.version import __version__

    if asked:
        print(f"tsotsallm {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def begin(context: typer.Context,
          version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True,
                                                help="Show the version and exit.")] = False) -> None:
    """Make LLaMA-family models small enough for the computer you have."""
    if context.invoked_subcommand is None:
        print("To get started, with the small model that is included:", "", *(f"  {line}" for line in FIRST), "",
              "To use your own model, give its folder instead of 'embedded'.",
              "`tsotsallm fit MODEL` makes it small enough for this computer by itself,",
              "`tsotsallm studio` does so in a browser. tsotsallm --help lists all commands.",
              sep="\n")


def main() -> None:
    """Run the command line of this process, and exit."""
    wait_passively()
    if os.environ.get(PROGRESS):        # who reads our progress stops us by Ctrl-C, which a shell's background switches off
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")        # a console that lacks a letter shows another
    try:
        with answers():
            # YAML of a list begins as options do, and means the same on a line of its own
            sys.exit(app([f"\n{one}" if one.startswith("- ") else one for one in sys.argv[1:]], standalone_mode=False))
    finally:
        close_output()
