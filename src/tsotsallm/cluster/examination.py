"""Evaluate tasks on a cluster: each task of each model is one job; the results are those that one computer would give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.cluster.client import Cluster
from tsotsallm.cluster.inputs import Bundle
from tsotsallm.cluster.worker import Failure
from tsotsallm.errors import ClusterError
from tsotsallm.evaluation.cost import bytes_of, cost_of
from tsotsallm.evaluation.examination import Examination, check_tasks, examine
from tsotsallm.evaluation.results import TaskResult, compare


def examine_on(cluster: Cluster, models: Sequence[str], tasks: Sequence[str], *, data: str | None = None,
               limit: int | None = None, seed: int = 0, reference: str | None = None) -> Examination:
    """Evaluate every model on every task, each pair as a job of its own; differences are from the first model.

    Raises TaskError where a task or its data is wrong, ClusterError where a job fails.
    """
    check_tasks(tasks, data=data, limit=limit)
    bundles: dict[str, Bundle] = {}
    waiting = set()
    for number, model in enumerate(models):
        memory = bytes_of(View.of(Checkpoint.open(model)))
        for task in tasks:
            sources = [model, *(source for source in (task, data, reference) if source is not None and (
                source == reference or Path(source).exists()))]
            bundles |= {source: Bundle.of(source) for source in sources if source not in bundles}
            waiting.add((number, task))
            cluster.submit((number, task), evaluate_there, (model, task, data, limit, seed, reference),
                           [bundles[source] for source in sources], memory)
    results: dict[tuple[int, str], TaskResult] = {}
    while len(results) < len(waiting):
        for tag, result in cluster.finished():
            if isinstance(result, Failure):
                raise ClusterError(f"{models[tag[0]]}, {tag[1]}: {result.error}")
            results[tag] = result
    rows = [tuple(results[number, task] for number in range(len(models))) for task in tasks]
    return Examination(tuple(models), tuple(rows), tuple(comparison for row in rows for comparison in compare(row)),
                       tuple(cost_of(Checkpoint.open(model), model) for model in models))


def evaluate_there(model: str, task: str, data: str | None, limit: int | None, seed: int, reference: str | None,
                   places: Mapping[str, str], _folder: Path) -> TaskResult:
    """Evaluate one model on one task on a worker; `places` maps sources to the worker's own paths."""
    @overload
    def local(source: str) -> str: ...
    @overload
    def local(source: None) -> None: ...
    def local(source: str | None) -> str | None:
        return None if source is None else places.get(source, source)

    there = examine([local(model)], [local(task)], data=local(data), limit=limit, seed=seed, reference=local(reference))
    return replace(there.results[0][0], model=model)
