"""The command line: parse, print, exit code. The only place with handlers, progress bars and exits."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from tsotsallm.cli import annotating, exporting, finding, measuring, reducing, serving, talking
from tsotsallm.cli.common import answers, close_output
from tsotsallm.machine import wait_passively

FIRST = ("tsotsallm inspect embedded", "tsotsallm compress embedded gptq:4:64 -o small --windows 16 --window 256",
         "tsotsallm evaluate small --reference embedded --limit 20")
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
for part in (reducing, measuring, finding, exporting, talking, serving, annotating):
    app.add_typer(part.app)


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
        print("To begin with, on the model that comes along:", "", *(f"  {line}" for line in FIRST), "",
              "With a model of your own give its folder in place of 'embedded'.", "tsotsallm --help lists all commands.",
              sep="\n")


def main() -> None:
    wait_passively()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")        # a console that lacks a letter shows another
    try:
        with answers():
            sys.exit(app(standalone_mode=False))
    finally:
        close_output()
