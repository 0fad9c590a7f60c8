"""Pieces of remote files on disk, within a bound: the least recently used go first."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tsotsallm.errors import HubError
from tsotsallm.units import human_bytes

PARTIAL = ".part"
ALWAYS = 2
STALE_S = 86400.0
"""Pieces of other models that nobody used for so long are deleted."""


class PieceCache:
    """The pieces of one model at one commit.

    limit_bytes  what they may take on disk together
    received     bytes that came over the network for it in this process
    again        how many of these had been there before, and were deleted for want of room
    peak_bytes   the most that the pieces took
    """

    def __init__(self, root: Path, name: str, limit_bytes: int) -> None:
        self.root, self.folder, self.limit_bytes = root, root / name, limit_bytes
        self.received = self.again = self.peak_bytes = 0
        self._thread = threading.RLock()
        self._kept: dict[Path, int] = {}
        self._seen: set[Path] = set()
        self._forget_strangers()

    def path(self, file: str, start: int, end: int) -> Path:
        """Where the piece [start, end) of a file is, or is to be."""
        return self.folder / file / f"{start:014d}-{end:014d}"

    def keep(self, path: Path, *, always: bool) -> None:
        """Let a piece go after others; `always`: last of all, and not by `release`."""
        self._kept[path] = ALWAYS if always else 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold off other threads and processes that would add pieces of this model."""
        from filelock import FileLock

        with self._thread:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / "lock"):
                yield

    def used(self, path: Path) -> None:
        """Note that a piece is used now."""
        now = time.time_ns()
        os.utime(path, ns=(now, now))       # the file system's own clock ticks too slowly to tell which was first

    def make_room(self, needed: int, path: Path) -> None:
        """Delete pieces until `needed` more bytes are within the bound, but never what `path` is to become.

        Raises HubError where the bound is too small for that piece alone.
        """
        found = []
        for one in self._files():
            try:
                status = one.stat()
            except FileNotFoundError:       # another process was faster
                continue
            found.append((self._kept.get(one, 0), status.st_mtime_ns, status.st_size, one))
        total = sum(size for _, _, size, _ in found) + needed
        for _, _, size, one in sorted(found):
            if total <= self.limit_bytes:
                break
            if one.name.removesuffix(PARTIAL) == path.name and one.parent == path.parent:
                continue
            with suppress(PermissionError):     # Windows: another process reads it
                one.unlink(missing_ok=True)
                total -= size
        if total > self.limit_bytes:
            raise HubError(f"a piece of {human_bytes(total)} is to be kept on disk, and --cache-bytes is "
                           f"{human_bytes(self.limit_bytes)}; give at least {human_bytes(total)}")
        self.peak_bytes = max(self.peak_bytes, total)

    def arrived(self, path: Path, size: int) -> None:
        """Count bytes of a piece that came over the network."""
        self.received += size
        self.again += size if path in self._seen else 0

    def whole(self, path: Path) -> None:
        """Note that all of a piece was received."""
        self._seen.add(path)

    def release(self) -> None:
        """Delete the pieces of tensors, but not of headers."""
        for path in self._files():
            if self._kept.get(path) != ALWAYS:
                with suppress(PermissionError):
                    path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Delete all pieces."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _files(self) -> Iterator[Path]:
        return (path for path in self.folder.glob("*/*") if path.is_file())

    def _forget_strangers(self) -> None:
        """Delete what other models left, if nobody used it for a day."""
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if folder == self.folder or not folder.is_dir():
                continue
            with suppress(OSError):
                newest = max((path.stat().st_mtime for path in folder.rglob("*")), default=0.0)
                if time.time() - newest > STALE_S:
                    shutil.rmtree(folder, ignore_errors=True)
