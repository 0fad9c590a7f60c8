"""Jobs of the studio: the commands `fit` and `compress`, each in its own process, one at a time; they can be stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

from tsotsallm.checkpoint.writer import write_json
from tsotsallm.errors import ServeError, TsotsallmError
from tsotsallm.files import JsonObject
from tsotsallm.machine import PROGRESS

LINES, CANDIDATES = 400, 200
"""Lines of a job's output, and candidates of its search, that are kept."""
RECORD = "studio.json"
PATIENCE_S = 15.0
"""Seconds that a job has to end by itself when it is stopped."""


class _OwnSession(TypedDict, total=False):
    """Options of Popen by which Ctrl-C in this process's terminal does not reach a job."""

    start_new_session: bool
    creationflags: int


@dataclass
class StudioJob:
    """A run of a command.

    out    the folder that it writes
    state  waiting, running, done, stopped or failed
    began  when its process started, by time.monotonic(); None while it does not run. `seconds` are those before
    share  how much is done, 0 to 1; None where it is not known
    step   what it is doing, as the command line names it; `at` has its parts: stage, layer, layers, the share that is done
    source      the model that is made smaller, as the command names it; `before` its bytes
    limit_s     seconds of a run after which its search stops; None: it takes as long as its recipe does
    candidates  what its search found so far: number, name, bytes and KL divergence with its error
    result      what came out: bytes, and what was lost as far as the command measures it
    """

    id: str
    title: str
    arguments: list[str]
    out: str
    state: str = "waiting"
    share: float | None = None
    step: str = ""
    at: JsonObject = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None
    served: str | None = None
    began: float | None = None
    source: str = ""
    before: int | None = None
    limit_s: float | None = None
    candidates: list[JsonObject] = field(default_factory=list)
    result: JsonObject | None = None

    @property
    def file(self) -> Path | None:
        """The GGUF file that it made."""
        path = Path(self.out) / "model.gguf"
        return path if self.state == "done" and path.is_file() else None

    @property
    def command(self) -> str:
        """The command line that does the same."""
        import shlex

        return shlex.join(["tsotsallm", *(word for word in self.arguments if word != "--json")])

    @property
    def taken_s(self) -> float:
        """Seconds that it has run for until now, resumed ones together."""
        return round(self.seconds + (0.0 if self.began is None else time.monotonic() - self.began), 1)

    @property
    def gone(self) -> float | None:
        """How much of its time is over, or of its work where its time has no limit: 0 to 1; None where that is not known."""
        if self.limit_s is None or self.began is None:
            return self.share
        return min((time.monotonic() - self.began) / self.limit_s, 1.0)

    def plain(self) -> dict[str, object]:
        """What the page shows of the job, as plain data."""
        shown = asdict(self) | {"seconds": self.taken_s, "share": self.gone}
        for name in ("arguments", "out", "began", "source", "limit_s"):
            del shown[name]
        shown["left_s"] = None if self.limit_s is None or self.began is None else max(
            0.0, round(self.began + self.limit_s - time.monotonic(), 1))
        report = self.state == "done" and (Path(self.out) / "report.html").is_file()
        return shown | {"command": self.command, "report": report, "can_resume": self.state in ("stopped", "failed"),
                        "file": self.file is not None}


class Jobs:
    """The jobs of a folder, newest last; they are recorded there, so that a restarted service knows them.

    Raises ServeError where the record cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record = folder / RECORD
        self.jobs: dict[str, StudioJob] = {}
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._running: str | None = None
        self._stopped: set[str] = set()
        self._closed = False
        if self.record.exists():
            try:
                for plain in json.loads(self.record.read_text("utf-8")):
                    job = StudioJob(**plain)
                    if job.state in ("waiting", "running"):
                        job.state = "stopped"
                    job.served = job.began = None
                    self.jobs[job.id] = job
            except (ValueError, TypeError):
                raise ServeError(f"{self.record} cannot be read; move it away, and the studio begins a new list of jobs; "
                                 "finished models are not touched") from None

    def get(self, key: str) -> StudioJob | None:
        """The job with an id, or None."""
        return self.jobs.get(key)

    def add(self, title: str, arguments: Sequence[str], out: Path, *, source: str = "", before: int | None = None,
            limit_s: float | None = None) -> StudioJob:
        """Add a job; it starts as soon as no other runs."""
        with self._lock:
            number = max((int(key) for key in self.jobs), default=0) + 1
            job = StudioJob(str(number), title, list(arguments), str(out), source=source, before=before, limit_s=limit_s)
            self.jobs[job.id] = job
            self._keep()
        self._start_next()
        return job

    def resume(self, job: StudioJob) -> None:
        """Resume a job that was stopped or failed, by running its command again; raises ServeError for any other."""
        with self._lock:
            if job.state not in ("stopped", "failed"):
                raise ServeError(f"job {job.id} is {job.state}; only a job that was stopped or failed can be resumed")
            job.state, job.error, job.share, job.step, job.at = "waiting", None, None, "", {}
            self._stopped.discard(job.id)
            self._keep()
        self._start_next()

    def stop(self, job: StudioJob) -> None:
        """End a job; what it has finished is kept."""
        with self._lock:
            if job.state == "waiting":
                job.state = "stopped"
                self._keep()
                return
            if job.state != "running":
                return
            self._stopped.add(job.id)
            process = self._process
        if process is not None:
            _interrupt(process)

    def stop_all(self) -> None:
        """End all jobs, start no more, and wait for the one that runs."""
        self._closed = True
        for job in list(self.jobs.values()):
            self.stop(job)
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S + 5)

    # -- running ------------------------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        with self._lock:
            if self._running is not None or self._closed:
                return
            job = next((job for job in self.jobs.values() if job.state == "waiting"), None)
            if job is None:
                return
            self._running, job.state = job.id, "running"
            self._keep()
        threading.Thread(target=self._run, args=(job,), daemon=True).start()

    def _run(self, job: StudioJob) -> None:
        job.began = time.monotonic()
        extra: _OwnSession = {"start_new_session": True} if os.name != "nt" else {
            "creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
        process = self._process = subprocess.Popen(
            [sys.executable, "-m", "tsotsallm", *job.arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", env=os.environ | {PROGRESS: "1"}, **extra)
        answer: list[str] = []
        reader = threading.Thread(target=lambda: answer.append(process.stdout.read() if process.stdout else ""), daemon=True)
        reader.start()
        assert process.stderr is not None
        for line in process.stderr:
            self._hear(job, line.rstrip())
        code = process.wait()
        reader.join()
        job.seconds, job.share, job.began = job.taken_s, job.gone, None
        with self._lock:
            if code == 0:
                job.state, job.share, job.step = "done", 1.0, ""
                job.result = _result_in("".join(answer))
            elif job.id in self._stopped or code in (130, -signal.SIGINT, -signal.SIGTERM):
                job.state = "stopped"
            else:
                job.state, job.error = "failed", _error_in("".join(answer)) or f"it ended with code {code}"
            self._running = self._process = None
            self._keep()
        self._start_next()

    def _hear(self, job: StudioJob, line: str) -> None:
        """Note a line of output: progress or a candidate as JSON, or a line to show."""
        if line.startswith(('{"step"', '{"candidate"')):
            with contextlib.suppress(ValueError):
                heard = json.loads(line)
                if "candidate" in heard:
                    found = [one for one in job.candidates if one["number"] != heard["candidate"]["number"]]
                    job.candidates = [*found, heard["candidate"]][-CANDIDATES:]
                else:
                    job.step, job.share, job.at = str(heard["step"]), float(heard["share"]), heard
                return
        if line:
            job.lines = [*job.lines, line][-LINES:]

    def _keep(self) -> None:
        try:
            write_json(self.record, [asdict(job) for job in self.jobs.values()])
        except (OSError, TsotsallmError):
            return      # a full disk must not end a running job, whose own message reports it


def _interrupt(process: subprocess.Popen[str]) -> None:
    """Send a process Ctrl-C, and kill it where it does not end within PATIENCE_S."""
    def later() -> None:
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()

    with contextlib.suppress(OSError):
        process.send_signal(signal.SIGINT if os.name != "nt" else getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
    threading.Thread(target=later, daemon=True).start()


def _result_in(answer: str) -> JsonObject | None:
    """What the answer of `fit` or `compress` says of the result; None where it says something else."""
    try:
        found = json.loads(answer)
        if "best" not in found:
            return {"bytes": int(found["result_bytes"])}
        evaluation, best = found["evaluation"], found["best"]
        return {"bytes": int(best["bytes"]), "kl": float(best["measured"]), "kl_error": float(best["error"]),
                "same_top_token": float(evaluation["same_top_token"]), "perplexity": float(evaluation["perplexity"]),
                "reference_perplexity": float(evaluation["reference_perplexity"]), "tokens_per_s": found["tokens_per_s"]}
    except (ValueError, KeyError, TypeError):
        return None


def _error_in(answer: str) -> str | None:
    """The message in the JSON that a command prints last, or the end of its output."""
    try:
        return str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return answer.strip()[-500:] or None
