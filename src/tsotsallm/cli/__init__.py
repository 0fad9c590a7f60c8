"""The command line: parse, print, exit code. The only place with handlers, progress bars and exits."""

from __future__ import annotations

import typer

from tsotsallm.cli import annotating, exporting, finding, measuring, reducing, serving, talking

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Make LLaMA-family models small enough for the computer you have.")
for part in (reducing, measuring, finding, exporting, talking, serving, annotating):
    app.add_typer(part.app)


def main() -> None:
    app()
