"""Where the bytes of tensors come from: a file that is read by position, on disk or elsewhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, cast

if TYPE_CHECKING:
    from typing_extensions import Buffer


STEP_BYTES = 1 << 16
"""A stream reads up to multiples of this and not ahead, since what follows a header may be far away."""


class StoredFile(Protocol):
    """A file that is read by position."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    @property
    def known_sha256(self) -> str | None:
        """The SHA-256 of its content, where that is known without reading it."""

    def read_into(self, start: int, buffer: memoryview) -> int:
        """Fill a buffer with the bytes from `start` on; returns how many there were, fewer only where the file ends."""


class LocalFile:
    """A file on disk."""

    known_sha256: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def size(self) -> int:
        """Its length in bytes; raises OSError where there is no such file."""
        return self.path.stat().st_size

    def read_into(self, start: int, buffer: memoryview) -> int:
        """Fill a buffer with the bytes from `start` on; returns how many there were."""
        filled = 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            while filled < len(buffer):
                got = file.readinto(buffer[filled:])
                if not got:
                    break
                filled += got
        return filled


class _Reader(io.RawIOBase):
    """A stored file as one that is read from its beginning."""

    def __init__(self, file: StoredFile) -> None:
        self.file, self.place = file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        step = STEP_BYTES - self.place % STEP_BYTES
        got = self.file.read_into(self.place, view[:max(0, min(step, self.file.size - self.place))])
        self.place += got
        return got


def opened(file: StoredFile) -> BinaryIO:
    """A stored file as a stream of bytes from its beginning."""
    return cast(BinaryIO, io.BufferedReader(_Reader(file)))


def bytes_at(file: StoredFile, start: int, size: int) -> bytes:
    """At most `size` bytes from `start` on; fewer where the file ends."""
    data = bytearray(max(0, min(size, file.size - start)))
    got = file.read_into(start, memoryview(data))
    return bytes(data[:got])
