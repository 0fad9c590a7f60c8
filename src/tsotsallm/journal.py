"""Unfinished work on disk: its directory, the process that holds it, the inputs it belongs to, and its journal."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import psutil
import torch

from tsotsallm.checkpoint.shards import sync
from tsotsallm.checkpoint.writer import partial_path, write_json
from tsotsallm.errors import ResourceError, ResumeError
from tsotsallm.files import one_line, read_json
from tsotsallm.machine import MOST_THREADS, THREADS, on_threads

LOCK = "lock"
STATE = "run.json"
"""The file that says what unfinished work belongs to: inputs and options, and `words` that explain those that are hashes."""
PUBLISHED = "published"
"""A file in the directory of unfinished work that says: all that is left is to name the result and clean up."""


@dataclass(frozen=True)
class Kind:
    """How the unfinished work of a command is recognised: `--restart` deletes nothing else.

    noted  keys that run.json has
    names  patterns of the other names that the folder may hold
    """

    command: str
    noted: frozenset[str]
    names: tuple[str, ...]


class Journal:
    """Lines of JSON, each flushed to disk before work continues; a torn last line is cut off."""

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

    def add(self, **entry: object) -> None:
        """Append an entry and flush it to disk; it has `kind` and `sweep`."""
        self.entries.append(entry)
        with self.path.open("ab") as file:
            file.write((json.dumps(entry) + "\n").encode())
            sync(file)

    def find(self, kind: str, number: int) -> list[dict[str, Any]]:
        """The entries of a kind that sweep `number` wrote, in order."""
        return [entry for entry in self.entries if entry["kind"] == kind and entry["sweep"] == number]


def scratch_path(out: Path, chosen: Path | None) -> Path:
    """Where a run stores its hidden states: with the unfinished work, or in a folder of its own inside `chosen`."""
    if chosen is None:
        return partial_path(out) / "scratch"
    return chosen / f"{out.name}-{hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:12]}.scratch"


def remove_work(partial: Path) -> None:
    """Delete finished work; the file that says that it is finished goes last."""
    _empty(partial, spare=(PUBLISHED,))
    shutil.rmtree(partial)


def _empty(folder: Path, spare: tuple[str, ...]) -> None:
    """Delete the contents of a folder; the file that says what they belong to goes last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):
        if path.name not in spare:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes of this computer; raises ResumeError while one of them holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    if (holder := living_holder(folder)) is not None:
        raise ResumeError(f"process {holder} is working on {folder} now; wait for it, or stop it first")
    hold(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)


def hold(folder: Path) -> None:
    """Write the lock of this process into a folder; it counts for as long as the process lives."""
    (folder / LOCK).write_text(json.dumps([os.getpid(), psutil.Process().create_time()]))


def living_holder(folder: Path) -> int | None:
    """The number of another living process that holds a folder; None where the lock is free, stale or our own."""
    try:
        number, created = json.loads((folder / LOCK).read_text())
        process = psutil.Process(int(number))
        alive = process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, TypeError, psutil.Error):
        return None
    return int(number) if alive and int(number) != os.getpid() else None


@contextmanager
def held_work(partial: Path, identity: Mapping[str, Any], kind: Kind | None = None, words: Mapping[str, str] | None = None,
              *, restart: bool = False) -> Iterator[None]:
    """Lock the directory of unfinished work, and compute inside with the thread count that `identity` names.

    Raises ResumeError where the directory holds something else or work that was started with other inputs; `words` explain
    the keys of `identity` in that message. Full disks, missing permissions and memory that runs out inside become a
    ResourceError. `restart` first deletes unfinished work of this kind.
    """
    try:
        _refuse_strangers(partial)
        with held(partial):
            if restart and kind is not None:
                _clear(partial, kind)
            _require_same(partial / STATE, identity, words or {}, restarts=kind is not None)
            with on_threads(identity["machine"]["threads"]) if "machine" in identity else nullcontext():
                yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"no space left on the device that holds {partial}; make room and run the same "
                                "command again: finished layers are kept") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ResourceError(f"{error.filename or partial} cannot be opened ({error.strerror}); correct its permissions, "
                                "or choose another place with -o or --scratch") from None
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error):
            raise ResourceError("memory ran out; close other programs and run the same command again: finished layers "
                                "are kept") from None
        raise


def begun_threads(folder: Path) -> int | None:
    """The thread count that unfinished work was started with; None where there is none, or the user sets a count.

    It decides the last bit of a result, so work resumes with it however busy the machine is now.
    """
    try:
        noted = None if THREADS in os.environ else read_json(folder / STATE, ResumeError)["machine"]["threads"]
    except (ResumeError, OSError, LookupError, TypeError):     # nothing there, or damaged, which `held_work` reports
        return None
    return noted if type(noted) is int and 0 < noted <= MOST_THREADS else None


def _refuse_strangers(folder: Path) -> None:
    """Raise where a folder existed before any work started in it: it would be deleted together with the work."""
    if not folder.is_dir() or (folder / STATE).exists() or (folder / PUBLISHED).exists():
        return
    found = sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, f"{STATE}.new"))
    if found:
        raise ResumeError(f"{folder} exists and is not unfinished work (it holds {one_line(', '.join(found), 80)}, but no "
                          f"{STATE}); move it away, or choose another name with -o")


def _clear(folder: Path, kind: Kind) -> None:
    """Delete the unfinished work in a folder that this process holds, and nothing that is not recognised as such."""
    if not (folder / STATE).exists():
        return
    try:
        noted = read_json(folder / STATE, ResumeError)
    except ResumeError:
        noted = None
    if folder.is_symlink() or not isinstance(noted, dict) or not kind.noted <= noted.keys():
        raise ResumeError(f"{folder} is not recognised as unfinished work of {kind.command}, so --restart deletes "
                          "nothing; delete it yourself, or choose another name with -o")
    known = (LOCK, PUBLISHED, STATE, f"{STATE}.new", *kind.names)
    if others := sorted(path.name for path in folder.iterdir() if not any(fnmatch(path.name, pattern) for pattern in known)):
        raise ResumeError(f"{folder} holds {one_line(', '.join(others), 80)} beside the unfinished work of {kind.command}; "
                          "--restart deletes nothing; move that away first")
    _empty(folder, spare=(LOCK,))


def _require_same(state: Path, identity: Mapping[str, object], words: Mapping[str, str], *, restarts: bool) -> None:
    """Raise where work was started with other inputs, describing both; write them down where it starts now."""
    if state.exists():
        try:
            before = dict(read_json(state, ResumeError))
        except (ResumeError, ValueError, TypeError):
            raise ResumeError(f"{state} is damaged; delete {state.parent} to start again") from None
        changed = differences(before, identity, before.get("words"), words)
        if changed:
            remedy = "delete it and start again with --restart" if restarts else "delete that directory to start again"
            raise ResumeError(f"{state.parent} holds unfinished work that was started with other inputs "
                              f"({'; '.join(changed)}); finish it with those, or {remedy}")
    write_json(state, {**identity, "words": dict(words)})


def differences(before: Mapping[str, object], now: Mapping[str, object], words_before: object = None,
                words: Mapping[str, str] | None = None, where: str = "") -> list[str]:
    """`NAME: value then, value now` for every key of `now` whose value differs in `before`; `words` stand in for values."""
    said = words_before if isinstance(words_before, dict) else {}
    changes = []
    for key, value in json.loads(json.dumps(now)).items():
        old, name = before.get(key), f"{where}{key}"
        if old == value:
            continue
        if isinstance(old, dict) and isinstance(value, dict) and key not in (words or {}):
            changes += differences(old, dict.fromkeys(old) | value, where=f"{name}.")
            continue
        then, today = _in_words(said.get(key, old)), (words or {}).get(key, _in_words(value))
        changes.append(f"{name}: {then} then, {today} now" if then != today else f"{name}: {then}, changed since")
    return changes


def _in_words(value: object) -> str:
    """A value as a message prints it, a hash by its first 8 digits."""
    if isinstance(value, str):
        return f"{value[:8]}…" if re.fullmatch("[0-9a-f]{16,}", value) else one_line(value)
    plain = {"None": "none", "True": "yes", "False": "no"}.get(str(value))
    return plain or one_line(json.dumps(value, ensure_ascii=False), 120)
