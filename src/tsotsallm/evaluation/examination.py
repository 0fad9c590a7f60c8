"""Evaluate several models on several tasks with the same items, side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from tsotsallm.compression import check_device
from tsotsallm.errors import TsotsallmError
from tsotsallm.evaluation.cost import Cost, check_fits, cost_of, measure_speed
from tsotsallm.evaluation.energy import carbon_by_country
from tsotsallm.evaluation.forecast import TaskForecast, forecast
from tsotsallm.evaluation.options import RunKeywords, RunOptions
from tsotsallm.evaluation.perplexity import Kind
from tsotsallm.evaluation.results import Comparison, TaskResult, comparable, compare
from tsotsallm.evaluation.task_run import PreparedTask, open_examinee, prepare, protocol_of, run_task
from tsotsallm.evaluation.tasks import Task, read_task
from tsotsallm.records import amended


@dataclass(frozen=True)
class Examination:
    """What several models scored on several tasks, side by side, and what each costs."""

    models: tuple[str, ...]
    results: tuple[tuple[TaskResult, ...], ...]     # one tuple a task, one result a model
    comparisons: tuple[Comparison, ...]
    costs: tuple[Cost, ...]

    def plain(self) -> dict[str, object]:
        """Everything as plain data for JSON."""
        return {"models": list(self.models), "results": [[result.plain() for result in row] for row in self.results],
                "comparisons": [comparison.plain() for comparison in self.comparisons],
                "costs": [cost.plain() for cost in self.costs]}


@dataclass(frozen=True)
class ExaminationOptions(RunOptions):
    """How an evaluation on tasks runs, and what it measures besides the scores.

    speed      measure speed and memory as well
    country    ISO code of the country (CMR, KEN, ...) whose electricity the energy is converted with, or several with
               commas, of which the first counts for single queries; implies `speed`
    by_sweeps  True generates by sweeps although the model fits in memory; None decides by the memory that is free
    """

    speed: bool = False
    country: str | None = None
    by_sweeps: bool | None = None


class ExaminationKeywords(RunKeywords, total=False):
    """The fields of ExaminationOptions, as keywords."""

    speed: bool
    country: str | None
    by_sweeps: bool | None


def examine(models: Sequence[str | Path], tasks: Sequence[str | Path | Task], *, data: str | Path | None = None,
            limit: int | None = None, seed: int = 0, reference: str | Path | None = None,
            options: ExaminationOptions | None = None, **keywords: Unpack[ExaminationKeywords]) -> Examination:
    """Evaluate every model on every task with the same items; differences are to the first model.

    Tasks are packaged names, YAML files or BIG-bench JSON files; `data` is a file for one task or a folder that the tasks
    find theirs in. Everything is read and checked before a model is opened. `limit` items are drawn by `seed`.
    How it runs is given as `options` or as keywords: device, scratch, tick, speed, country, by_sweeps.
    """
    options = amended(options or ExaminationOptions(), keywords, examine)
    speed, country = options.speed, options.country
    prepared = _prepared(models, tasks, data, limit, seed)
    if country is not None:
        carbon_by_country(country)
    where = check_device(options.device)
    with tempfile.TemporaryDirectory(dir=options.scratch, ignore_cleanup_errors=True) as folder:
        compared = open_examinee(reference, Path(folder), device=where) if reference is not None else None
        examinees = [open_examinee(model, Path(folder), device=where, by_sweeps=options.by_sweeps, tick=options.tick)
                     for model in models]
        prepared = [task.answered_by(compared or examinees[0]) for task in prepared]
        protocols = [[protocol_of(examinee, task, compared) for task in prepared] for examinee in examinees]
        for others in protocols[1:]:
            for task, first, other in zip(prepared, protocols[0], others, strict=True):
                comparable(task.task.name, first, other)
        for model in models if speed or country else ():
            check_fits(model, where)
        rows: list[list[TaskResult]] = [[] for _ in prepared]
        costs = []
        for model, examinee, own in zip(models, examinees, protocols, strict=True):
            for row, task, protocol in zip(rows, prepared, own, strict=True):
                row.append(run_task(examinee, task, compared, protocol))
            examinee.forget_model()
            measured = measure_speed(model, device=where, country=country) if speed or country else None
            costs.append(cost_of(examinee.checkpoint, str(model), speed=measured))
    comparisons = [comparison for row in rows for comparison in compare(row)]
    return Examination(tuple(map(str, models)), tuple(map(tuple, rows)), tuple(comparisons), tuple(costs))


def check_tasks(tasks: Sequence[str | Path], *, data: str | Path | None = None, limit: int | None = None) -> None:
    """Read tasks and their data, so that their faults raise TaskError before a long job starts."""
    _prepared(["any"], tasks, data, limit, 0)


def _prepared(models: Sequence[str | Path], tasks: Sequence[str | Path | Task], data: str | Path | None,
              limit: int | None, seed: int) -> list[PreparedTask]:
    """Tasks with their data, read and checked; the items of a BIG-bench task are in the task's own file."""
    if not models or not tasks:
        raise TsotsallmError("an evaluation takes at least one model and one task")
    prepared = []
    for source in tasks:
        if isinstance(source, Task):
            prepared.append(prepare(source, data, limit=limit, seed=seed))
        else:
            own = data is None and Path(source).suffix == ".json"
            prepared.append(prepare(read_task(source), source if own else data, limit=limit, seed=seed))
    return prepared


def text_task(context: int = 512, protocol: Kind = "windows", *, world: bool = False) -> Task:
    """A task that takes the perplexity of a text: of `data`, or of the embedded world's test text."""
    return Task(name="text", kind="perplexity", about="Perplexity of a text.", layouts=({"text": "{{text}}"},),
                world="text" if world else None, protocol=protocol, context=context)


def plan_examination(models: Sequence[str | Path], tasks: Sequence[str | Path | Task], *, data: str | Path | None = None,
                     limit: int | None = None, seed: int = 0, device: str = "cpu",
                     by_sweeps: bool | None = None) -> list[TaskForecast]:
    """How every task would run on every model, and the least time in seconds that it takes on this machine."""
    prepared = _prepared(models, tasks, data, limit, seed)
    where = check_device(device)
    with tempfile.TemporaryDirectory() as folder:
        return [task for model in models
                for task in forecast(open_examinee(model, Path(folder), device=where, by_sweeps=by_sweeps), prepared)]
