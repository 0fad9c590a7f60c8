"""Submit jobs to a cluster: each runs where there is memory for it, and files that a worker lacks are sent to it first."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tsotsallm.cluster.inputs import Bundle, next_piece, receive
from tsotsallm.cluster.worker import (
    MEMORY,
    Failure,
    Lacks,
    Tls,
    WorkerInfo,
    check_address,
    describe,
    library,
    perform,
    worker_folder,
)
from tsotsallm.errors import ClusterError
from tsotsallm.version import __version__

CHECK = 2.0
"""Seconds between checks whether workers came or went."""
PATIENCE = 120.0
"""Seconds for which a cluster may have no worker at all."""


class Future(Protocol):
    """The part of Dask's futures that is used here; the library itself has no types."""

    def result(self) -> object:
        """Wait for the job and return its result, or raise its exception."""
        ...

    def cancel(self) -> object:
        """Give the job up."""
        ...

    def add_done_callback(self, function: Callable[[Future], None]) -> None:
        """Call a function with the future once it is done."""
        ...


@dataclass
class _ClusterJob:
    tag: Hashable
    function: Callable[..., object]
    arguments: tuple[object, ...]
    bundles: tuple[Bundle, ...]
    memory: int


def _take(bundle: Bundle, name: str, offset: int, piece: bytes, sha256: str) -> dict[str, int]:
    return receive(bundle, worker_folder() / "inputs", name, offset, piece, sha256)


class Cluster:
    """A Dask cluster to which jobs are submitted. A worker that dies loses only its job, which Dask gives to another one.

    Raises ClusterError where no scheduler answers at the address, or where the certificates do not go with it.
    """

    def __init__(self, scheduler: str, tls: Tls | None = None, say: Callable[[str], None] = lambda _line: None) -> None:
        distributed = library()
        check_address(scheduler, tls)
        self.scheduler, self.say = scheduler, say
        try:
            self.client = distributed.Client(scheduler, timeout=15, set_as_default=False,
                                             security=tls.security() if tls else None)
        except (OSError, TimeoutError) as error:
            raise ClusterError(f"no scheduler answers at {scheduler} ({type(error).__name__}); start one with "
                               "`dask scheduler`, and check the address and the firewall") from None
        self.futures: dict[Future, _ClusterJob | _Sending] = {}
        self.done: queue.Queue[Future] = queue.Queue()
        self.ready: deque[tuple[Any, Any]] = deque()
        self.sending: dict[tuple[str, str], _Sending] = {}
        self.known: set[str] = set()
        self._check_workers()
        if not self.known:
            self.say(f"waiting for workers at {scheduler}: `tsotsallm worker {scheduler}` starts one")

    def close(self) -> None:
        """Cancel the jobs that are not finished, and disconnect."""
        for future in self.futures:
            future.cancel()
        self.client.close()

    @property
    def workers(self) -> dict[str, WorkerInfo]:
        """Address -> what the scheduler knows of each worker that is connected now."""
        return dict(self.client.scheduler_info(n_workers=-1)["workers"])

    @property
    def capacity(self) -> int:
        """Jobs that can run at once: one per worker, and at least one, so that work begins when a worker joins."""
        return max(1, len(self.workers))

    def submit(self, tag: Hashable, function: Callable[..., object], arguments: Sequence[object], bundles: Sequence[Bundle],
               memory: int) -> None:
        """Run `function(*arguments, places, folder)` on a worker that has `memory` bytes free and the files of `bundles`."""
        self._send(_ClusterJob(tag, function, tuple(arguments), tuple(bundles), memory))

    def finished(self) -> Iterator[tuple[Any, Any]]:
        """Wait for at least one job, and yield those that are done: (tag, result or Failure).

        Raises ClusterError where the connection is lost, or where there is no worker for PATIENCE seconds.
        """
        alone_since = time.monotonic()
        while not self.ready:
            future = self._next_done()
            self._check_workers()
            if self.known:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > PATIENCE:
                raise ClusterError(f"{self.scheduler} has had no worker for {PATIENCE:.0f} s; start one with `tsotsallm "
                                   f"worker {self.scheduler}` and run the same command again: what is finished is kept")
            if future is not None and future in self.futures:
                self._settle(future, self.futures.pop(future))
            self._give_up_on_the_lost()
        while self.ready:
            yield self.ready.popleft()

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _send(self, job: _ClusterJob, workers: Sequence[str] | None = None) -> None:
        offered = [info["resources"].get(MEMORY, 0) for info in self.workers.values()]
        if offered and max(offered) < job.memory:
            self.ready.append((job.tag, Failure(f"it needs {job.memory / 1e9:.2f} GB of memory, more than any worker has: "
                                                f"{describe(self.workers)}")))
            return
        future = self.client.submit(perform, __version__, job.function, job.arguments, job.bundles, pure=False,
                                    resources={MEMORY: job.memory}, workers=workers, allow_other_workers=workers is not None)
        self._expect(future, job)

    def _expect(self, future: Future, what: _ClusterJob | _Sending) -> None:
        self.futures[future] = what
        future.add_done_callback(self.done.put)

    def _next_done(self) -> Future | None:
        """The next future that is done, or None after CHECK seconds."""
        if self.client.status not in ("running", "connecting"):
            raise ClusterError(f"the connection to {self.scheduler} is lost; run the same command again: what is finished "
                               "is kept")
        try:
            return self.done.get(timeout=CHECK)
        except queue.Empty:
            return None

    def _settle(self, future: Future, what: _ClusterJob | _Sending) -> None:
        result: object
        try:
            result = future.result()
        except Exception as error:  # of any kind: Dask's own, such as KilledWorker, and a fault of ours on a worker
            result = Failure(f"{type(error).__name__}: {error}")
        if isinstance(what, _Sending):
            self._sent(what, result)
        elif isinstance(result, Lacks):
            self._begin_sending(what, result)
        else:
            self.ready.append((what.tag, result))

    # -- what workers lack --------------------------------------------------------------------------------------------

    def _begin_sending(self, job: _ClusterJob, lacks: Lacks) -> None:
        """Send a worker the first bundle that it lacks for a job; other jobs that lack the same one wait for it."""
        bundle, there = lacks.missing[0]
        key = (lacks.worker, bundle.key)
        if key in self.sending:
            self.sending[key].waiting.append(job)
            return
        self.say(f"sending {bundle.source} ({bundle.bytes / 1e6:.1f} MB) to {self._name(lacks.worker)}")
        self.sending[key] = sending = _Sending(lacks.worker, bundle, [job])
        self._send_piece(sending, there)

    def _send_piece(self, sending: _Sending, there: dict[str, int]) -> None:
        piece = next_piece(sending.bundle, there)
        if piece is None:
            del self.sending[sending.worker, sending.bundle.key]
            for job in sending.waiting:
                self._send(job, [sending.worker])
            return
        future = self.client.submit(_take, sending.bundle, *piece, pure=False, workers=[sending.worker], priority=10)
        self._expect(future, sending)

    def _sent(self, sending: _Sending, result: Any) -> None:
        if isinstance(result, Failure):
            del self.sending[sending.worker, sending.bundle.key]
            self.ready.extend((job.tag, result) for job in sending.waiting)
            return
        sending.stuck = sending.stuck + 1 if result == sending.there else 0
        if sending.stuck > 3:
            self._sent(sending, Failure(f"{Path(sending.bundle.source).name} does not reach {self._name(sending.worker)} "
                                        "unchanged"))
            return
        sending.there = result
        self._send_piece(sending, result)

    def _give_up_on_the_lost(self) -> None:
        """Jobs whose worker died while it was sent something are given to others."""
        for future, sending in list(self.futures.items()):
            if isinstance(sending, _Sending) and sending.worker not in self.known:
                future.cancel()
                del self.futures[future]
                self.sending.pop((sending.worker, sending.bundle.key), None)
                for job in sending.waiting:
                    self._send(job)

    # -- which workers are connected ----------------------------------------------------------------------------------

    def _check_workers(self) -> None:
        now = self.workers
        for gone in self.known - now.keys():
            self.say(f"a worker has left: {gone}")
        if new := now.keys() - self.known:
            self.say(f"workers: {describe({place: now[place] for place in sorted(new)})}")
        self.known = set(now)

    def _name(self, worker: str) -> str:
        info = self.workers.get(worker)
        return worker if info is None else str(info.get("name", worker))


@dataclass
class _Sending:
    worker: str
    bundle: Bundle
    waiting: list[_ClusterJob]
    there: dict[str, int] | None = None
    stuck: int = 0
