"""This computer: cores, free memory and disk, and the speed of matrix products; measured, never assumed."""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import psutil

from tsotsallm.errors import ResourceError
from tsotsallm.timing import shared_with_threads
from tsotsallm.units import human_bytes

_Given = TypeVar("_Given")
_Done = TypeVar("_Done")

GIB = 1 << 30
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
PROGRESS = "TSOTSALLM_PROGRESS"
"""Environment variable: where it is set, the command line prints its progress as lines of JSON, for other programs."""


def free_ram_bytes() -> int:
    """Bytes of memory that a new program can use without swapping, within a container's limit."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        if (text := limit.read_text().strip()) != "max":
            cache = [int(line.split()[1]) for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
                     if line.startswith("inactive_file ")]
            free = min(free, int(text) - int(used.read_text()) + sum(cache))
    except OSError:
        pass
    return max(free, 0)


def total_ram_bytes() -> int:
    """Bytes of this computer's memory, or of its container's where that has fewer."""
    whole = int(psutil.virtual_memory().total)
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return whole
    return whole if text == "max" else min(whole, int(text))


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the file system that holds `path` or its nearest existing parent."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return int(psutil.disk_usage(str(path)).free)


def require_disk(what: str, needed: int, folder: Path, *, already: int = 0,
                 remedy: str = "free some space, or choose another place") -> None:
    """Raise ResourceError where the disk of a folder lacks the bytes that `what` needs, of which `already` are on it."""
    free = free_disk_bytes(folder)
    if needed > free + already:
        raise ResourceError(f"{what} needs {human_bytes(needed)} of disk at {folder} and {human_bytes(free)} are free; "
                            f"{remedy}")


def not_written(place: Path, needed: int | None, error: OSError) -> ResourceError:
    """The error about an output that `place` could not take, of which nothing is left; `needed` in bytes, where known."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    size = "" if needed is None or not full else f"; it needs {human_bytes(needed)}"
    remedy = "free some space, or choose another place" if full else "check the path and its permissions"
    return ResourceError(f"{place} cannot be written ({error.strerror or error}){size}; {remedy}: nothing half-written is "
                         "left")


def cache_root() -> Path:
    """The folder of what is kept between commands: $TSOTSALLM_CACHE, else ~/.cache/tsotsallm."""
    chosen = os.environ.get("TSOTSALLM_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "tsotsallm"


def cores() -> int:
    """Cores that this process may use, within a container's limit; two threads of one core count once."""
    allowed = len(_allowed())
    limits = [allowed, psutil.cpu_count(logical=False) or allowed, _quota() or allowed]
    return max(1, min(limits))


def _quota() -> int | None:
    """The processor time that the container of this process may use, in whole processors; None without a limit."""
    try:
        time_us, period_us = CPU_QUOTA.read_text().split()
        return None if time_us == "max" else max(1, round(int(time_us) / int(period_us)))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _allowed() -> list[int]:
    """Numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


# -- threads ----------------------------------------------------------------------------------------------------------

THREADS = "TSOTSALLM_THREADS"
"""Environment variable: the number of threads that the user asked for (set by `--threads`)."""
OPENMP = "OMP_NUM_THREADS"
MOST_THREADS = 1024
SPINS = "10000"
"""Rounds that a thread of GNU's OpenMP spins before it sleeps: about 30 µs, longer than a step of a small model."""
WATCHED_S = 0.2
LARGE_FLOPS = 2e8
"""About 3 ms on one core: smaller operations finish before a second thread would wake up on a busy machine."""


def wait_passively() -> None:
    """Let idle threads of OpenMP sleep soon, unless the user set a policy; takes effect when torch is loaded.

    Threads that spin for long make a run beside another busy program 3 to 10 times slower; threads that sleep at once make
    llama.cpp up to 15 times slower on a small model, which waits about a hundred times for every token.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)      # takes precedence over the policy in GNU's OpenMP
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def idle_cores(watched_s: float = WATCHED_S) -> int:
    """Cores that other programs leave free, watched for `watched_s` seconds while this one is idle; at least one."""
    shares = dict(enumerate(psutil.cpu_percent(watched_s, percpu=True)))
    allowed = _allowed()
    busy = sum(shares.get(number, 0.0) for number in allowed) / 100 / len(allowed)
    return max(1, round(cores() * (1 - busy)))


def use_threads(count: int | None) -> None:
    """Set the number of threads; call it before torch is loaded. None: one for each idle core, unless the user set it."""
    if count is not None:
        os.environ[THREADS] = os.environ[OPENMP] = os.environ["MKL_NUM_THREADS"] = str(count)
    elif "torch" not in sys.modules and not {OPENMP, "MKL_NUM_THREADS"} & os.environ.keys():
        os.environ[OPENMP] = str(idle_cores())


def chosen_threads() -> int | None:
    """The thread count that the environment sets, for engines that do not use OpenMP; None where it sets none."""
    text = os.environ.get(OPENMP, "")
    return int(text) if text.isdecimal() and 0 < int(text) <= MOST_THREADS else None


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Let torch compute on `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)        # even where nothing changes: MKL then uses exactly this number
    try:
        yield
    finally:
        torch.set_num_threads(before)


_SPARED: ContextVar[int | None] = ContextVar("threads that small operations spare", default=None)


@contextmanager
def threads_for(flops: float) -> Iterator[None]:
    """Compute on one thread inside the block where `flops` floating-point operations are few, else on all that were chosen.

    Blocks may be nested. The choice depends on shapes alone, never on load, so that results stay the same.
    """
    chosen = chosen_by_caller()
    before = _SPARED.set(chosen)
    try:
        with on_threads(chosen if flops >= LARGE_FLOPS else 1):
            yield
    finally:
        _SPARED.reset(before)


def chosen_by_caller() -> int:
    """The thread count that large operations use here, also inside `threads_for`."""
    import torch

    return _SPARED.get() or torch.get_num_threads()


def side_by_side(work: Callable[[_Given], _Done], items: Sequence[_Given], most: int) -> list[_Done]:
    """work(item) for every item, as many at once as threads were chosen, but at most `most`; in the order of the items.

    Each has one thread, whatever the number at once, so that results stay the same; a single item has all threads.
    """
    import torch

    if len(items) < 2:
        return [work(item) for item in items]
    workers = min(chosen_by_caller(), len(items), most)
    with on_threads(1):
        if workers == 1:
            return [work(item) for item in items]
        with (shared_with_threads() as measured,
              ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool):
            return list(pool.map(measured(work), items))


# -- compiled loops ---------------------------------------------------------------------------------------------------

COMPILED = "TSOTSALLM_COMPILED"
"""Environment variable: 0 turns compiled loops off where Numba is installed."""


@functools.cache
def _numba_version() -> str | None:
    try:
        return importlib.metadata.version("numba")
    except importlib.metadata.PackageNotFoundError:
        return None


def compiler() -> str | None:
    """The version of Numba that compiles inner loops; None where it is not installed, or TSOTSALLM_COMPILED is 0."""
    return None if os.environ.get(COMPILED) == "0" else _numba_version()


def rss_bytes() -> int:
    """Resident memory of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far, in bytes.

    On Linux the kernel's own mark: `getrusage` tells the peak of the program that started this one where that is higher.
    """
    on_windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if on_windows is not None:
        return int(on_windows)
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text("ascii", "replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


M_MMAP_THRESHOLD = -3
RETURNED_AT_ONCE = 8 << 20


@functools.cache
def return_large_blocks() -> None:
    """Let freed blocks of 8 MB and more return to the system at once.

    glibc raises that limit to 32 MB as a program frees large blocks; matrices of 16 MB are then scattered over a heap that
    cannot shrink, which cost 250 MB on the Llama-3.2-1B shape.
    """
    import ctypes

    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, RETURNED_AT_ONCE)
        except (OSError, AttributeError):
            return  # another C library, which returns memory by its own rules


def release_memory() -> None:
    """Return smaller freed blocks to the system as well, and what MKL keeps for its next product: 100 MB and more."""
    import ctypes

    if sys.platform == "linux":
        with suppress(OSError, AttributeError):             # a torch without MKL
            ctypes.CDLL(_torch_library()).mkl_serv_free_buffers()
        with suppress(OSError, AttributeError):             # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _torch_library() -> str:
    """The library that holds torch's products, and MKL where it was built with it."""
    import torch

    return str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")


@functools.cache
def gemm_flops_per_second(dtype: str = "float32", device: str = "cpu", size: int = 2048) -> float:
    """Floating-point operations per second of a matrix product, the median of five runs; takes about half a second."""
    import torch

    left = torch.randn(512, size, dtype=getattr(torch, dtype), device=device)
    right = torch.randn(size, size, dtype=left.dtype, device=device)
    timings = []
    for _ in range(6):
        began = time.perf_counter()
        left @ right
        if device != "cpu":
            torch.cuda.synchronize()
        timings.append(time.perf_counter() - began)
    return 2 * 512 * size * size / sorted(timings[1:])[2]


def fingerprint(threads: int | None = None) -> dict[str, object]:
    """Everything on this machine that decides the last bit of a result: versions, thread count (`threads`, or the current
    one), instruction set, and the version of Numba where it compiles inner loops."""
    import torch
    import transformers

    compiled = {} if compiler() is None else {"numba": compiler()}
    return {"python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "threads": threads or torch.get_num_threads(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(), "processor": platform.machine()} | compiled


# -- what libraries print ---------------------------------------------------------------------------------------------


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Keep what native code writes to standard error, such as panics of Rust libraries, off the terminal inside the block.

    This affects the whole process, not one thread: keep the block short.
    """
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (OSError, ValueError, AttributeError):      # no standard error at all
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
