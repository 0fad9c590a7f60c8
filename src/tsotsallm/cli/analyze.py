"""tsotsallm analyze: pictures of what happens inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from tsotsallm.cli.common import AsJson, Device, Model, Scratch, Threads, answers, print_json

if TYPE_CHECKING:
    from tsotsallm.analysis.analyze import Format


def analyze(model: Model,
            out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write the pictures and analysis.json to.")],
            text: Annotated[Path | None, typer.Option(help="UTF-8 text file to run through the model.")] = None,
            reference: Annotated[str | None, typer.Option(help="The original model, to draw beside this one.")] = None,
            layers: Annotated[str | None, typer.Option(help="Layers to draw, such as 0,7,-1 (default: first and last).")] =
            None,
            heads: Annotated[str | None, typer.Option(help="Heads to draw, such as 0,1,2 (default: the first eight).")] =
            None,
            tokens: Annotated[int, typer.Option(help="Number of tokens of the text whose attention is drawn.")] = 256,
            picture: Annotated[str, typer.Option(help="Format of the pictures: png or svg.")] = "png",
            device: Device = "cpu", scratch: Scratch = None, threads: Threads = None, as_json: AsJson = False) -> None:
    """Draw attention, layer importance and outliers of a model.

    Writes pictures and a JSON file.
    """
    with answers(as_json):
        from tsotsallm.api.analyze import analyze
        from tsotsallm.cli.lines import step_bar
        from tsotsallm.errors import TsotsallmError

        if picture not in ("png", "svg"):
            raise TsotsallmError(f"--picture is {picture!r}; it takes png or svg")
        bar, show = step_bar(as_json)
        with bar:
            analysis = analyze(model, text, out, reference=reference, layers=_numbers(layers), heads=_numbers(heads),
                               tokens=tokens, picture=cast("Format", picture), device=device, scratch=scratch, tick=show)
        if as_json:
            print_json(analysis.plain())
            return
        for path in analysis.files:
            print(path)


def _numbers(text: str | None) -> list[int] | None:
    from tsotsallm.errors import TsotsallmError

    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise TsotsallmError(f"{text!r} is not a list of numbers, such as 0,7,-1") from None
