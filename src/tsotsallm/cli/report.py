"""tsotsallm report: pages about results, fits and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import (
    AsJson,
    Data,
    EvaluationCountry,
    Items,
    ItemsSeed,
    Speed,
    Tasks,
    Threads,
    answers,
    names_in,
    print_json,
)


def report(paths: Annotated[list[str], typer.Argument(help="What to report on: a result, several results, the folder of a "
                                                           "fit, or that of a study.")],
           out: Annotated[Path, typer.Option("-o", "--out", help="HTML page to write, such as report.html.")],
           reference: Annotated[str | None, typer.Option(help="The original model, to compare results with.")] = None,
           text: Annotated[Path | None, typer.Option(help="UTF-8 text file to evaluate on.")] = None,
           task: Tasks = None, data: Data = None, limit: Items = None, seed: ItemsSeed = 0,
           prompts: Annotated[Path | None, typer.Option(help="Text file with a prompt in every line, to show "
                                                             "continuations.")] = None,
           tokens: Annotated[int, typer.Option(help="Length of each continuation in tokens.")] = 40,
           speed: Speed = False, country: EvaluationCountry = None, threads: Threads = None,
           as_json: AsJson = False) -> None:
    """Write an HTML page about results, a fit or a study.

    It shows what was done, what was lost and what it costs, with pictures, and works offline.
    """
    with answers(as_json):
        from tsotsallm.api.report import write_report
        from tsotsallm.cli.lines import step_bar

        bar, show = step_bar(as_json)
        with bar:
            written = write_report(paths, out, reference=reference, text=text, tasks=names_in(task), data=data, limit=limit,
                                   seed=seed, prompts=prompts, tokens=tokens, speed=speed, country=country, tick=show)
        if as_json:
            print_json([str(path) for path in written])
            return
        print(written[0])
        print(f"{len(written) - 1} pictures beside it, in {out.stem}-pictures" if len(written) > 1 else "no pictures")
