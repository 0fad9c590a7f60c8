"""Safetensors files, read by position and written in a stream, so that no more than one tensor is ever in memory.

Memory maps are avoided: pages of a mapped file count as resident memory, and Windows cannot rename a mapped file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from tsotsallm.checkpoint.stored import LocalFile, StoredFile, opened
from tsotsallm.errors import CheckpointError
from tsotsallm.files import parse_json, quoted, regular_size
from tsotsallm.timing import counted

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 8 << 20
"""Room for about fifty thousand tensors."""
MOST_DIMENSIONS = 8
COPY_BYTES = 8 << 20


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, without a copy where it is contiguous and on the CPU."""
    view: memoryview = tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
    return view


@dataclass(frozen=True)
class TensorRecord:
    """The place of one tensor: file, bytes [start, start + size), type and shape.

    path  the file, as messages name it
    file  what the bytes are read from; None: the file at `path`
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    file: StoredFile | None = field(default=None, kw_only=True, compare=False, repr=False)

    @property
    def stored_bytes(self) -> int:
        """What it takes in the file, which may hold it in another form."""
        return self.size

    def read(self, first_row: int = 0, last_row: int | None = None) -> Tensor:
        """The tensor, or its rows [first_row, last_row), in its stored type.

        Raises CheckpointError where the file has become shorter.
        """
        shape, start, size = self.shape, self.start, self.size
        if last_row is not None or first_row:
            row_bytes = size // shape[0]
            last_row = shape[0] if last_row is None else min(last_row, shape[0])
            start, size = start + first_row * row_bytes, (last_row - first_row) * row_bytes
            shape = (last_row - first_row, *shape[1:])
        tensor = torch.empty(shape, dtype=self.dtype)
        if size:
            self._fill(start, byte_view(tensor))
        return tensor

    def chunks(self) -> Iterator[bytes]:
        """Yield the stored bytes in pieces of at most 8 MiB; raises CheckpointError where the file has become shorter."""
        for first in range(0, self.size, COPY_BYTES):
            piece = bytearray(min(COPY_BYTES, self.size - first))
            self._fill(self.start + first, memoryview(piece))
            yield bytes(piece)

    def _fill(self, start: int, buffer: memoryview) -> None:
        got = (self.file or LocalFile(self.path)).read_into(start, buffer)
        if got < len(buffer):
            raise CheckpointError(f"{self.path} ends {len(buffer) - got} bytes early; download or copy it again")


def read_header(path: Path, stored: StoredFile | None = None) -> dict[str, TensorRecord]:
    """The tensors of a safetensors file by name, checked against its length; raises CheckpointError with the fault.

    `stored` is what it is read from; None: the file at `path`.
    """
    try:
        length = regular_size(path, CheckpointError) if stored is None else stored.size
        with path.open("rb") if stored is None else opened(stored) as file:
            size = int.from_bytes(file.read(8), "little") if length >= 8 else 0
            if length < 8 or size > min(MAX_HEADER_BYTES, length - 8):
                raise CheckpointError(f"{path} is not a safetensors file, or is cut short within its header "
                                      f"({length} bytes); download or copy it again")
            content = file.read(size)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; download or copy the missing shard") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} has an unreadable safetensors header: it is not UTF-8 ({error.reason}); download or "
                              "copy it again") from None
    header = parse_json(text, f"{path} has an unreadable safetensors header: it", CheckpointError, unique=True)
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has an unreadable safetensors header: it is not a JSON object; download or copy it "
                              "again")
    records = {name: replace(_record(path, name, entry, 8 + size), file=stored) for name, entry in header.items()
               if name != "__metadata__"}
    spans = sorted((record.start, record.start + record.size) for record in records.values() if record.size)
    if any(before[1] > after[0] for before, after in pairwise(spans)):
        raise CheckpointError(f"{path} has tensors that overlap; the file is damaged; download or copy it again")
    end = max((record.start + record.size for record in records.values()), default=0)
    if length < end:
        raise CheckpointError(f"{path} is {length} bytes long but its header describes {end}: it is truncated; download or "
                              "copy it again")
    return records


def _record(path: Path, name: str, entry: object, begin: int) -> TensorRecord:
    """The tensor that one entry of a header describes; the tensors begin at byte `begin` of the file."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2 or (
            len(shape) > MOST_DIMENSIONS
            or any(type(number) is not int or not 0 <= number < 1 << 63 for number in (*shape, *offsets))):
        raise CheckpointError(f"{path} has an unreadable safetensors header: tensor {quoted(name)} has offsets "
                              f"{quoted(offsets)} and shape {quoted(shape)}; download or copy it again")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(f"{path}: tensor {quoted(name)} is stored in {quoted(kind)}, which is not read; start from a "
                              "checkpoint in 16 or 32 bits (BF16, F16, F32)")
    first, last = offsets
    if math.prod(shape) * dtype.itemsize != last - first:
        raise CheckpointError(f"{path}: tensor {quoted(name)} claims {last - first} bytes for shape {quoted(shape)} of "
                              f"{kind}; the file is damaged; download or copy it again")
    return TensorRecord(path, dtype, tuple(shape), begin + first, last - first)


Piece = Tensor | TensorRecord


def _layout(pieces: dict[str, Piece]) -> bytes:
    """The header of a file that holds tensors in the given order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, piece in pieces.items():
        size = piece.size if isinstance(piece, TensorRecord) else piece.numel() * piece.element_size()
        entries[name] = {"dtype": DTYPE_NAMES[piece.dtype], "shape": list(piece.shape),
                         "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@counted("disk")
def write_shard(path: Path, pieces: dict[str, Piece]) -> str:
    """Write tensors, or copies of stored ones, in the given order, flushed to disk; returns the file's sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in _shard_bytes(pieces):
            digest.update(chunk)
            file.write(chunk)
        sync(file)
    return digest.hexdigest()


def _shard_bytes(pieces: dict[str, Piece]) -> Iterator[bytes | memoryview]:
    yield _layout(pieces)
    for piece in pieces.values():
        if isinstance(piece, TensorRecord):
            yield from piece.chunks()
        elif piece.numel():
            yield byte_view(piece)


def sync(file: BinaryIO) -> None:
    """Flush an open file through to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(COPY_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def group_by_size(paths: Iterable[Path], limit_bytes: int) -> list[list[Path]]:
    """Group neighbouring files so that each group has at most `limit_bytes`, or is one file."""
    groups: list[list[Path]] = []
    filled = 0
    for path in paths:
        size = path.stat().st_size
        if not groups or filled + size > limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(path)
        filled += size
    return groups
