"""Unfinished work on disk: its directory, who holds it, what it belongs to, and the journal of what is done."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from tsotsallm.checkpoint.shards import sync
from tsotsallm.checkpoint.writer import partial_path, write_json
from tsotsallm.errors import ResourceError, ResumeError

LOCK = "lock"
PUBLISHED = "published"
"""A file in the directory of unfinished work that says: nothing is left but to give the result its name and clean up."""


class Journal:
    """Lines of JSON, each flushed to disk before work goes on; a torn last line is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        content = path.read_bytes() if path.exists() else b""
        whole = 0
        for line in content.splitlines(keepends=True):
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or not isinstance(entry, dict) or not {"kind", "sweep"} <= entry.keys():
                break
            self.entries.append(entry)
            whole += len(line)
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
                sync(file)

    def add(self, **entry: Any) -> None:
        self.entries.append(entry)
        with self.path.open("ab") as file:
            file.write((json.dumps(entry) + "\n").encode())
            sync(file)

    def find(self, kind: str, number: int) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["kind"] == kind and entry["sweep"] == number]


def scratch_path(out: Path, chosen: Path | None) -> Path:
    """Where the hidden states of a run lie: with the unfinished work, or in a folder of its own in `chosen`."""
    if chosen is None:
        return partial_path(out) / "scratch"
    return chosen / f"{out.name}-{hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:12]}.scratch"


def remove_work(partial: Path) -> None:
    """Delete finished work, what says that it is finished last."""
    for path in partial.iterdir():
        if path.name != PUBLISHED:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(partial)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes of this computer."""
    folder.mkdir(parents=True, exist_ok=True)
    if (holder := living_holder(folder)) is not None:
        raise ResumeError(f"process {holder} is working on {folder} now; wait for it, or stop it first")
    hold(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)


def hold(folder: Path) -> None:
    """Note that this process holds a folder, until it ends."""
    (folder / LOCK).write_text(json.dumps([os.getpid(), psutil.Process().create_time()]))


def living_holder(folder: Path) -> int | None:
    """The other process that holds a folder, if it is alive and the same that noted it."""
    try:
        number, created = json.loads((folder / LOCK).read_text())
        process = psutil.Process(int(number))
        alive = process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return int(number) if alive and int(number) != os.getpid() else None


@contextmanager
def held_work(partial: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold the directory of unfinished work; refuse another's, and turn a full disk into a clear error."""
    try:
        with held(partial):
            _require_same(partial / "run.json", identity)
            yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left on the device that holds {partial}; make room and run the same "
                                "command again: finished layers are kept") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ResourceError(f"{error.filename or partial} cannot be opened ({error.strerror}); mend its permissions, "
                                "or choose another place with -o or --scratch") from None
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error):
            raise ResourceError("memory ran out; close other programs and run the same command again: finished layers "
                                "are kept") from None
        raise


def _require_same(state: Path, identity: dict[str, Any]) -> None:
    """Raise where work was begun with other inputs; note them where it begins."""
    if state.exists():
        try:
            before = dict(json.loads(state.read_text("utf-8")))
        except (ValueError, TypeError):
            raise ResumeError(f"{state} is damaged; delete {state.parent} to start anew") from None
        changed = [key for key in identity if before.get(key) != json.loads(json.dumps(identity[key]))]
        if changed:
            raise ResumeError(f"{state.parent} holds unfinished work with another {', '.join(changed)}; finish it with "
                              "the inputs it was begun with, or delete that directory to start anew")
    write_json(state, identity)
