"""tsotsallm studio: models made on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import Context, Country, ServingThreads, answers
from tsotsallm.cli.serve import MaxTokens, Port, Slots


def studio(folder: Annotated[Path, typer.Option(help="Folder with models; new ones are written to it.")] = Path("."),
           models: Annotated[list[str] | None, typer.Argument(help="Models to load at the start.")] = None,
           port: Port = 8080, slots: Slots = 4, max_tokens: MaxTokens = 1024, context: Context = None,
           country: Country = None, threads: ServingThreads = None) -> None:
    """Compress models on a page in the browser.

    Choose a recipe, see the plan, start, watch, stop, open the report, chat.
    """
    with answers():
        from tsotsallm.api.serve import serve

        serve(models or [], port=port, slots=slots, max_tokens=max_tokens, context=context, country=country, studio=folder)
