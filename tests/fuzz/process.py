"""One run of the command line in a forked process: bounded in time and memory, and watched for what it writes where."""

from __future__ import annotations

import atexit
import io
import os
import resource
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ADDRESS_BYTES = 6 << 30
"""Beyond what is mapped when a case begins: a guard for the machine, far above the bound that is asserted."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: exit code (negative for a signal), seconds of the clock and of processors, peak memory, and
    whether it, or one that it left behind, had to be killed."""

    code: int
    seconds: float
    busy: float
    memory: int
    killed: bool


def forked(work: Callable[[], int], seconds: float) -> Ended:
    """Run a function in a forked process and kill all that is left of it, at the latest after some seconds."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            code = work()
        except BaseException:                               # the harness itself is wrong
            traceback.print_exc()
        finally:
            os._exit(code)
    handle = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        killed = not poll.poll(1000 * seconds)
    finally:
        os.close(handle)
    if killed:
        _kill(child)
    _, status, used = os.wait4(child, 0)
    if not killed and _alive(child):
        time.sleep(0.2)
        killed = _alive(child)
    _kill(child)
    return Ended(os.waitstatus_to_exitcode(status), time.monotonic() - began, used.ru_utime + used.ru_stime,
                 used.ru_maxrss * 1024, killed)


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def _alive(group: int) -> bool:
    """Whether a process of the group still runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    for one in Path("/proc").iterdir():
        if one.name.isdigit():
            try:
                fields = (one / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                return True
    return False


def in_the_child(arguments: tuple[str, ...], box: Path) -> int:
    """What `tsotsallm ARGUMENTS` does in a folder, in this process: the exit code that the shell would see."""
    os.chdir(box)
    for name, mode, number in (("stdin", os.O_RDONLY, 0), ("stdout", os.O_WRONLY | os.O_CREAT, 1),
                               ("stderr", os.O_WRONLY | os.O_CREAT, 2)):
        handle = os.open(name, mode, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin, sys.stdout = io.TextIOWrapper(io.FileIO(0, closefd=False)), io.TextIOWrapper(io.FileIO(1, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), errors="backslashreplace", line_buffering=True)
    os.environ |= {"TMPDIR": str(box / "tmp"), "HOME": str(box / "cache"), "TSOTSALLM_CACHE": str(box / "cache"),
                   "XDG_CACHE_HOME": str(box / "cache")}
    tempfile.tempdir = None
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(_watch(box))
    atexit._clear()                                         # what the parent's libraries do in the end is the parent's
    weakref.finalize._registry.clear()                      # type: ignore[attr-defined]
    atexit.register(weakref.finalize._exitfunc)             # type: ignore[attr-defined]
    sys.argv = ["tsotsallm", *arguments]
    code = _main()
    for one in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        try:
            one()
        except BaseException:
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120                                      # as the interpreter does
    return code


def _main() -> int:
    from tsotsallm.cli import main

    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return 0 if ended.code is None else int(ended.code)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _watch(box: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that notes the first write outside the case's folder, in a file that the judge looks for."""
    inside = os.path.realpath(box)
    changing = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
                "os.chown"}
    noted = False

    def check(path: Any) -> None:
        nonlocal noted
        if noted or isinstance(path, int) or path is None:
            return
        text = os.fsdecode(path)
        folder, name = os.path.split(os.path.abspath(text))
        real = os.path.join(os.path.realpath(folder), name)
        if not real.startswith((inside + os.sep, "/dev/", "/proc/")) and real != inside:
            noted = True
            with open(box.parent / "!written", "w") as file:
                file.write(real)

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = details
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (
                    mode is None and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)):
                check(path)
        elif event in changing:
            dir_fd = details[-1]
            if not (isinstance(dir_fd, int) and dir_fd > 0):
                check(details[0] if event in ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown")
                      else details[1])
    return hook
