"""Jobs on a cluster: submitted here, done wherever there is memory for them; what a worker lacks is sent to it first."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsotsallm.cluster.inputs import Bundle, next_piece, receive
from tsotsallm.cluster.worker import MEMORY, Failure, Lacks, Tls, check_address, describe, library, perform, workplace
from tsotsallm.errors import ClusterError
from tsotsallm.version import __version__

LOOK = 2.0
"""Seconds after which it is looked whether workers came or went."""
PATIENCE = 120.0
"""Seconds that a cluster may be without any worker."""


@dataclass
class _Job:
    tag: Any
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    bundles: tuple[Bundle, ...]
    memory: int


def _take(bundle: Bundle, name: str, offset: int, piece: bytes, sha256: str) -> dict[str, int]:
    return receive(bundle, workplace() / "inputs", name, offset, piece, sha256)


class Cluster:
    """A Dask cluster that jobs are given to. A worker that dies loses only its job, which Dask gives to another."""

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
        self.futures: dict[Any, _Job | _Sending] = {}
        self.done: queue.Queue[Any] = queue.Queue()
        self.ready: deque[tuple[Any, Any]] = deque()
        self.sending: dict[tuple[str, str], _Sending] = {}
        self.known: set[str] = set()
        self._look()
        if not self.known:
            self.say(f"waiting for workers at {scheduler}: `tsotsallm worker {scheduler}` starts one")

    def close(self) -> None:
        for future in self.futures:
            future.cancel()
        self.client.close()

    @property
    def workers(self) -> dict[str, Any]:
        return dict(self.client.scheduler_info(n_workers=-1)["workers"])

    @property
    def capacity(self) -> int:
        return max(1, len(self.workers))

    def submit(self, tag: Any, function: Callable[..., Any], arguments: Sequence[Any], bundles: Sequence[Bundle],
               memory: int) -> None:
        """Have `function(*arguments, places, folder)` done by a worker with so many bytes of memory."""
        self._send(_Job(tag, function, tuple(arguments), tuple(bundles), memory))

    def finished(self) -> Iterator[tuple[Any, Any]]:
        """Wait for at least one job, and yield those that are done: (tag, result or Failure)."""
        alone_since = time.monotonic()
        while not self.ready:
            future = self._next_done()
            self._look()
            if self.known:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > PATIENCE:
                raise ClusterError(f"{self.scheduler} has had no worker for {PATIENCE:.0f} s; start one with `tsotsallm "
                                   f"worker {self.scheduler}` and run the same command again: what is finished is kept")
            if future in self.futures:
                self._settle(future, self.futures.pop(future))
            self._give_up_on_the_lost()
        while self.ready:
            yield self.ready.popleft()

    # -- jobs ---------------------------------------------------------------------------------------------------------

    def _send(self, job: _Job, workers: Sequence[str] | None = None) -> None:
        offered = [info["resources"].get(MEMORY, 0) for info in self.workers.values()]
        if offered and max(offered) < job.memory:
            self.ready.append((job.tag, Failure(f"it needs {job.memory / 1e9:.2f} GB of memory, more than any worker has: "
                                                f"{describe(self.workers)}")))
            return
        future = self.client.submit(perform, __version__, job.function, job.arguments, job.bundles, pure=False,
                                    resources={MEMORY: job.memory}, workers=workers, allow_other_workers=workers is not None)
        self._expect(future, job)

    def _expect(self, future: Any, what: _Job | _Sending) -> None:
        self.futures[future] = what
        future.add_done_callback(self.done.put)

    def _next_done(self) -> Any:
        """The next future that is done, or None after a while."""
        if self.client.status not in ("running", "connecting"):
            raise ClusterError(f"the connection to {self.scheduler} is lost; run the same command again: what is finished "
                               "is kept")
        try:
            return self.done.get(timeout=LOOK)
        except queue.Empty:
            return None

    def _settle(self, future: Any, what: _Job | _Sending) -> None:
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

    def _begin_sending(self, job: _Job, lacks: Lacks) -> None:
        """Send a worker what it lacks for a job; jobs that wait for the same are begun together."""
        bundle, there = lacks.missing[0]
        key = (lacks.worker, bundle.key)
        if key in self.sending:
            self.sending[key].waiting.append(job)
            return
        self.say(f"sending {bundle.source} ({bundle.bytes / 1e6:.1f} MB) to {self._name(lacks.worker)}")
        self.sending[key] = one = _Sending(lacks.worker, bundle, [job])
        self._send_piece(one, there)

    def _send_piece(self, one: _Sending, there: dict[str, int]) -> None:
        piece = next_piece(one.bundle, there)
        if piece is None:
            del self.sending[one.worker, one.bundle.key]
            for job in one.waiting:
                self._send(job, [one.worker])
            return
        future = self.client.submit(_take, one.bundle, *piece, pure=False, workers=[one.worker], priority=10)
        self._expect(future, one)

    def _sent(self, one: _Sending, result: Any) -> None:
        if isinstance(result, Failure):
            del self.sending[one.worker, one.bundle.key]
            self.ready.extend((job.tag, result) for job in one.waiting)
            return
        one.stuck = one.stuck + 1 if result == one.there else 0
        if one.stuck > 3:
            self._sent(one, Failure(f"{Path(one.bundle.source).name} does not reach {self._name(one.worker)} unchanged"))
            return
        one.there = result
        self._send_piece(one, result)

    def _give_up_on_the_lost(self) -> None:
        """Jobs whose worker died while it was sent something are given to others."""
        for future, one in list(self.futures.items()):
            if isinstance(one, _Sending) and one.worker not in self.known:
                future.cancel()
                del self.futures[future]
                self.sending.pop((one.worker, one.bundle.key), None)
                for job in one.waiting:
                    self._send(job)

    # -- who is there -------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        now = self.workers
        for gone in self.known - now.keys():
            self.say(f"a worker is gone: {gone}")
        if new := now.keys() - self.known:
            self.say(f"workers: {describe({place: now[place] for place in sorted(new)})}")
        self.known = set(now)

    def _name(self, worker: str) -> str:
        return str(self.workers.get(worker, {}).get("name", worker))


@dataclass
class _Sending:
    worker: str
    bundle: Bundle
    waiting: list[_Job]
    there: dict[str, int] | None = None
    stuck: int = 0
