"""Where the trials of a study run: in this process, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from tsotsallm.calibration import Calibration, elsewhere, sources_of, with_self_written
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.cluster.client import Cluster
from tsotsallm.cluster.inputs import Bundle, files_named, with_local_paths
from tsotsallm.cluster.worker import Failure
from tsotsallm.compression import plan
from tsotsallm.errors import TsotsallmError
from tsotsallm.files import JsonObject
from tsotsallm.study.trial import Outcome, Setup, TrialJob, execute


class Workers(Protocol):
    """Where the jobs of a study run."""

    @property
    def capacity(self) -> int:
        """Jobs that can run at once."""
        ...

    def submit(self, setup: Setup, job: TrialJob) -> None:
        """Take a job; it may start at once or later."""
        ...

    def finished(self) -> Iterator[tuple[TrialJob, Outcome]]:
        """Wait for at least one job, and yield those that are done."""
        ...


class Here:
    """Jobs run in this process, one at a time."""

    capacity = 1

    def __init__(self, work: Path) -> None:
        self.work, self._waiting = work, list[tuple[Setup, TrialJob]]()

    def submit(self, setup: Setup, job: TrialJob) -> None:
        """Put a job last in the queue."""
        self._waiting.append((setup, job))

    def finished(self) -> Iterator[tuple[TrialJob, Outcome]]:
        """Run the next job of the queue and yield its outcome."""
        setup, job = self._waiting.pop(0)
        yield job, execute(setup, job, self.work)


class OnCluster:
    """Jobs run on the workers of a cluster, each on a worker that has the memory for it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self._bundles = cluster, dict[str, Bundle]()

    @property
    def capacity(self) -> int:
        """Workers that are connected now, and at least one."""
        return self.cluster.capacity

    def submit(self, setup: Setup, job: TrialJob) -> None:
        """Submit a job with the model and the files that it reads, and the memory that its plan states.

        Text that the model writes itself is written here, and sent as a file: workers would round otherwise, and calibrate
        on other texts.
        """
        setup = self._with_text(setup)
        calibration = [source.name for source in sources_of(setup.calibration or "")]
        sources = [source for source in (*calibration, setup.text, setup.data) if source and Path(source).exists()]
        for source in (setup.model, *sources, *sorted(files_named(job.recipe))):
            if source not in self._bundles:
                self._bundles[source] = Bundle.of(source)
        bundles = [self._bundles[source] for source in (setup.model, *sources, *sorted(files_named(job.recipe)))]
        self.cluster.submit(job, execute_there, (setup, job), bundles, memory_of(setup, job))

    def _with_text(self, setup: Setup) -> Setup:
        if setup.calibration is None or not any(source.is_self for source in sources_of(setup.calibration)):
            return setup
        checkpoint = Checkpoint.open(setup.model)
        asked = Calibration(setup.calibration, setup.windows, min(setup.window, checkpoint.spec.context), setup.seed)
        return replace(setup, calibration=with_self_written(checkpoint, asked))

    def finished(self) -> Iterator[tuple[TrialJob, Outcome]]:
        """Wait for at least one job, and yield those that are done; a job that failed yields its error."""
        for job, result in self.cluster.finished():
            yield job, Outcome(error=result.error, facts={"seconds": 0.0}) if isinstance(result, Failure) else result


def memory_of(setup: Setup, job: TrialJob) -> int:
    """Bytes of memory that a job takes at most; 0 for a recipe that cannot be planned, which fails when it is tried."""
    try:
        return plan(setup.model, job.recipe, windows=setup.windows, window=setup.window).ram_bytes
    except TsotsallmError:
        return 0


def execute_there(setup: Setup, job: TrialJob, places: Mapping[str, str], folder: Path) -> Outcome:
    """Run a job on a worker with the worker's own paths; the facts name the study's paths."""
    def here(value: str | None) -> str | None:
        return None if value is None else places.get(value, value)

    local = replace(setup, model=places.get(setup.model, setup.model), text=here(setup.text), data=here(setup.data),
                    calibration=None if setup.calibration is None else elsewhere(setup.calibration, places))
    recipe = cast("list[JsonObject]", with_local_paths(job.recipe, places))
    outcome = execute(local, replace(job, recipe=recipe), folder)
    outcome.facts["setup"] = setup.plain()
    return outcome
