"""A command in a process of its own: its seconds, and the peak memory of it and of everything that it starts."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL_S = 0.05


class CommandError(Exception):
    """A command that failed, with the last line of what it wrote to its standard error."""


@dataclass(frozen=True)
class Measured:
    """What a command took, and what it wrote to its standard output.

    peak_rss_bytes  the most resident memory of the process and its descendants together, sampled every 50 ms; of a single
                    process, on Linux, also its own peak as the system keeps it
    """

    seconds: float
    peak_rss_bytes: int
    output: str


def run(command: Sequence[str | Path], *, stdin: str = "", environment: Mapping[str, str] | None = None,
        log: Path | None = None, timeout_s: float | None = None, folder: Path | None = None) -> Measured:
    """Run a command to its end; raises CommandError where it fails or takes longer than `timeout_s`.

    `environment` is added to the present one, and the command runs in `folder`, if given; what it writes to its standard
    error is kept in `log`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        output, errors = Path(temporary, "output"), log or Path(temporary, "errors")
        with output.open("wb") as out, errors.open("wb") as err:
            began, peak = time.monotonic(), 0
            process = subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stdout=out, stderr=err,
                                       env=os.environ | dict(environment or {}), cwd=folder)
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(stdin.encode())
                process.stdin.close()
            watched = psutil.Process(process.pid)
            try:
                while process.poll() is None:
                    peak = max(peak, resident(watched))
                    if timeout_s is not None and time.monotonic() - began > timeout_s:
                        raise CommandError(f"stopped after {timeout_s / 60:.0f} minutes")
                    time.sleep(INTERVAL_S)
            finally:
                if process.poll() is None:
                    end(watched)
                    process.wait()
            seconds = time.monotonic() - began
        if process.returncode:
            raise CommandError(last_line(errors.read_text("utf-8", "replace")) or f"exit code {process.returncode}")
        return Measured(seconds, peak, output.read_text("utf-8", "replace"))


def resident(process: psutil.Process) -> int:
    """Bytes that a process and its descendants have in memory, or the most that the process itself ever had."""
    total = 0
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return max(total, _own_peak(process.pid))


def _own_peak(pid: int) -> int:
    """The most memory that a process had since its program began (VmHWM of Linux); 0 where that is not known."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    return 0


def end(process: psutil.Process) -> None:
    """Kill a process and its descendants."""
    with suppress(psutil.Error):
        for one in (*process.children(recursive=True), process):
            with suppress(psutil.Error):
                one.kill()


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
