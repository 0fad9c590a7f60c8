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
from typing import TypeVar

import psutil
import torch

from tsotsallm.checkpoint.shards import sync
from tsotsallm.checkpoint.writer import partial_path, write_json
from tsotsallm.errors import ResourceError, ResumeError
from tsotsallm.files import one_line, quoted, read_json
from tsotsallm.machine import MOST_THREADS, THREADS, on_threads
from tsotsallm.records import Brief
from tsotsallm.training.loop import Curve, Training

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


@dataclass(frozen=True)
class Entry(Brief):
    """One line of a journal: what sweep number `sweep` (from 0) did."""

    sweep: int

    def plain(self) -> dict[str, object]:
        """The entry as JSON's plain data, its kind first."""
        return {"kind": KINDS[type(self)], **super().plain()}


@dataclass(frozen=True)
class Placed(Entry):
    """An entry about the stage at a place of its sweep: of its choices (a rewriting after them), or of its edits."""

    place: int


@dataclass(frozen=True)
class Chosen(Placed):
    """The layers that a choice keeps, in order, and what it chose by."""

    order: tuple[int, ...]
    reasons: dict[str, object]


@dataclass(frozen=True)
class Noted(Placed):
    """A measurement on the way to a choice."""

    key: str
    value: float


@dataclass(frozen=True)
class Decided(Placed):
    """What a stage decided by a survey of the model; its `notes` are for the user."""

    stage: str
    decision: dict[str, object]


@dataclass(frozen=True)
class Surveyed(Placed):
    """What a survey found in one layer."""

    notes: dict[str, list[float]]


class Weighed(Entry):
    """How much each token counts is on disk for all layers."""


@dataclass(frozen=True)
class EngineChosen(Entry):
    """How a pass trains: resident or streamed."""

    engine: str


@dataclass(frozen=True)
class Trained(Entry):
    """A training is done."""

    training: Training


@dataclass(frozen=True)
class LayerWritten(Entry):
    """A layer and all that the next one needs are on disk.

    sha256  of its part file; None where it repeats an earlier layer by name only
    grids   linear -> the grid that it is stored on, None for dense
    curve   the course of its training, where layers are trained one after another
    """

    layer: int
    sha256: str | None
    grids: dict[str, dict[str, object] | None]
    curve: Curve | None = None


class Finished(Entry):
    """The checkpoint of the sweep is whole."""


KINDS: dict[type[Entry], str] = {
    Chosen: "choice", Noted: "note", Decided: "decision", Surveyed: "surveyed", Weighed: "weighed", EngineChosen: "engine",
    Trained: "trained", LayerWritten: "layer", Finished: "finished"}
ENTRIES = {name: kind for kind, name in KINDS.items()}
SomeEntry = TypeVar("SomeEntry", bound=Entry)


def read_entry(plain: object) -> Entry:
    """The entry that plain data describes; raises ValueError where it describes none."""
    kind = plain.get("kind") if isinstance(plain, dict) else None
    if not isinstance(kind, str) or kind not in ENTRIES:
        raise ValueError(f"{quoted(plain)} is no entry of a journal")
    return ENTRIES[kind].parsed(plain)


class Journal:
    """Entries as lines of JSON, each flushed to disk before work continues.

    A line that is torn or damaged is cut off with all after it: what they noted is done again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []
        content = path.read_bytes() if path.exists() else b""
        whole = 0
        for line in content.splitlines(keepends=True):
            try:
                entry = read_entry(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            self.entries.append(entry)
            whole += len(line)
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
                sync(file)

    def add(self, entry: Entry) -> None:
        """Append an entry and flush it to disk."""
        self.entries.append(entry)
        with self.path.open("ab") as file:
            file.write((json.dumps(entry.plain()) + "\n").encode())
            sync(file)

    def find(self, kind: type[SomeEntry], sweep: int, place: int | None = None) -> list[SomeEntry]:
        """The entries of a kind that sweep number `sweep` wrote, in order; those about one `place` where it is given."""
        return [entry for entry in self.entries if isinstance(entry, kind) and entry.sweep == sweep
                and (place is None or (isinstance(entry, Placed) and entry.place == place))]


def scratch_path(out: Path, chosen: str | Path | None) -> Path:
    """Where a run stores its hidden states: with the unfinished work, or in a folder of its own inside `chosen`."""
    if chosen is None:
        return partial_path(out) / "scratch"
    return Path(chosen) / f"{out.name}-{hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:12]}.scratch"


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
def held_work(partial: Path, identity: Mapping[str, object], kind: Kind | None = None,
              words: Mapping[str, str] | None = None, *, restart: bool = False) -> Iterator[None]:
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
            machine = identity.get("machine")
            with on_threads(machine["threads"]) if isinstance(machine, dict) else nullcontext():
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
