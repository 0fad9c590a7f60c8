"""Unfinished work on disk: its directory, who holds it, what it belongs to, and the journal of what is done."""

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
"""What unfinished work belongs to: its inputs and options, and `words` for those that are hashes."""
PUBLISHED = "published"
"""A file in the directory of unfinished work that says: nothing is left but to give the result its name and clean up."""


@dataclass(frozen=True)
class Kind:
    """How the unfinished work of a command is recognised: `--restart` deletes nothing else.

    noted  keys that run.json has
    names  patterns of what else may stand in the folder
    """

    command: str
    noted: frozenset[str]
    names: tuple[str, ...]


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
    _empty(partial, spare=(PUBLISHED,))
    shutil.rmtree(partial)


def _empty(folder: Path, spare: tuple[str, ...]) -> None:
    """Delete what a folder holds, what says to whom it belongs last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):
        if path.name not in spare:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
def held_work(partial: Path, identity: Mapping[str, Any], kind: Kind | None = None, words: Mapping[str, str] | None = None,
              *, restart: bool = False) -> Iterator[None]:
    """Hold the directory of unfinished work; refuse another's, and turn a full disk into a clear error.

    `words` say in a refusal what a key of `identity` stands for; `restart` deletes unfinished work of this kind first.
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
            raise ResourceError(f"{error.filename or partial} cannot be opened ({error.strerror}); mend its permissions, "
                                "or choose another place with -o or --scratch") from None
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate" in str(error):
            raise ResourceError("memory ran out; close other programs and run the same command again: finished layers "
                                "are kept") from None
        raise


def begun_threads(folder: Path) -> int | None:
    """The thread count that unfinished work was begun with: it decides the last bit of a result, and goes on whatever else
    keeps the machine busy now. None where nothing was begun, or where the user asks for a count.
    """
    try:
        noted = None if THREADS in os.environ else read_json(folder / STATE, ResumeError)["machine"]["threads"]
    except (ResumeError, OSError, LookupError, TypeError):     # nothing, or damaged, which whoever holds the work will say
        return None
    return noted if type(noted) is int and 0 < noted <= MOST_THREADS else None


def _refuse_strangers(folder: Path) -> None:
    """Raise where a folder was there before any work began in it: it would be deleted with the work."""
    if not folder.is_dir() or (folder / STATE).exists() or (folder / PUBLISHED).exists():
        return
    found = sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, f"{STATE}.new"))
    if found:
        raise ResumeError(f"{folder} exists and is no unfinished work (it holds {one_line(', '.join(found), 80)}, but no "
                          f"{STATE}); move it away, or choose another name with -o")


def _clear(folder: Path, kind: Kind) -> None:
    """Delete the unfinished work in a folder that this process holds; nothing that is not recognised as such."""
    if not (folder / STATE).exists():
        return
    try:
        noted = read_json(folder / STATE, ResumeError)
    except ResumeError:
        noted = None
    if folder.is_symlink() or not isinstance(noted, dict) or not kind.noted <= noted.keys():
        raise ResumeError(f"{folder} is not recognised as unfinished work of {kind.command}, so that --restart deletes "
                          "nothing; delete it yourself, or choose another name with -o")
    known = (LOCK, PUBLISHED, STATE, f"{STATE}.new", *kind.names)
    if others := sorted(path.name for path in folder.iterdir() if not any(fnmatch(path.name, one) for one in known)):
        raise ResumeError(f"{folder} holds {one_line(', '.join(others), 80)} beside the unfinished work of {kind.command}; "
                          "--restart deletes nothing, move that away first")
    _empty(folder, spare=(LOCK,))


def _require_same(state: Path, identity: Mapping[str, Any], words: Mapping[str, str], *, restarts: bool) -> None:
    """Raise where work was begun with other inputs, with both in words; note them where it begins."""
    if state.exists():
        try:
            before = dict(read_json(state, ResumeError))
        except (ResumeError, ValueError, TypeError):
            raise ResumeError(f"{state} is damaged; delete {state.parent} to begin again") from None
        changed = differences(before, identity, before.get("words"), words)
        if changed:
            remedy = "delete it and begin again with --restart" if restarts else "delete that directory to begin again"
            raise ResumeError(f"{state.parent} holds unfinished work that was begun otherwise ({'; '.join(changed)}); "
                              f"finish it as it was begun, or {remedy}")
    write_json(state, {**identity, "words": dict(words)})


def differences(before: Mapping[str, Any], now: Mapping[str, Any], words_before: Any = None,
                words: Mapping[str, str] | None = None, where: str = "") -> list[str]:
    """`NAME: value then, value now` for every key of `now` that `before` has otherwise; `words` stand in for values."""
    said = words_before if isinstance(words_before, dict) else {}
    found = []
    for key, value in json.loads(json.dumps(now)).items():
        old, name = before.get(key), f"{where}{key}"
        if old == value:
            continue
        if isinstance(old, dict) and isinstance(value, dict) and key not in (words or {}):
            found += differences(old, dict.fromkeys(old) | value, where=f"{name}.")
            continue
        then, today = _in_words(said.get(key, old)), (words or {}).get(key, _in_words(value))
        found.append(f"{name}: {then} then, {today} now" if then != today else f"{name}: {then}, changed since")
    return found


def _in_words(value: Any) -> str:
    """A value as a message says it, a hash by its beginning."""
    if isinstance(value, str):
        return f"{value[:8]}…" if re.fullmatch("[0-9a-f]{16,}", value) else one_line(value)
    plain = {"None": "none", "True": "yes", "False": "no"}.get(str(value))
    return plain or one_line(json.dumps(value, ensure_ascii=False), 120)
