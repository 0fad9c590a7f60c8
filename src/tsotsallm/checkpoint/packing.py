"""Low-bit codes <-> bytes: ggml's blocks, or the dense layout of compressed-tensors (`pack-quantized`).

In the latter the codes of a row, shifted to be unsigned, form one little-endian stream of bits, padded to 32: 4-bit and
8-bit files are the same in every version; 3, 5, 6 and 7 bits follow version 0.20 and later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsotsallm.numerics import ggml
from tsotsallm.numerics.grids import GRIDS, Grid, IntegerGrid, Quantised, Stored, grid_from

ROWS_AT_ONCE = 256
MOST_REPEATS = 4
_REPEATS, _NESTED = re.compile(r"[*+{]|(?<!\()\?"), re.compile(r"\)[*+{]")


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes, (rows, columns) int8, into bits: (rows, ceil(columns·bits/32)) int32."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    packed = np.zeros((rows, words * 4), dtype=np.uint8)
    unsigned = (codes.cpu().numpy().astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    for first in range(0, rows, ROWS_AT_ONCE):
        part = unsigned[first:first + ROWS_AT_ONCE]
        planes = np.unpackbits(part[:, :, None], axis=2, count=bits, bitorder="little").reshape(len(part), -1)
        stream = np.packbits(planes, axis=1, bitorder="little")
        packed[first:first + len(part), :stream.shape[1]] = stream
    return torch.from_numpy(packed.view("<i4"))


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_rows`: int8 codes of shape (rows, columns)."""
    if bits in (2, 4, 8):               # whole codes in every byte
        # a clone, since a transposed column of one word counts as contiguous, but not as bytes
        stored = packed.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        parts = stored[:, :, None] >> torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((parts & ((1 << bits) - 1)).flatten(1)[:, :columns].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    stream = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    codes = np.empty((len(stream), columns), dtype=np.int8)
    for first in range(0, len(stream), ROWS_AT_ONCE):
        part = stream[first:first + ROWS_AT_ONCE]
        planes = np.unpackbits(part, axis=1, count=columns * bits, bitorder="little")
        unsigned = np.packbits(planes.reshape(len(part), columns, bits), axis=2, bitorder="little")[:, :, 0]
        codes[first:first + len(part)] = (unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
    return torch.from_numpy(codes)


SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_blocks")
"""Suffixes of the tensors that a packed linear may consist of."""


def pack(quantised: Stored) -> dict[str, Tensor]:
    """The tensors that are stored for one linear, by the suffix of their names."""
    if isinstance(quantised, ggml.Blocks):
        return {"weight_blocks": torch.from_numpy(ggml.encode(quantised))}
    bits = quantised.grid.bits
    tensors = {"weight_packed": pack_rows(quantised.codes, bits), "weight_scale": quantised.scales.contiguous(),
               "weight_shape": torch.tensor(quantised.codes.shape)}
    if quantised.zero_points is not None:
        tensors["weight_zero_point"] = pack_rows(quantised.zero_points.mT.contiguous(), bits).mT.contiguous()
    return tensors


def unpack(tensors: dict[str, Tensor], grid: Grid) -> Stored:
    """The inverse of `pack`: a weight on `grid` from its tensors by suffix."""
    if isinstance(grid, ggml.GgmlGrid):
        return ggml.decode(tensors["weight_blocks"], grid)
    d_out, d_in = (int(size) for size in tensors["weight_shape"])
    scales = tensors["weight_scale"].view(d_out, -1)
    zero_points = None
    if not grid.symmetric:
        zero_points = unpack_rows(tensors["weight_zero_point"].mT, grid.bits, d_out).mT.contiguous()
    return Quantised(unpack_rows(tensors["weight_packed"], grid.bits, d_in), scales, zero_points, grid)


@dataclass(frozen=True)
class Packed:
    """One linear as stored in its file: the tensors by the suffix of their names."""

    tensors: dict[str, Tensor]
    grid: Grid

    def unpack(self) -> Stored:
        """Its codes and scales."""
        return unpack(self.tensors, self.grid)


def scheme_of(grid: Grid) -> dict[str, object]:
    """The description of a grid for config.json, in the terms of compressed-tensors where they suffice."""
    if isinstance(grid, ggml.GgmlGrid):
        kind, bits, symmetric, group = grid.type, grid.layout.bits, not grid.layout.minimum, grid.layout.part
    else:
        kind, bits, symmetric, group = str(grid.plain()["type"]), grid.bits, grid.symmetric, grid.group or 0
    return {"num_bits": bits, "type": kind, "symmetric": symmetric, "dynamic": False,
            "strategy": "group" if group else "channel", **({"group_size": group} if group else {})}


def is_target(target: object) -> bool:
    """Whether a target of compressed-tensors can be read: a name, or `re:` and an expression that is quick to match."""
    if not isinstance(target, str) or not target.startswith("re:"):
        return isinstance(target, str)
    try:
        re.compile(target[3:])
    except (re.error, RecursionError, OverflowError):
        return False
    # backtracking over many or nested repetitions might never end
    return len(_REPEATS.findall(target)) <= MOST_REPEATS and not _NESTED.search(target)


def grid_of_scheme(scheme: dict[str, Any]) -> Grid:
    """The inverse of `scheme_of`."""
    kind = scheme["type"]
    if kind not in GRIDS[:2]:
        return grid_from({"type": kind})
    size = scheme.get("group_size") if scheme["strategy"] == "group" else None
    return grid_from({"type": kind, "bits": int(scheme["num_bits"]), "group": size,
                      "symmetric": bool(scheme.get("symmetric", True))})


def quantization_config(grids: dict[str, Grid | None]) -> dict[str, object]:
    """The section of config.json that compressed-tensors reads, for linears by full module name (None: floating point)."""
    by_grid: dict[Grid, list[str]] = {}
    for name, grid in grids.items():
        if grid is not None:
            by_grid.setdefault(grid, []).append(name)
    ignored = sorted({name for name, grid in grids.items() if grid is None} | ({"lm_head"} - grids.keys()))
    ends = any(not name.startswith("model.layers.") for name, grid in grids.items() if grid is not None)
    groups = {}
    for index, (grid, names) in enumerate(by_grid.items()):
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(by_grid) == 1 and not ends else sorted(names), "weights": scheme_of(grid),
            "input_activations": None, "output_activations": None}
    config: dict[str, object] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": ignored}
    if any(isinstance(grid, IntegerGrid) and not grid.symmetric for grid in by_grid):
        config["dequantize"] = True
    return config
