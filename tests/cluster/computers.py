"""A scheduler and workers in processes of their own, with addresses of their own where this machine allows it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BRIDGE, NET = "tsbr0", "10.117.0"
TOOLS = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}


@dataclass
class Computers:
    """Processes of a cluster; `spaces` are the network namespaces of the workers, empty where there are none."""

    folder: Path
    address: str
    spaces: list[str]
    tls: list[str] = field(default_factory=list)
    processes: dict[str, subprocess.Popen[Any]] = field(default_factory=dict)

    def start(self, name: str, *more: str) -> subprocess.Popen[Any]:
        """A worker of one thread in a folder of its own, in the next namespace."""
        command = [sys.executable, "-m", "tsotsallm", "worker", self.address, "--name", name, "--threads", "1",
                   "--work", str(self.folder / name), *self.tls, *more]
        place = len(self.processes)
        if place < len(self.spaces):
            command = ["ip", "netns", "exec", self.spaces[place], *command, "--host", f"{NET}.{place + 2}"]
        (self.folder / f"{name}-cwd").mkdir()
        self.processes[name] = subprocess.Popen(command, cwd=self.folder / f"{name}-cwd", start_new_session=True,
                                                env=os.environ | {"OMP_NUM_THREADS": "1"},
                                                stdout=(self.folder / f"{name}.log").open("w"), stderr=subprocess.STDOUT)
        return self.processes[name]

    def kill(self, name: str) -> None:
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()


@contextmanager
def computers(folder: Path, count: int, *, tls: list[str] | None = None, spaces: bool = True) -> Iterator[Computers]:
    """A scheduler, and room for so many workers."""
    names = _namespaces(count) if spaces else []
    host, scheme = (f"{NET}.1" if names else "127.0.0.1"), "tls" if tls else "tcp"
    given = [part for option, value in zip(("--tls-ca-file", "--tls-cert", "--tls-key"), tls or [], strict=False)
             for part in (option, value)]
    ours = [part for option, value in zip(("--tls-ca", "--tls-cert", "--tls-key"), tls or [], strict=False)
            for part in (option, value)]
    log = folder / "scheduler.log"
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", f"{scheme}://{host}", "--port", "0",
         "--no-dashboard", "--scheduler-file", str(folder / "scheduler.json"), *given],
        stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
    found = None
    try:
        for _ in range(300):
            if (folder / "scheduler.json").exists() and (text := (folder / "scheduler.json").read_text()).endswith("}"):
                found = Computers(folder, text.split('"address": "')[1].split('"')[0], names, ours)
                break
            assert scheduler.poll() is None, log.read_text()
            time.sleep(0.1)
        assert found is not None, log.read_text()
        yield found
    finally:
        for process in (*(found.processes.values() if found else ()), scheduler):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        _remove(names)


def _namespaces(count: int) -> list[str]:
    """Network namespaces that reach each other over a bridge; none where this machine does not allow it."""
    if os.name != "posix" or shutil.which("ip") is None or os.geteuid() != 0:
        return []
    names = [f"tsotsallm{number}" for number in range(count)]
    _remove(names)
    try:
        subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], **TOOLS)
        subprocess.run(["ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE], **TOOLS)
        subprocess.run(["ip", "link", "set", BRIDGE, "up"], **TOOLS)
        for number, name in enumerate(names):
            subprocess.run(["ip", "netns", "add", name], **TOOLS)
            subprocess.run(["ip", "link", "add", f"tsv{number}", "type", "veth", "peer", "name", "eth0", "netns", name],
                           **TOOLS)
            subprocess.run(["ip", "link", "set", f"tsv{number}", "master", BRIDGE, "up"], **TOOLS)
            inside = ["ip", "netns", "exec", name, "ip"]
            subprocess.run([*inside, "addr", "add", f"{NET}.{number + 2}/24", "dev", "eth0"], **TOOLS)
            subprocess.run([*inside, "link", "set", "eth0", "up"], **TOOLS)
            subprocess.run([*inside, "link", "set", "lo", "up"], **TOOLS)
        subprocess.run(["ip", "netns", "exec", names[0], "ping", "-c", "1", "-W", "2", f"{NET}.1"] if shutil.which("ping")
                       else ["true"], **TOOLS)
    except (subprocess.CalledProcessError, OSError):
        _remove(names)
        return []
    return names


def _remove(names: list[str]) -> None:
    for name in names:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)
    if names:
        subprocess.run(["ip", "link", "del", BRIDGE], stderr=subprocess.DEVNULL, check=False)
