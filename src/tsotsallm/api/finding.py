"""The best model for a device; studies of many recipes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tsotsallm.api.computers import Computers
from tsotsallm.api.reporting import beginnings, samples_of
from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.checkpoint.writer import write_json
from tsotsallm.errors import StudyError, TsotsallmError
from tsotsallm.evaluation.examination import Examination, check_tasks, examine
from tsotsallm.report.fitted import fit_document
from tsotsallm.report.page import write as write_page
from tsotsallm.report.studied import study_document
from tsotsallm.run.work import Progress
from tsotsallm.study.fit import Fitted, target_of
from tsotsallm.study.fit import fit as find_fit
from tsotsallm.study.ledger import Ledger, Trial
from tsotsallm.study.spec import read_content as study_content
from tsotsallm.study.spec import spec_from
from tsotsallm.study.study import Found, open_study
from tsotsallm.study.study import run_study as try_all
from tsotsallm.study.units import Settings as FitSettings
from tsotsallm.study.units import whole_text
from tsotsallm.study.workers import OnCluster
from tsotsallm.units import bytes_from_text


def fit(model: str | Path, out: str | Path, *, device: str | None = None, size: int | str | None = None,
        faster_than: float | None = None, keep_text: Sequence[str | Path] = (), calibration: str | Path | None = None,
        windows: int = 32, window: int = 512, minutes: float = 60.0, recover: bool = False, quick: bool = False,
        tasks: Sequence[str | Path] = (), data: str | Path | None = None, limit: int | None = None, seed: int = 0,
        restart: bool = False, say: Callable[[str], None] = print,
        progress: Callable[[Progress], None] = lambda _now: None) -> tuple[Fitted, Examination | None]:
    """Find the best model for a device or for a GGUF file of a size: what was found, and the answers to the tasks.

    With `recover`, layers of a cut model learn from the original's before their numbers get fewer bits; `quick` rounds
    candidates in a third of the time, at some loss; `restart` deletes the unfinished work of an earlier fit in `out`.
    """
    if tasks:
        check_tasks(tasks, data=data, limit=limit)
    checkpoint = Checkpoint.open(model)
    target = target_of(checkpoint.spec.kv_bytes_per_token(), device=device, faster_than=faster_than,
                       size=None if size is None else bytes_from_text(str(size), "--bytes", StudyError))
    settings = FitSettings(None if calibration is None else str(calibration), tuple(map(str, keep_text)), windows,
                           min(window, checkpoint.spec.context), seed, minutes=minutes,
                           recover=({"distill": {"mode": "layers"}},) if recover else (), quick=quick)
    found = find_fit(str(model), target, Path(out), settings, say, progress, restart=restart)
    answers = examine([model, found.path], tasks, data=data, limit=limit, reference=model) if tasks else None
    if answers is not None:
        content = json.loads((Path(out) / "fit.json").read_text("utf-8"))
        write_json(Path(out) / "fit.json", content | {"examination": answers.plain()})
    with _if_possible(say, "the report"):
        samples = samples_of({str(model): str(model), "fitted": str(found.path)},
                             beginnings(whole_text(checkpoint, settings)))
        write_page(fit_document(Path(out), [answers] if answers else [], samples), Path(out) / "report.html")
    return found, answers


@contextlib.contextmanager
def _if_possible(say: Callable[[str], None], what: str) -> Iterator[None]:
    """Do without something that cannot be made, and tell why."""
    try:
        yield
    except TsotsallmError as error:
        say(f"{what} is left out: {error}")


def run_study(spec: str | Path, out: str | Path, *, model: str | Path = EMBEDDED, given: Mapping[str, str] | None = None,
          text: str | Path | None = None, calibration: str | Path | None = None, trials: int | None = None,
          hours: float | None = None, workers: Computers | None = None,
          say: Callable[[str], None] = print) -> Found:
    """Run a study of recipes, or go on with it; options stand in place of what its file says.

    With `workers`, trials run on a cluster.
    """
    content = study_content(spec)
    for part, name, value in (("evaluation", "text", text), ("calibration", "source", calibration)):
        if value is not None and isinstance(content.get(part), dict | None):       # else refused below
            content[part] = {**(content.get(part) or {}), name: str(value)}
    content |= {name: value for name, value in (("trials", trials), ("hours", hours)) if value is not None}
    layers = Checkpoint.open(model).spec.layers
    study = spec_from(Path(spec).stem, content, layers=layers, given=given)
    with workers.cluster(say) if workers is not None else contextlib.nullcontext() as cluster:
        found = try_all(study, str(model), Path(out), OnCluster(cluster) if cluster is not None else None, say)
    with _if_possible(say, "the report"):
        write_page(study_document(Path(out)), Path(out) / "report.html")
    return found


def trials_of(folder: str | Path, numbers: Sequence[int]) -> list[Trial]:
    """Some trials of a study."""
    known = {trial.number: trial for trial in open_study(Path(folder)).trials}
    for number in numbers:
        if number not in known:
            raise StudyError(f"the study has no trial {number}; it has {min(known, default=0)} to {max(known, default=0)}")
    return [known[number] for number in numbers]


def notebook(folder: str | Path) -> list[dict[str, Any]]:
    """The lab notebook of a study: what was planned, done, learned, and done next."""
    open_study(Path(folder))
    with closing(Ledger(Path(folder))) as ledger:
        return ledger.notes()


def export_study(folder: str | Path, csv: str | Path) -> int:
    """Write a study's ledger as a table; the number of trials."""
    open_study(Path(folder))
    with closing(Ledger(Path(folder))) as ledger:
        return ledger.export_csv(Path(csv))
