"""The best model for a device or a size."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from tsotsallm.api.report import beginnings, samples_of
from tsotsallm.calibration import SELF, window_of, writes_its_text
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.writer import write_json
from tsotsallm.downloads import fetch_if_room
from tsotsallm.engine.llama import most_context
from tsotsallm.errors import StudyError, TsotsallmError
from tsotsallm.evaluation.examination import Examination, check_tasks, examine
from tsotsallm.export.publish import modelfile_path, write_modelfile
from tsotsallm.fit.reach import Settings as FitSettings
from tsotsallm.fit.rounds import Fitted, Round
from tsotsallm.fit.search import fit as find_fit
from tsotsallm.fit.target import refuse_what_fits, target_of, usual_minutes, usual_target
from tsotsallm.fit.units import whole_text
from tsotsallm.records import amended
from tsotsallm.report.fitted import fit_document
from tsotsallm.report.page import write as write_page
from tsotsallm.run.work import Progress
from tsotsallm.units import bytes_from_text, human_bytes


@dataclass(frozen=True)
class FitOptions:
    """How a model is searched for.

    keep_text        texts in the languages to keep; the other tokens are removed from the vocabulary
    calibration      text file, directory of texts, or hub data set (None: what a model that converses writes itself; the
                     world of the embedded model; else the default text of the hub)
    windows, window  number of calibration windows, and their length in tokens (None: 512, or the model's context where that
                     is shorter), drawn by `seed`
    minutes          when they are over, the work in progress stops, and the best candidate so far is the result (None: as
                     many as its work is forecast to take)
    recover          layers of a cut model learn from the original's before their numbers get fewer bits
    tune             the best candidate learns its scales and norms, where minutes are left for it
    quick            round candidates in a third of the time, at some loss
    restart          delete the unfinished work of an earlier fit in the same folder
    tasks            tasks to evaluate the original and the result on, with their `data`, at most `limit` items of each
    heard            called with every candidate once it is measured
    """

    keep_text: Sequence[str | Path] = ()
    calibration: str | Path | None = None
    windows: int = 32
    window: int | None = None
    seed: int = 0
    minutes: float | None = None
    recover: bool = False
    tune: bool = False
    quick: bool = False
    restart: bool = False
    tasks: Sequence[str | Path] = ()
    data: str | Path | None = None
    limit: int | None = None
    heard: Callable[[Round], None] = lambda _one: None


class FitKeywords(TypedDict, total=False):
    """The fields of FitOptions, as keywords."""

    keep_text: Sequence[str | Path]
    calibration: str | Path | None
    windows: int
    window: int | None
    seed: int
    minutes: float | None
    recover: bool
    tune: bool
    quick: bool
    restart: bool
    tasks: Sequence[str | Path]
    data: str | Path | None
    limit: int | None
    heard: Callable[[Round], None]


def fit(model: str | Path, out: str | Path | None = None, *, device: str | None = None, size: int | str | None = None,
        faster_than: float | None = None, say: Callable[[str], None] = print,
        progress: Callable[[Progress], None] = lambda _now: None, options: FitOptions | None = None,
        **keywords: Unpack[FitKeywords]) -> tuple[Fitted, Examination | None]:
    """Find the best model for a device or for a GGUF file of `size` bytes; returns it, and the scores on the tasks.

    Without either the file has 4.5 bits a weight, or less where this computer has no room for that. `faster_than` asks for
    tokens per second on this machine. Model, GGUF file, Modelfile and report go to `out` (None: NAME-small in the current
    directory). More options are fields of FitOptions, or keywords.
    Raises FitsAlready, a StudyError, where the device holds the model as it is, StudyError where the target cannot be met.
    """
    options = amended(options or FitOptions(), keywords, fit)
    if options.tasks:
        check_tasks(options.tasks, data=options.data, limit=options.limit)
    fetch_if_room(model, say)
    checkpoint = Checkpoint.streamed(model)
    if device is None and size is None:
        target = usual_target(checkpoint, str(model), faster_than)
    else:
        target = target_of(checkpoint.spec.kv_bytes_per_token(), device=device, faster_than=faster_than,
                           size=None if size is None else bytes_from_text(str(size), "--bytes", StudyError))
    refuse_what_fits(checkpoint, str(model), target)
    out = usual_folder(model) if out is None else Path(out)
    if target.why:
        say(f"the file is to have {human_bytes(target.bytes)} at most: {target.why}")
    window = window_of(checkpoint, options.window, FitSettings.window)
    calibration = None if options.calibration is None else str(options.calibration)
    if calibration is None and not options.keep_text and writes_its_text(checkpoint):
        calibration = SELF
        say("it is calibrated on what the model writes itself; --calibration takes texts of yours")
    minutes = options.minutes
    if minutes is None:
        minutes = usual_minutes(model, calibration, options.windows, window)
        say(f"the search takes {minutes:g} minutes at most, and can be stopped and resumed; --minutes sets another limit")
    settings = FitSettings(calibration, tuple(map(str, options.keep_text)), options.windows, window, options.seed,
                           minutes=minutes, recover=({"distill": {"mode": "layers"}},) if options.recover else (),
                           tune={"tune": {}} if options.tune else None, quick=options.quick)
    fitted = find_fit(str(model), target, out, settings, say, progress, heard=options.heard,
                      restart=options.restart)
    modelfile = modelfile_path(fitted.gguf)
    write_modelfile(modelfile, fitted.gguf, None, most_context(checkpoint.spec.context))
    scores = examine([model, fitted.path], options.tasks, data=options.data, limit=options.limit,
                     reference=model) if options.tasks else None
    if scores is not None:
        content = json.loads((out / "fit.json").read_text("utf-8"))
        write_json(out / "fit.json", content | {"examination": scores.plain()})
    with if_possible(say, "the report"):
        samples = samples_of({str(model): str(model), "fitted": str(fitted.path)},
                             beginnings(whole_text(checkpoint, settings).whole))
        write_page(fit_document(out, [scores] if scores else [], samples), out / "report.html")
    return fitted, scores


def usual_folder(model: str | Path) -> Path:
    """Where a fit goes that names no folder: NAME-small in the current directory, NAME without the ending of a file."""
    name = str(model).removeprefix("ollama:").rstrip("/\\").replace("\\", "/").rpartition("/")[2].partition("@")[0]
    return Path(f"{name.removesuffix('.gguf').replace(':', '-')}-small")


@contextlib.contextmanager
def if_possible(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Do without something that cannot be made, and report why."""
    try:
        yield
    except TsotsallmError as error:
        say(f"{what} is left out: {error}")
