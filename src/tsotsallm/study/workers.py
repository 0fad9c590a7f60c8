"""Where the trials of a study run: in this process, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from tsotsallm.cluster.client import Cluster
from tsotsallm.cluster.inputs import Bundle, files_named, with_local_paths
from tsotsallm.cluster.worker import Failure
from tsotsallm.compression import plan
from tsotsallm.errors import TsotsallmError
from tsotsallm.study.trial import Outcome, Setup, TrialJob, execute


class Workers(Protocol):
    """Where jobs run."""

    @property
    def capacity(self) -> int: ...

    def submit(self, setup: Setup, job: TrialJob) -> None: ...

    def finished(self) -> Iterator[tuple[TrialJob, Outcome]]:
        """Wait for at least one job, and yield those that are done."""
        ...


class Here:
    """Jobs run in this process, one at a time."""

    capacity = 1

    def __init__(self, work: Path) -> None:
        self.work, self._waiting = work, list[tuple[Setup, TrialJob]]()

    def submit(self, setup: Setup, job: TrialJob) -> None:
        self._waiting.append((setup, job))

    def finished(self) -> Iterator[tuple[TrialJob, Outcome]]:
        setup, job = self._waiting.pop(0)
        yield job, execute(setup, job, self.work)


class OnCluster:
    """Jobs run on the workers of a cluster, each where there is memory for it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self._bundles = cluster, dict[str, Bundle]()

    @property
    def capacity(self) -> int:
        return self.cluster.capacity

    def submit(self, setup: Setup, job: TrialJob) -> None:
        sources = [one for one in (setup.calibration, setup.text, setup.data) if one is not None and Path(one).exists()]
        for source in (setup.model, *sources, *sorted(files_named(job.recipe))):
            if source not in self._bundles:
                self._bundles[source] = Bundle.of(source)
        bundles = [self._bundles[source] for source in (setup.model, *sources, *sorted(files_named(job.recipe)))]
        self.cluster.submit(job, execute_there, (setup, job), bundles, memory_of(setup, job))

    def finished(self) -> Iterator[tuple[TrialJob, Outcome]]:
        for job, found in self.cluster.finished():
            yield job, Outcome(error=found.error, facts={"seconds": 0.0}) if isinstance(found, Failure) else found


def memory_of(setup: Setup, job: TrialJob) -> int:
    """Bytes that a job takes at most; of a recipe that cannot be planned nothing, its error comes when it is tried."""
    try:
        return plan(setup.model, job.recipe, windows=setup.windows, window=setup.window).ram_bytes
    except TsotsallmError:
        return 0


def execute_there(setup: Setup, job: TrialJob, places: Mapping[str, str], folder: Path) -> Outcome:
    """Run a job on a worker, with the worker's own paths; what is noted has the paths of the study."""
    local = {name: places.get(value, value) for name in ("model", "calibration", "text", "data")
             if (value := getattr(setup, name)) is not None}
    outcome = execute(replace(setup, **local), replace(job, recipe=with_local_paths(job.recipe, places)), folder)
    outcome.facts["setup"] = setup.plain()
    return outcome
