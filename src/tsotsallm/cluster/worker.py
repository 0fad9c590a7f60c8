"""A worker joins a Dask scheduler with its memory as a resource, and runs one job at a time in a folder of its own."""

from __future__ import annotations

import asyncio
import importlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict

import psutil

from tsotsallm.cluster.inputs import Bundle, local_path, received
from tsotsallm.errors import ClusterError, MissingExtraError, TsotsallmError
from tsotsallm.journal import hold, living_holder
from tsotsallm.machine import cache_root
from tsotsallm.version import __version__

MEMORY = "memory"
"""The Dask resource that jobs ask for, in bytes."""
SPARED = 0.85
"""Share of the free memory that a worker offers by default."""
FOLDER = "TSOTSALLM_WORKER"
"""Environment variable: the folder in which this process, if it is a worker, keeps what it receives and makes."""


@dataclass(frozen=True)
class Tls:
    """PEM files for encrypted connections, in which both sides show a certificate of the same authority."""

    authority: str
    certificate: str
    key: str

    def security(self) -> Any:
        """The settings as Dask takes them; raises ClusterError where the files are not usable certificates."""
        distributed = library()
        sides = {f"tls_{side}_{kind}": value for side in ("client", "worker", "scheduler")
                 for kind, value in (("cert", self.certificate), ("key", self.key))}
        try:
            return distributed.Security(tls_ca_file=self.authority, require_encryption=True, **sides)
        except (OSError, ValueError, TypeError) as error:
            raise ClusterError(f"the certificates cannot be used ({error}); give PEM files") from None


def library() -> ModuleType:
    """The `distributed` library, which has no types; raises MissingExtraError where it is not installed."""
    try:
        found: ModuleType = importlib.import_module("distributed")
    except ImportError:
        raise MissingExtraError("distributed", "cluster", "work on several computers") from None
    return found


class WorkerInfo(TypedDict):
    """The part of a scheduler's record of a worker that is used here; MEMORY among its resources is in bytes."""

    name: str
    resources: dict[str, float]


@dataclass(frozen=True)
class Lacks:
    """A worker's answer that it cannot begin: the bundles that it lacks, and the bytes of each file that it has."""

    worker: str
    missing: tuple[tuple[Bundle, dict[str, int]], ...]


@dataclass(frozen=True)
class Failure:
    """A job that failed, and why."""

    error: str


def worker_folder() -> Path:
    """The folder of this worker, which FOLDER names in its environment."""
    return Path(os.environ[FOLDER])


def perform(version: str, function: Callable[..., object], arguments: Sequence[object],
            bundles: Sequence[Bundle]) -> object:
    """Run a job on a worker: `function(*arguments, places, folder)`, where `places` maps sources to paths on the worker.

    Returns its result, Lacks where files are missing, or Failure where the versions differ or the job raises a
    TsotsallmError.
    """
    if version != __version__:
        return Failure(f"{platform.node()} has tsotsallm {__version__}, but the jobs come from {version}; install the same "
                       "version on every computer")
    folder = worker_folder()
    paths = {bundle.source: local_path(bundle, folder / "inputs") for bundle in bundles}
    missing = [bundle for bundle in bundles if paths[bundle.source] is None]
    if missing:
        return Lacks(address(), tuple((bundle, received(bundle, folder / "inputs")) for bundle in missing))
    try:
        return function(*arguments, {source: str(path) for source, path in paths.items()}, folder)
    except TsotsallmError as error:
        return Failure(f"{type(error).__name__}: {error}")


def address() -> str:
    """The address of the worker that runs this job."""
    return str(library().get_worker().address)


def run_worker(scheduler: str, *, work: Path | None = None, memory: int | None = None, threads: int | None = None,
               name: str | None = None, host: str | None = None, tls: Tls | None = None,
               say: Callable[[str], None] = print) -> None:
    """Work for a scheduler until it ends or until Ctrl-C.

    `memory` is what jobs may take together, in bytes (by default 85% of what is free). Raises ClusterError where no
    scheduler answers, or where another worker uses the folder `work`.
    """
    distributed = library()
    check_address(scheduler, tls)
    if memory is None:
        memory = int(SPARED * psutil.virtual_memory().available)
    folder = _own_folder(work)
    os.environ[FOLDER] = str(folder)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)        # of processes that are started for a job
    _quiet(distributed)

    async def serve() -> None:
        worker = distributed.Worker(scheduler, nthreads=1, resources={MEMORY: memory}, memory_limit=0, host=host,
                                    name=name or f"{platform.node()}-{os.getpid()}", local_directory=str(folder / "dask"),
                                    security=tls.security() if tls else None, dashboard=False, death_timeout=60)
        async with worker:
            say(f"working for {scheduler} with {memory / 1e9:.1f} GB of memory, in {folder}")
            await worker.finished()

    try:
        asyncio.run(serve())
    except (OSError, TimeoutError) as error:
        raise ClusterError(f"no scheduler answers at {scheduler} ({type(error).__name__}); start one with `dask scheduler`, "
                           "and check the address and the firewall") from None
    say(f"{scheduler} has ended")


def check_address(scheduler: str, tls: Tls | None) -> None:
    """Raise ClusterError where an address is not valid, or does not go with the certificates."""
    kind, _, rest = scheduler.partition("://")
    if kind not in ("tcp", "tls") or not rest.rpartition(":")[2].isdigit():
        raise ClusterError(f"{scheduler!r} is not the address of a scheduler; it takes tcp://HOST:PORT, or tls://HOST:PORT "
                           "with certificates")
    if (kind == "tls") != (tls is not None):
        raise ClusterError(f"{scheduler} and certificates do not go together: tls:// needs --tls-ca, --tls-cert and "
                           "--tls-key, tcp:// takes none")


def parse_tls(authority: str | None, certificate: str | None, key: str | None) -> Tls | None:
    """Certificates from three options, all or none; raises ClusterError where some are missing or are no files."""
    given = [path for path in (authority, certificate, key) if path is not None]
    if not given:
        return None
    if len(given) < 3:
        raise ClusterError("encrypted connections need --tls-ca, --tls-cert and --tls-key together")
    for path in given:
        if not Path(path).is_file():
            raise ClusterError(f"{path} is not a file; give PEM files")
    assert authority is not None
    assert certificate is not None
    assert key is not None
    return Tls(authority, certificate, key)


def _own_folder(work: Path | None) -> Path:
    """A folder that no other worker on this computer uses: `work`, or the first free one in the cache."""
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        if not _taken(work):
            return work
        raise ClusterError(f"another worker uses {work}; give each a --work of its own")
    number = 1
    while True:
        folder = cache_root() / "workers" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        if not _taken(folder):
            return folder
        number += 1


def _taken(folder: Path) -> bool:
    """Whether a living process holds the folder; otherwise this one holds it from now on."""
    if living_holder(folder) is not None:
        return True
    hold(folder)
    return False


def _quiet(distributed: ModuleType) -> None:
    import logging

    logging.getLogger("distributed").setLevel(logging.ERROR)
    import dask

    dask.config.set({"distributed.admin.large-graph-warning-threshold": "64MiB"})


def describe(workers: Mapping[str, WorkerInfo]) -> str:
    """Names and memory of a scheduler's workers as text."""
    return ", ".join(f"{info['name']} ({info['resources'].get(MEMORY, 0) / 1e9:.1f} GB)" for info in workers.values())
