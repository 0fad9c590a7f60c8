"""The best model for a device or a size."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from tsotsallm.api.report import beginnings, samples_of
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.writer import write_json
from tsotsallm.errors import StudyError, TsotsallmError
from tsotsallm.evaluation.examination import Examination, check_tasks, examine
from tsotsallm.fit.rounds import Fitted
from tsotsallm.fit.search import fit as find_fit
from tsotsallm.fit.target import target_of
from tsotsallm.fit.units import Settings as FitSettings
from tsotsallm.fit.units import whole_text
from tsotsallm.records import amended
from tsotsallm.report.fitted import fit_document
from tsotsallm.report.page import write as write_page
from tsotsallm.run.work import Progress
from tsotsallm.units import bytes_from_text


@dataclass(frozen=True)
class FitOptions:
    """How a model is searched for.

    keep_text        texts in the languages to keep; the other tokens are removed from the vocabulary
    calibration      text file, directory of texts, or hub data set
    windows, window  number of calibration windows, and their length in tokens, drawn by `seed`
    minutes          no candidate is begun later
    recover          layers of a cut model learn from the original's before their numbers get fewer bits
    quick            round candidates in a third of the time, at some loss
    restart          delete the unfinished work of an earlier fit in the same folder
    tasks            tasks to evaluate the original and the result on, with their `data`, at most `limit` items of each
    """

    keep_text: Sequence[str | Path] = ()
    calibration: str | Path | None = None
    windows: int = 32
    window: int = 512
    seed: int = 0
    minutes: float = 60.0
    recover: bool = False
    quick: bool = False
    restart: bool = False
    tasks: Sequence[str | Path] = ()
    data: str | Path | None = None
    limit: int | None = None


class FitKeywords(TypedDict, total=False):
    """The fields of FitOptions, as keywords."""

    keep_text: Sequence[str | Path]
    calibration: str | Path | None
    windows: int
    window: int
    seed: int
    minutes: float
    recover: bool
    quick: bool
    restart: bool
    tasks: Sequence[str | Path]
    data: str | Path | None
    limit: int | None


def fit(model: str | Path, out: str | Path, *, device: str | None = None, size: int | str | None = None,
        faster_than: float | None = None, say: Callable[[str], None] = print,
        progress: Callable[[Progress], None] = lambda _now: None, options: FitOptions | None = None,
        **keywords: Unpack[FitKeywords]) -> tuple[Fitted, Examination | None]:
    """Find the best model for a device or for a GGUF file of `size` bytes; returns it, and the scores on the tasks.

    `faster_than` asks for tokens per second on this machine. Model, GGUF file and report go to `out`. More options are
    fields of FitOptions, or keywords.
    Raises StudyError where the target cannot be met.
    """
    options = amended(options or FitOptions(), keywords, fit)
    if options.tasks:
        check_tasks(options.tasks, data=options.data, limit=options.limit)
    checkpoint = Checkpoint.open(model)
    target = target_of(checkpoint.spec.kv_bytes_per_token(), device=device, faster_than=faster_than,
                       size=None if size is None else bytes_from_text(str(size), "--bytes", StudyError))
    settings = FitSettings(None if options.calibration is None else str(options.calibration),
                           tuple(map(str, options.keep_text)), options.windows, min(options.window, checkpoint.spec.context),
                           options.seed, minutes=options.minutes,
                           recover=({"distill": {"mode": "layers"}},) if options.recover else (), quick=options.quick)
    fitted = find_fit(str(model), target, Path(out), settings, say, progress, restart=options.restart)
    scores = examine([model, fitted.path], options.tasks, data=options.data, limit=options.limit,
                     reference=model) if options.tasks else None
    if scores is not None:
        content = json.loads((Path(out) / "fit.json").read_text("utf-8"))
        write_json(Path(out) / "fit.json", content | {"examination": scores.plain()})
    with if_possible(say, "the report"):
        samples = samples_of({str(model): str(model), "fitted": str(fitted.path)},
                             beginnings(whole_text(checkpoint, settings).whole))
        write_page(fit_document(Path(out), [scores] if scores else [], samples), Path(out) / "report.html")
    return fitted, scores


@contextlib.contextmanager
def if_possible(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Do without something that cannot be made, and report why."""
    try:
        yield
    except TsotsallmError as error:
        say(f"{what} is left out: {error}")
