"""Tensors of a GGUF file where they are: rows in another order, or blocks that are turned into numbers as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsotsallm.checkpoint.gguf_file import TYPES, GgufTensor
from tsotsallm.checkpoint.shards import TensorRecord, byte_view
from tsotsallm.checkpoint.stored import StoredFile
from tsotsallm.errors import CheckpointError, MissingExtraError

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
WIDE = {"mxfp4": torch.bfloat16, "nvfp4": torch.bfloat16}
"""Types whose values span more powers of two than half precision has; they have few digits."""
BLOCKS = {name: (weights, size) for name, weights, size in TYPES.values()}
CHUNK_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class ReorderedRecord(TensorRecord):
    """A tensor whose row i is row `order[i]` of the file."""

    order: tuple[int, ...] = field(default=(), repr=False)

    def read(self, first_row: int = 0, last_row: int | None = None) -> Tensor:
        """The tensor, or its rows [first_row, last_row), in its stored type; all rows are read."""
        return super().read()[torch.tensor(self.order[first_row:last_row], dtype=torch.int64)]

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the tensor in its own order."""
        yield bytes(byte_view(self.read()))


@dataclass(frozen=True)
class DequantisedRecord(TensorRecord):
    """A matrix on a type of ggml that has no grid here, as numbers in 16 bits; path, start and size are those of `raw`.

    raw   the bytes of the rows, (rows, bytes of a row) uint8
    kind  the type
    """

    raw: TensorRecord | None = None
    kind: str = ""

    @property
    def stored_bytes(self) -> int:
        """Those of `raw`."""
        assert self.raw is not None
        return self.raw.stored_bytes

    def read(self, first_row: int = 0, last_row: int | None = None) -> Tensor:
        """The values, or those of rows [first_row, last_row), in 16 bits."""
        last = self.shape[0] if last_row is None else min(last_row, self.shape[0])
        found = torch.empty((last - first_row, *self.shape[1:]), dtype=self.dtype)
        for first, values in self._parts(first_row, last):
            found[first - first_row:first - first_row + len(values)] = values
        return found

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the values."""
        for _, values in self._parts(0, self.shape[0]):
            yield bytes(byte_view(values))

    def _parts(self, first_row: int, last_row: int) -> Iterator[tuple[int, Tensor]]:
        assert self.raw is not None
        step = max(1, CHUNK_ELEMENTS // math.prod(self.shape[1:]))
        for first in range(first_row, last_row, step):
            raw = self.raw.read(first, min(first + step, last_row))
            yield first, torch.from_numpy(dequantised(raw.numpy(), self.kind)).to(self.dtype)


@dataclass(frozen=True)
class ShiftedRecord(TensorRecord):
    """A row of numbers in float32, each less than in the file by `shift`: norms that are stored with what is added to them.

    Path, start and size are those of `raw`.
    """

    raw: TensorRecord | None = None
    shift: float = 0.0

    @property
    def stored_bytes(self) -> int:
        """Those of `raw`."""
        assert self.raw is not None
        return self.raw.stored_bytes

    def read(self, first_row: int = 0, last_row: int | None = None) -> Tensor:
        """The values, or those from `first_row` to before `last_row`, in float32."""
        assert self.raw is not None
        return (self.raw.read(first_row, last_row).double() - self.shift).float()

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the values."""
        yield bytes(byte_view(self.read()))


def shifted(record: TensorRecord, shift: float) -> TensorRecord:
    """A record of floating-point numbers, each less by `shift` than what is stored."""
    return ShiftedRecord(record.path, torch.float32, record.shape, record.start, math.prod(record.shape) * 4, record, shift,
                         file=record.file)


def dequantised(rows: Any, kind: str) -> Any:
    """Values of rows in blocks, (rows, columns) float32, by the gguf library."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", f"reading weights of the type {kind}") from None
    # scales are arbitrary bits: what they overflow to is reported where values are used
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind.upper()]), dtype=np.float32)


def require_readable(kind: str, where: str) -> None:
    """Raise CheckpointError unless the gguf library can read a type, MissingExtraError where there is no such library."""
    weights, size = BLOCKS[kind]
    try:
        found = dequantised(np.zeros((1, size), dtype=np.uint8), kind).shape == (1, weights)
    except (NotImplementedError, KeyError):     # what the library raises for types that it cannot decode, or does not know
        found = False
    if not found:
        raise CheckpointError(f"{where} is stored as {kind}, a type that is not read; start from a file of another type, or "
                              "from the 16-bit checkpoint")


def record_of(tensor: GgufTensor, path: Path, order: tuple[int, ...] | None, file: StoredFile | None = None) -> TensorRecord:
    """The place of a tensor: floating point as it is, anything else dequantised on reading; rows in `order`, if given.

    It is read from `file`, if given, else from the file at `path`.
    """
    if tensor.type in FLOATS:
        return _stored(path, FLOATS[tensor.type], tensor.shape, tensor, order, file)
    dtype = WIDE.get(tensor.type, torch.float16)
    return DequantisedRecord(path, dtype, tensor.shape, tensor.start, tensor.elements * dtype.itemsize,
                             blocks_of(tensor, path, order, file), tensor.type, file=file)


def blocks_of(tensor: GgufTensor, path: Path, order: tuple[int, ...] | None, file: StoredFile | None = None) -> TensorRecord:
    """The bytes of a matrix, (rows, bytes of a row) uint8."""
    rows = math.prod(tensor.shape[:-1])
    return _stored(path, torch.uint8, (rows, tensor.size // max(rows, 1)), tensor, order, file)


def _stored(path: Path, dtype: torch.dtype, shape: tuple[int, ...], tensor: GgufTensor,
            order: tuple[int, ...] | None, file: StoredFile | None) -> TensorRecord:
    if order is None:
        return TensorRecord(path, dtype, shape, tensor.start, tensor.size, file=file)
    return ReorderedRecord(path, dtype, shape, tensor.start, tensor.size, order, file=file)
