"""tsotsallm fit: the best model for a device or a size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsotsallm.cli.common import (
    AsJson,
    Calibration,
    Data,
    Items,
    Model,
    Restart,
    Threads,
    Window,
    Windows,
    WindowsSeed,
    answers,
    names_in,
    print_json,
    to_stderr,
)

if TYPE_CHECKING:
    from tsotsallm.evaluation.examination import Examination
    from tsotsallm.fit.rounds import Fitted


def fit(model: Model,
        out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write the model, its GGUF file and the report "
                                                              "to.")],
        device: Annotated[str | None, typer.Option(help="Name of the device; `tsotsallm devices` lists them.")] = None,
        size: Annotated[str | None, typer.Option("--bytes", help="Largest size of the GGUF file in bytes, such as "
                                                                 "700MB.")] = None,
        faster_than: Annotated[float | None, typer.Option(help="Lowest speed in tokens per second, measured on this "
                                                               "machine.")] = None,
        keep_text: Annotated[list[Path] | None, typer.Option(help="Text file in a language to keep; may be given several "
                                                                  "times.")] = None,
        calibration: Calibration = None, windows: Windows = 32, window: Window = 512,
        minutes: Annotated[float, typer.Option(help="Minutes after which no further candidate is begun.")] = 60.0,
        recover: Annotated[bool, typer.Option(help="Let the layers of a cut model learn from the original's.")] = False,
        quick: Annotated[bool, typer.Option(help="Round candidates in a third of the time, at some loss.")] = False,
        task: Annotated[str | None, typer.Option(help="Tasks to evaluate the original and the result on, separated by "
                                                      "commas.")] = None,
        data: Data = None, limit: Items = None, seed: WindowsSeed = 0, restart: Restart = False, threads: Threads = None,
        as_json: AsJson = False) -> None:
    """Find the best model for a device or a file size.

    Writes the model, and its GGUF file beside it.
    """
    with answers(as_json):
        from tsotsallm.api.fit import fit
        from tsotsallm.cli.lines import progress_bar

        bar, show = progress_bar(as_json)
        with bar:
            fitted, scores = fit(
                model, out, device=device, size=size, faster_than=faster_than, say=to_stderr if as_json else print,
                progress=show, keep_text=keep_text or (), calibration=calibration, windows=windows, window=window,
                minutes=minutes, recover=recover, quick=quick, tasks=names_in(task), data=data, limit=limit, seed=seed,
                restart=restart)
        if as_json:
            print_json(fitted.plain() | ({"examination": scores.plain()} if scores else {}))
            return
        print_fit(fitted, scores)


def print_fit(fitted: Fitted, scores: Examination | None) -> None:
    """Print one row per candidate, then the best one, and the scores on tasks where there are some."""
    from tsotsallm.cli.evaluate import print_examination
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_bytes, human_seconds

    table("Rounds", ["round", "structure", "windows", "predicted KL", "measured KL", "file", "tokens/s"], [
        [str(one.number), one.structure, str(one.windows), f"{one.predicted:.4f}", f"{one.measured:.4f} ± {one.error:.4f}",
         human_bytes(one.bytes), "" if one.decode_tokens_per_s is None else f"{one.decode_tokens_per_s:.1f}"]
        for one in fitted.rounds])
    best = fitted.best
    print(f"best    round {best.number}: {best.structure}; KL {best.measured:.4f} ± {best.error:.4f}, perplexity "
          f"{fitted.evaluation['perplexity']:.4f} (original {fitted.evaluation['reference_perplexity']:.4f}) on held-out "
          "text")
    print(f"file    {human_bytes(best.bytes)} of {human_bytes(fitted.target.bytes)}; the prediction "
          f"{'holds' if fitted.holds else 'does not hold'}; took {human_seconds(fitted.seconds)}")
    print(f"model   {fitted.path}\ngguf    {fitted.gguf}")
    if (report := fitted.path.parent / "report.html").exists():
        print(f"report  {report}")
    if scores is not None:
        print_examination(scores, groups=False)
