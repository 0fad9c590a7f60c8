"""A file on the hub that is read by position: pieces come over the network when they are read, and stay for a while."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.errors import CheckpointError
from tsotsallm.remote.cache import PARTIAL, PieceCache
from tsotsallm.remote.transfer import Facts, receive

HEAD_BYTES = 1 << 16
MOST_HEAD_BYTES = 8 << 20
TAIL_BYTES = 1 << 16
"""The last bytes of a file are a piece of their own, since fingerprints need them."""
PIECE_BYTES = 32 << 20
GAP_BYTES = 4096
"""Bytes between two tensors that are fetched along with them."""
_HASHED_AT_ONCE = 4 << 20


@dataclass(frozen=True)
class Span:
    """Bytes [start, end) that are read together with their neighbours of the same group; `kept`: that go last."""

    start: int
    end: int
    group: str
    kept: bool = False


class RemoteFile:
    """A file on the hub; until it is divided, pieces that double in size from 64 KiB on, as headers need.

    head_bytes  what stands before the tensors; 0 until it is divided
    verified    whether all of it has passed in order and has the checksum that the hub gives
    """

    def __init__(self, facts: Facts, cache: PieceCache) -> None:
        self.facts, self.cache = facts, cache
        self._folder = hashlib.sha256(f"{facts.sha256 or facts.url} {facts.size}".encode()).hexdigest()[:16]
        self._cuts = list(_head_cuts(facts.size))
        self._digest = hashlib.sha256()
        self._hashed = 0
        self.head_bytes, self.verified = 0, False

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self.facts.size

    @property
    def known_sha256(self) -> str | None:
        """The SHA-256 that the hub gives for its content."""
        return self.facts.sha256

    def divide(self, data: int, spans: Iterable[Span]) -> None:
        """Cut what follows the header into pieces: neighbours of one group together, large ones in parts.

        `data` is where the header ends.
        """
        cuts, self.head_bytes = [], data
        for cut in _head_cuts(self.size):
            cuts.append(cut)
            if cut >= data:
                break
        head, piece, group, last = cuts[-1], cuts[-1], "", data
        kept: list[tuple[int, int]] = []
        for span in sorted(spans, key=lambda one: one.start):
            if span.kept:
                kept.append((span.start, span.end))
            if span.end <= head:
                continue
            if span.group != group or span.end - piece > PIECE_BYTES or span.start > last + GAP_BYTES:
                if span.start > max(last, head) + GAP_BYTES:
                    cuts.append(max(last, head))        # what nobody reads is not part of a piece
                group, piece = span.group, max(span.start, head)
                cuts += range(piece, span.end, PIECE_BYTES)
            last = span.end
        if (tail := self.size - TAIL_BYTES) > head:
            cuts.append(tail)
        self._cuts = sorted({*cuts, self.size})
        for start, end in zip([0, *self._cuts], self._cuts, strict=False):
            ends = end <= head or start >= self.size - TAIL_BYTES
            if ends or any(one < end and other > start for one, other in kept):
                self.cache.keep(self._path(start, end), always=ends)

    def read_into(self, start: int, buffer: memoryview) -> int:
        """Fill a buffer with the bytes from `start` on; returns how many there were.

        Raises HubError where the hub does not give them, CheckpointError where the file is not the one that the hub names.
        """
        end = min(self.size, start + len(buffer))
        place = start
        while place < end:
            first, last = self._piece(place)
            until = min(last, end)
            self._copy(first, last, place, buffer[place - start:until - start])
            place = until
        return max(0, place - start)

    def _piece(self, place: int) -> tuple[int, int]:
        number = bisect_right(self._cuts, place)
        return (self._cuts[number - 1] if number else 0), self._cuts[number]

    def _path(self, start: int, end: int) -> Path:
        return self.cache.path(self._folder, start, end)

    def _copy(self, first: int, last: int, place: int, into: memoryview) -> None:
        """Copy bytes from `place` on out of the piece [first, last)."""
        path = self._path(first, last)
        while True:
            try:
                with path.open("rb", buffering=0) as file:
                    self.cache.used(path)
                    file.seek(place - first)
                    filled = 0
                    while filled < len(into) and (got := file.readinto(into[filled:])):
                        filled += got
                if filled == len(into):
                    return
                path.unlink(missing_ok=True)        # a disk that lost its end
            except FileNotFoundError:               # not there yet, or another process needed the room
                pass
            self._fetch(first, last, path)

    def _fetch(self, first: int, last: int, path: Path) -> None:
        """Receive the rest of a piece; what an interrupted attempt received is kept."""
        with self.cache.alone():
            if path.exists():
                return
            partial = path.with_name(path.name + PARTIAL)
            partial.parent.mkdir(parents=True, exist_ok=True)
            have = partial.stat().st_size if partial.exists() else 0
            if have > last - first:
                partial.unlink()
                have = 0
            self.cache.make_room(last - first - have, path)
            with partial.open("ab", buffering=0) as out:
                def take(chunk: bytes) -> None:
                    view = memoryview(chunk)
                    while view:
                        view = view[out.write(view):]
                    self.cache.arrived(path, len(chunk))

                receive(self.facts, first + have, last, take, lambda: self.cache.received)
                os.fsync(out.fileno())
            try:
                partial.replace(path)
            except FileNotFoundError:           # another process was done with the model, and deleted its pieces
                return
            self.cache.whole(path)
            self._verify()

    def _verify(self) -> None:
        """Hash the pieces that follow what was hashed before, and compare when all of the file has passed."""
        while self._hashed < self.size:
            first, last = self._piece(self._hashed)
            path = self._path(first, last)
            if first != self._hashed or not path.exists():
                return
            with path.open("rb") as file:
                while chunk := file.read(_HASHED_AT_ONCE):
                    self._digest.update(chunk)
            self._hashed = last
        if self.facts.sha256 is None or self.verified:
            return
        if self._digest.hexdigest() != self.facts.sha256:
            for path in self._pieces():
                path.unlink(missing_ok=True)
            raise CheckpointError(f"{self.facts.name} does not have the checksum that the hub gives for it: it was damaged "
                                  "on its way; its pieces were deleted: run the same command again")
        self.verified = True

    def _pieces(self) -> Iterator[Path]:
        return (self._path(start, end) for start, end in zip([0, *self._cuts], self._cuts, strict=False))


def _head_cuts(size: int) -> Iterator[int]:
    """Ends of pieces that double in size, up to the file's."""
    place, step = 0, HEAD_BYTES
    while place < size:
        place = min(size, place + step)
        yield place
        step = min(MOST_HEAD_BYTES, 2 * step)
