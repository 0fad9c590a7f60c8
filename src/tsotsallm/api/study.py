"""Studies of many recipes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from tsotsallm.api.computers import Computers
from tsotsallm.api.fit import if_possible
from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.errors import StudyError
from tsotsallm.files import JsonObject
from tsotsallm.records import amended
from tsotsallm.report.page import write as write_page
from tsotsallm.report.studied import study_document
from tsotsallm.study.forecast import StudyForecast, forecast_study
from tsotsallm.study.ledger import Ledger, Trial
from tsotsallm.study.spec import Spec, read_content, spec_from
from tsotsallm.study.study import Found, open_study
from tsotsallm.study.study import run_study as try_all
from tsotsallm.study.workers import OnCluster


@dataclass(frozen=True)
class StudyOptions:
    """What replaces values of a study's file, and where it runs.

    text         text file to evaluate on
    calibration  text to calibrate on
    tasks        tasks of the full evaluation, by name or file
    data         file or folder with the tasks' items
    limit        items of every task, at most
    trials       run at most this number of trials
    hours        hours after which no further trial is begun
    device       "cpu", or "cuda" where there is a GPU; a study may continue on another
    """

    text: str | Path | None = None
    calibration: str | Path | None = None
    tasks: Sequence[str] = ()
    data: str | Path | None = None
    limit: int | None = None
    trials: int | None = None
    hours: float | None = None
    device: str = "cpu"

    def amend(self, content: JsonObject) -> JsonObject:
        """The content of a study's file with these values in place of its own; what is not a mapping is refused later."""
        texts = {name: None if value is None else str(value) for name, value in (("text", self.text), ("data", self.data))}
        evaluation = texts | {"tasks": list(self.tasks) or None, "limit": self.limit}
        source = None if self.calibration is None else str(self.calibration)
        for part, values in (("evaluation", evaluation), ("calibration", {"source": source})):
            given = {name: value for name, value in values.items() if value is not None}
            if given and isinstance(content.get(part), dict | None):
                content = content | {part: {**(content.get(part) or {}), **given}}
        ends = {"trials": self.trials, "hours": self.hours}
        return content | {name: value for name, value in ends.items() if value is not None}


class StudyKeywords(TypedDict, total=False):
    """The fields of StudyOptions, as keywords."""

    text: str | Path | None
    calibration: str | Path | None
    tasks: Sequence[str]
    data: str | Path | None
    limit: int | None
    trials: int | None
    hours: float | None
    device: str


def run_study(spec: str | Path, out: str | Path, *, model: str | Path = EMBEDDED, given: Mapping[str, str] | None = None,
              workers: Computers | None = None, say: Callable[[str], None] = print, options: StudyOptions | None = None,
              **keywords: Unpack[StudyKeywords]) -> Found:
    """Run a study of recipes, or resume it; its ledger and its report go to `out`.

    `spec` is a YAML file or a packaged name, `given` the values that it leaves open. With `workers`, trials run on a
    cluster. More options are fields of StudyOptions, or keywords.
    """
    options = amended(options or StudyOptions(), keywords, run_study)
    study = _read(spec, model, given, options)
    for note in study.notes:
        say(f"note    {note}")
    with workers.cluster(say) if workers is not None else contextlib.nullcontext() as cluster:
        tried = try_all(study, str(model), Path(out), OnCluster(cluster) if cluster is not None else None, say,
                        device=options.device)
    with if_possible(say, "the report"):
        write_page(study_document(Path(out)), Path(out) / "report.html")
    return tried


def plan_study(spec: str | Path, out: str | Path, *, model: str | Path = EMBEDDED, given: Mapping[str, str] | None = None,
               options: StudyOptions | None = None, **keywords: Unpack[StudyKeywords]) -> StudyForecast:
    """Forecast a study that tries every recipe: time, memory and disk, and the recipes that the model does not allow.

    Arguments are those of `run_study`. Raises StudyError for a study whose recipes are drawn one after another.
    """
    return forecast_study(_read(spec, model, given, amended(options or StudyOptions(), keywords, plan_study)), str(model),
                          Path(out))


def _read(spec: str | Path, model: str | Path, given: Mapping[str, str] | None, options: StudyOptions) -> Spec:
    return spec_from(Path(spec).stem, options.amend(read_content(spec)), layers=Checkpoint.open(model).spec.layers,
                     given=given)


def trials_of(folder: str | Path, numbers: Sequence[int]) -> list[Trial]:
    """Some trials of a study, by their numbers. Raises StudyError for one that it does not have."""
    known = {trial.number: trial for trial in open_study(Path(folder)).trials}
    for number in numbers:
        if number not in known:
            raise StudyError(f"the study has no trial {number}; it has {min(known, default=0)} to {max(known, default=0)}")
    return [known[number] for number in numbers]


def notebook(folder: str | Path) -> list[JsonObject]:
    """The lab notebook of a study: what was planned, done, learned, and done next."""
    open_study(Path(folder))
    with closing(Ledger(Path(folder))) as ledger:
        return ledger.notes()


def export_study(folder: str | Path, csv: str | Path) -> int:
    """Write a study's ledger as a table; returns the number of trials."""
    open_study(Path(folder))
    with closing(Ledger(Path(folder))) as ledger:
        return ledger.export_csv(Path(csv))
