"""Tasks asked on a cluster: every model's every task is a job; what comes back is what one computer would have found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    """Ask every model every task; differences are to the first model."""
    check_tasks(tasks, data=data, limit=limit)
    bundles: dict[str, Bundle] = {}
    waiting = set()
    for number, model in enumerate(models):
        memory = bytes_of(View.of(Checkpoint.open(model)))
        for task in tasks:
            sources = [model, *(one for one in (task, data, reference) if one is not None and (
                one == reference or Path(one).exists()))]
            bundles |= {source: Bundle.of(source) for source in sources if source not in bundles}
            waiting.add((number, task))
            cluster.submit((number, task), ask_there, (model, task, data, limit, seed, reference),
                           [bundles[source] for source in sources], memory)
    found: dict[tuple[int, str], TaskResult] = {}
    while len(found) < len(waiting):
        for tag, result in cluster.finished():
            if isinstance(result, Failure):
                raise ClusterError(f"{models[tag[0]]}, {tag[1]}: {result.error}")
            found[tag] = result
    rows = [tuple(found[number, task] for number in range(len(models))) for task in tasks]
    return Examination(tuple(models), tuple(rows), tuple(one for row in rows for one in compare(row)),
                       tuple(cost_of(Checkpoint.open(model), model) for model in models))


def ask_there(model: str, task: str, data: str | None, limit: int | None, seed: int, reference: str | None,
              places: Mapping[str, str], _folder: Path) -> TaskResult:
    """One model's answers to one task, on a worker."""
    def local(source: str | None) -> Any:
        return None if source is None else places.get(source, source)

    found = examine([local(model)], [local(task)], data=local(data), limit=limit, seed=seed, reference=local(reference))
    return replace(found.results[0][0], model=model)
