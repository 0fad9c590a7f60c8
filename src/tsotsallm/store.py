"""Finished pieces of work, found again by their inputs: passes of recipes, measurements, sensitivities."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from tsotsallm.errors import ResourceError

ENTRY = "entry.json"
"""The file that is written last into a piece: the length in bytes of each of its other files."""


def key_of(content: object) -> str:
    """A name for the inputs of a piece of work, 32 hexadecimal digits: equal content, equal name."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Store:
    """A folder of pieces, each a folder of files; beyond `limit_bytes` the least recently used are dropped.

    Several processes may share a store. A piece appears whole or not at all, and one whose files changed in length is
    dropped when it is next looked up. On a full disk nothing new is kept and no work stops; `problems` says so.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self.problems: list[str] = []
        self.found: list[str] = []          # kinds of the pieces that were found, in order
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{root} cannot hold finished work ({error.strerror or error}); choose another "
                                "folder") from None

    def find(self, kind: str, key: str) -> Path | None:
        """The folder of a piece; None where it is missing or damaged, in which case its remains are deleted."""
        piece = self.root / f"{kind}-{key}"
        try:
            files = json.loads((piece / ENTRY).read_text("utf-8"))["files"]
            whole = all((piece / name).stat().st_size == size for name, size in files.items())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            shutil.rmtree(piece, ignore_errors=True)
            return None
        os.utime(piece)
        self.found.append(kind)
        return piece

    def keep(self, kind: str, key: str, folders: dict[str, Path], facts: Mapping[str, object], *,
             replace: bool = False) -> None:
        """Add a piece: folders under new names, and facts as facts.json; files are hard-linked where the disk allows.

        A piece that already exists stays, unless `replace` is set.
        """
        piece, draft = self.root / f"{kind}-{key}", self.root / f".{uuid.uuid4().hex}"
        if (piece / ENTRY).exists() and not replace:
            return
        try:
            draft.mkdir()
            for name, folder in folders.items():
                link_tree(folder, draft / name)
            (draft / "facts.json").write_text(json.dumps(facts), "utf-8")
            files = {str(path.relative_to(draft).as_posix()): path.stat().st_size for path in draft.rglob("*")
                     if path.is_file()}
            (draft / ENTRY).write_text(json.dumps({"files": files}), "utf-8")
            shutil.rmtree(piece, ignore_errors=True)
            draft.replace(piece)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if (piece / ENTRY).exists():
                return                          # another process was faster
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.problems.append(f"{self.root} is full: nothing more is kept there, and steps that recipes share are "
                                 "computed again")
        self.evict(spare=piece)

    def facts(self, piece: Path) -> dict[str, object]:
        """The facts that were stored with a piece."""
        found: dict[str, object] = json.loads((piece / "facts.json").read_text("utf-8"))
        return found

    def evict(self, spare: Path | None = None) -> None:
        """Drop the least recently used pieces until the rest is within the limit; never `spare`."""
        pieces = []
        for piece in self.root.iterdir():
            try:
                pieces.append((piece.stat().st_mtime_ns, sum(file.stat().st_size for file in piece.rglob("*")
                                                             if file.is_file()), piece))
            except OSError:
                continue                        # another process drops it
        total = sum(size for _, size, _ in pieces)
        for _, size, piece in sorted(pieces):
            if total <= self.limit_bytes:
                break
            if piece != spare and not piece.name.startswith("."):
                shutil.rmtree(piece, ignore_errors=True)
                total -= size


def link_tree(source: Path, target: Path) -> None:
    """Hard-link every file of a folder under `target`, or copy it where the disk has no links.

    Raises OSError where the disk is full.
    """
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_dir():
            link_tree(entry, target / entry.name)
            continue
        try:
            os.link(entry, target / entry.name)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.copy2(entry, target / entry.name)
