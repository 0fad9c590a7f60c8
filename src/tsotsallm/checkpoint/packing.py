"""Low-bit codes <-> bytes, in the dense layout of compressed-tensors (`pack-quantized`).

The codes of a row, shifted to be unsigned, form one little-endian stream of bits, padded to 32: four- and eight-bit
files are the same as those of every earlier version; 3, 5, 6 and 7 bits follow version 0.20 and later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tsotsallm.numerics.grids import IntegerGrid, Quantised

ROWS_AT_ONCE = 256


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) int8 codes -> (rows, ceil(columns·bits/32)) int32."""
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
        parts = packed.contiguous().view(torch.uint8)[:, :, None] >> torch.arange(0, 8, bits, dtype=torch.uint8)
        return ((parts & ((1 << bits) - 1)).flatten(1)[:, :columns].to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    stream = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    codes = np.empty((len(stream), columns), dtype=np.int8)
    for first in range(0, len(stream), ROWS_AT_ONCE):
        part = stream[first:first + ROWS_AT_ONCE]
        planes = np.unpackbits(part, axis=1, count=columns * bits, bitorder="little")
        unsigned = np.packbits(planes.reshape(len(part), columns, bits), axis=2, bitorder="little")[:, :, 0]
        codes[first:first + len(part)] = (unsigned.astype(np.int16) - (1 << (bits - 1))).astype(np.int8)
    return torch.from_numpy(codes)


def pack(quantised: Quantised) -> dict[str, Tensor]:
    """The tensors that compressed-tensors stores for one linear, by the suffix of their names."""
    bits = quantised.grid.bits
    tensors = {"weight_packed": pack_rows(quantised.codes, bits), "weight_scale": quantised.scales.contiguous(),
               "weight_shape": torch.tensor(quantised.codes.shape)}
    if quantised.zero_points is not None:
        tensors["weight_zero_point"] = pack_rows(quantised.zero_points.mT.contiguous(), bits).mT.contiguous()
    return tensors


def unpack(tensors: dict[str, Tensor], grid: IntegerGrid) -> Quantised:
    """The inverse of `pack`."""
    d_out, d_in = (int(size) for size in tensors["weight_shape"])
    scales = tensors["weight_scale"].view(d_out, -1)
    zero_points = None
    if not grid.symmetric:
        zero_points = unpack_rows(tensors["weight_zero_point"].mT, grid.bits, d_out).mT.contiguous()
    return Quantised(unpack_rows(tensors["weight_packed"], grid.bits, d_in), scales, zero_points, grid)


@dataclass(frozen=True)
class Packed:
    """One linear as its file holds it: the tensors by the suffix of their names."""

    tensors: dict[str, Tensor]
    grid: IntegerGrid

    def unpack(self) -> Quantised:
        return unpack(self.tensors, self.grid)


def quantization_config(grids: dict[str, IntegerGrid | None]) -> dict[str, Any]:
    """compressed-tensors' section of config.json for linears by full module name (None: left in floating point)."""
    by_grid: dict[IntegerGrid, list[str]] = {}
    for name, grid in grids.items():
        if grid is not None:
            by_grid.setdefault(grid, []).append(name)
    ignored = sorted(name for name, grid in grids.items() if grid is None)
    groups = {}
    for index, (grid, names) in enumerate(by_grid.items()):
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(by_grid) == 1 else sorted(names),
            "weights": {"num_bits": grid.bits, "type": grid.plain()["type"], "symmetric": grid.symmetric, "dynamic": False,
                        "strategy": "channel" if grid.group is None else "group",
                        **({} if grid.group is None else {"group_size": grid.group})},
            "input_activations": None, "output_activations": None}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": ["lm_head", *ignored]}
    if any(not grid.symmetric for grid in by_grid):
        config["dequantize"] = True
    return config
