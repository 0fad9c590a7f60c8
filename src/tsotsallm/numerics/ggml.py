"""The grids of GGUF: what their codes stand for, and their bytes as ggml lays them out.

A row is split into blocks of 32 or 256 columns, a block into parts of 16 or 32 (of 256 on tq2_0). The value of a code q is

    step·q                      where zero is always a level (symmetric)
    step·q − low                where every part has a minimum of its own
    step·level(q)               where sixteen levels lie closer together near zero, which is none of them (iq4)

with a step and a low for each part, which grids of 256 columns store as integers times one 16-bit number of the block.
Everything is computed in float32 in ggml's order, so that values are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[Any]

IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the stored codes of iq4_nl and iq4_xs stand for, in units of the step (kvalues_iq4nl)."""


@dataclass(frozen=True)
class Layout:
    """The structure of one of ggml's grids.

    bits        bits of a code
    part        columns that share a step
    block       columns that share the 16-bit numbers
    minimum     whether parts have a lowest value of their own instead of a level at zero
    scales      (lowest, highest) integer by which a part multiplies the block's step (and minimum); None: one part a block
    bytes       bytes of a block
    levels      what the stored codes stand for, rising integers, where they are not evenly spaced; None: they are
    """

    bits: int
    part: int
    block: int
    minimum: bool
    scales: tuple[int, int] | None
    bytes: int
    levels: tuple[int, ...] | None = None


LAYOUTS = {
    "q4_0": Layout(4, 32, 32, False, None, 18), "q4_1": Layout(4, 32, 32, True, None, 20),
    "q5_0": Layout(5, 32, 32, False, None, 22), "q5_1": Layout(5, 32, 32, True, None, 24),
    "q8_0": Layout(8, 32, 32, False, None, 34),
    "q2_k": Layout(2, 16, 256, True, (0, 15), 84), "q3_k": Layout(3, 16, 256, False, (-32, 31), 110),
    "q4_k": Layout(4, 32, 256, True, (0, 63), 144), "q5_k": Layout(5, 32, 256, True, (0, 63), 176),
    "q6_k": Layout(6, 16, 256, False, (-128, 127), 210),
    "iq4_nl": Layout(4, 32, 32, False, None, 18, IQ4_LEVELS),
    "iq4_xs": Layout(4, 32, 256, False, (-32, 31), 136, IQ4_LEVELS),
    "tq2_0": Layout(2, 256, 256, False, None, 66)}


def half(values: Tensor) -> Tensor:
    """Values rounded to half precision, as float32."""
    return values.to(torch.float16).float()


def _even(lowest: int, highest: int) -> Callable[[Tensor], Tensor]:
    def nearest(values: Tensor) -> Tensor:
        return values.round_().clamp_(lowest, highest)
    return nearest


def _uneven(levels: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Midpoints between integers are halves of integers, so that the nearest level follows from ⌊2x⌋; what is not a number
    gets some level."""
    low, high = 2 * levels[0], 2 * levels[-1]
    size = 1 << max(-low, high).bit_length() + 1        # negative places count from the end, as in two's complement
    places = np.arange(size)
    halves = np.where(places < size // 2, places, places - size).clip(low, high)
    distances = np.abs(halves[:, None] + 0.5 - 2 * np.array(levels))
    table = torch.from_numpy(np.array(levels, dtype=np.float32)[distances.argmin(1)])

    def nearest(values: Tensor) -> Tensor:
        at = values.add_(values).floor_().clamp_(low, high).to(torch.int32).bitwise_and_(size - 1)
        return values.copy_(table.to(values).index_select(0, at.flatten()).view(values.shape))
    return nearest


@cache
def _nearest_of(kind: str) -> Callable[[Tensor], Tensor]:
    grid = GgmlGrid(kind)
    return _even(grid.lowest, grid.highest) if grid.layout.levels is None else _uneven(grid.layout.levels)


_NEXT = {"tq2_0": "q4_0", "q2_k": "iq4_nl", "q3_k": "iq4_nl", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1",
         "q6_k": "q8_0"}
"""The grid that replaces one whose blocks of 256 do not divide a row, as llama.cpp does."""
_NEXT_WITH_ZEROS = _NEXT | {"q3_k": "q4_0"}
"""The same where zeros have to stay zeros: of grids that hold them, to grids that do."""


@dataclass(frozen=True)
class GgmlGrid:
    """One of ggml's grids, by its name in lower case."""

    type: str

    @property
    def layout(self) -> Layout:
        """The structure of the grid."""
        return LAYOUTS[self.type]

    @property
    def lowest(self) -> int:
        """The lowest code that rounding uses; q8_0 and tq2_0 are kept symmetric, as in ggml."""
        if self.layout.levels is not None:
            return self.layout.levels[0]
        if self.layout.minimum:
            return 0
        return -self.highest if self.type in ("q8_0", "tq2_0") else -(1 << (self.layout.bits - 1))

    @property
    def highest(self) -> int:
        """The highest code."""
        if self.layout.levels is not None:
            return self.layout.levels[-1]
        return (1 << self.layout.bits) - 1 if self.layout.minimum else (1 << (self.layout.bits - 1)) - 1

    @property
    def outermost(self) -> tuple[int, int]:
        """Where the weight of largest magnitude lies with a step of either sign, on grids without a minimum: at the lowest
        code, or at its mirror image, which even grids clamp to the highest code."""
        return self.lowest, -self.lowest if self.layout.levels is None else self.highest

    @property
    def nearest(self) -> Callable[[Tensor], Tensor]:
        """What replaces values, in units of the step, by the codes nearest to them, in place, and returns them; of two codes
        that are equally near, the even one, or the higher one where levels are uneven."""
        return _nearest_of(self.type)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.layout.bytes / self.layout.block

    @property
    def holds_zeros(self) -> bool:
        """Whether zero is always a level, so that pruned weights stay pruned."""
        return not self.layout.minimum and self.layout.levels is None

    @property
    def plain_hf(self) -> bool:
        """False: a plain Hugging Face checkpoint cannot hold ggml's blocks."""
        return False

    def plain(self) -> dict[str, object]:
        """The grid as JSON, from which `grid_from` makes an equal one."""
        return {"type": self.type}

    def fitting(self, d_in: int, *, zeros: bool = False) -> GgmlGrid | None:
        """This grid where its blocks divide a row, else the next one whose blocks do; None where none does.

        With `zeros`, a grid that holds the zeros of a pruned model is replaced by one that does.
        """
        others = _NEXT_WITH_ZEROS if zeros else _NEXT
        grid = self if d_in % self.layout.block == 0 else GgmlGrid(others.get(self.type, self.type))
        return grid if d_in % grid.layout.block == 0 else None

    def stored_bytes(self, d_out: int, d_in: int, scale_bytes: int = 2) -> int:
        """Bytes of one stored linear; `scale_bytes` is ignored, since scales are part of the blocks."""
        return d_out * (d_in // self.layout.block) * self.layout.bytes


@dataclass(frozen=True)
class Blocks:
    """A weight on a grid of ggml.

    codes    (d_out, d_in) int8, in [lowest, highest]; where levels are uneven, the levels themselves
    step     (d_out, blocks) float32 that 16 bits hold
    low      (d_out, blocks) float32 that 16 bits hold, on grids with a minimum: added where a block has one part,
             multiplied by `lows` and subtracted where it has several
    scales   (d_out, parts) int16, where a block has several parts
    lows     (d_out, parts) int16, where a block has several parts with a minimum
    """

    codes: Tensor
    step: Tensor
    low: Tensor | None
    scales: Tensor | None
    lows: Tensor | None
    grid: GgmlGrid

    def rows_at(self, rows: Tensor) -> Blocks:
        """Some rows of the weight, or all of them in another order; rows (k,) int64."""
        def at(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[rows]

        return Blocks(self.codes[rows], self.step[rows], at(self.low), at(self.scales), at(self.lows), self.grid)

    def to(self, device: torch.device) -> Blocks:
        """The same blocks on a device."""
        def there(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        return Blocks(self.codes.to(device), self.step.to(device), there(self.low), there(self.scales), there(self.lows),
                      self.grid)

    def steps(self) -> Tensor:
        """The step of every part, the value of one unit of the code, (d_out, parts) float32."""
        return self.step if self.scales is None else self._per_part(self.step) * self.scales.float()

    def offsets(self) -> Tensor | None:
        """The offset that is added to every value of a part, (d_out, parts) float32; None on symmetric grids."""
        if self.low is None:
            return None
        return self.low if self.lows is None else -(self._per_part(self.low) * self.lows.float())

    def _per_part(self, values: Tensor) -> Tensor:
        layout = self.grid.layout
        return values.repeat_interleave(layout.block // layout.part, dim=1)

    def dequantise(self) -> Tensor:
        """The values as ggml computes them, (d_out, d_in) float32."""
        d_out, d_in = self.codes.shape
        values = self.codes.float().view(d_out, -1, self.grid.layout.part)
        values = values * self.steps().unsqueeze(-1)
        offsets = self.offsets()
        if offsets is not None:
            values += offsets.unsqueeze(-1)
        return values.view(d_out, d_in)

    @property
    def finite(self) -> bool:
        """Whether the 16-bit numbers of every block are finite."""
        return bool(torch.isfinite(self.step).all()) and (self.low is None or bool(torch.isfinite(self.low).all()))


def encode(blocks: Blocks) -> Bytes:
    """The bytes of a weight in ggml's layout, (d_out, bytes of a row) uint8."""
    blocks, layout = blocks.to(torch.device("cpu")), blocks.grid.layout
    d_out, d_in = blocks.codes.shape
    count = d_out * d_in // layout.block
    signed = blocks.codes.numpy().reshape(count, layout.block).astype(np.int16)
    codes = ((signed - _OFFSETS[blocks.grid.type]) if layout.levels is None else np.searchsorted(layout.levels, signed)
             ).astype(np.uint8)

    def numbers(values: Tensor | None) -> Bytes:
        assert values is not None
        return values.numpy().astype(np.float16).reshape(count, 1).view(np.uint8)

    def integers(values: Tensor | None) -> npt.NDArray[np.int16]:
        assert values is not None
        return values.numpy().astype(np.int16).reshape(count, -1)

    return np.concatenate(_ENCODERS[blocks.grid.type](codes, blocks, numbers, integers), axis=1).reshape(d_out, -1)


def decode(data: Tensor | Bytes, grid: GgmlGrid) -> Blocks:
    """The inverse of `encode`: bytes (d_out, bytes of a row) uint8 -> codes and their scales."""
    raw = data.numpy() if isinstance(data, Tensor) else data
    d_out, layout = len(raw), grid.layout
    rows = np.ascontiguousarray(raw).reshape(-1, layout.bytes)
    codes, step, low, scales, lows = _DECODERS[grid.type](rows)

    def matrix(values: Bytes | None, dtype: torch.dtype) -> Tensor | None:
        return None if values is None else torch.from_numpy(np.ascontiguousarray(values).reshape(d_out, -1)).to(dtype)

    values = (codes.astype(np.int16) + _OFFSETS[grid.type]) if layout.levels is None else np.array(layout.levels)[codes]
    signed = torch.from_numpy(values.astype(np.int8).reshape(d_out, -1))
    steps = matrix(step, torch.float32)
    assert steps is not None
    return Blocks(signed, steps, matrix(low, torch.float32), matrix(scales, torch.int16), matrix(lows, torch.int16), grid)


# -- bytes of each grid: layouts of ggml-common.h ---------------------------------------------------------------------

_OFFSETS = dict.fromkeys(LAYOUTS, 0) | {"q4_0": -8, "q5_0": -16, "q3_k": -4, "q6_k": -32, "tq2_0": -1}
"""What is added to a stored code to give the signed one."""

_SIMPLE = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")
"""Grids with one part a block."""

_Numbers = Callable[[Tensor | None], Bytes]
"""Turns a 16-bit number of each block into bytes."""
_Integers = Callable[[Tensor | None], npt.NDArray[np.int16]]
"""Turns the stored integers of the parts into rows, one for each block."""
_Encoder = Callable[[Bytes, Blocks, _Numbers, _Integers], list[Bytes]]
_Decoded = tuple[Bytes, Bytes, Bytes | None, Bytes | None, Bytes | None]
"""Codes, step and low of every block, scales and lows of every part."""
_Decoder = Callable[[Bytes], _Decoded]


def _number(rows: Bytes, at: int) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(rows[:, at:at + 2]).view(np.float16).astype(np.float32)


def _stack(codes: Bytes, run: int, bits: int) -> Bytes:
    """Pack the bits of codes into bytes: byte i of a run holds codes i, i + n, i + 2n, ... from its lowest bits up.

    codes (blocks, columns) below 2**bits; a run is the number of columns that share one stretch of run·bits/8 bytes.
    """
    per_byte = 8 // bits
    parts = codes.reshape(len(codes), -1, per_byte, run // per_byte)
    packed = np.zeros((*parts.shape[:2], parts.shape[3]), dtype=np.uint8)
    for place in range(per_byte):
        packed |= parts[:, :, place] << np.uint8(bits * place)
    return packed.reshape(len(codes), -1)


def _unstack(data: Bytes, run: int, bits: int) -> Bytes:
    """The inverse of `_stack`."""
    per_byte = 8 // bits
    parts = data.reshape(len(data), -1, 1, run // per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8).reshape(1, 1, -1, 1) * np.uint8(bits)
    found: Bytes = (parts >> shifts) & np.uint8((1 << bits) - 1)
    return found.reshape(len(data), -1)


def _bits(flags: Bytes) -> Bytes:
    found: Bytes = np.packbits(flags, axis=1, bitorder="little")
    return found


def _unbits(data: Bytes) -> Bytes:
    return np.unpackbits(data, axis=1, bitorder="little")


def _encode_simple(codes: Bytes, blocks: Blocks, numbers: _Numbers, _integers: _Integers) -> list[Bytes]:
    layout = blocks.grid.layout
    head = [numbers(blocks.step)] + ([numbers(blocks.low)] if layout.minimum else [])
    if layout.bits == 8:
        return [*head, codes]
    high = [_bits(codes >> 4)] if layout.bits == 5 else []
    return [*head, *high, _stack(codes & 0x0F, 32, 4)]


def _decode_simple(layout: Layout) -> _Decoder:
    def decoder(rows: Bytes) -> _Decoded:
        step, low = _number(rows, 0), _number(rows, 2) if layout.minimum else None
        at = 4 if layout.minimum else 2
        if layout.bits == 8:
            return rows[:, at:], step, low, None, None
        codes = _unstack(rows[:, -16:], 32, 4)
        if layout.bits == 5:
            codes = codes | (_unbits(rows[:, at:at + 4]) << 4)
        return codes, step, low, None, None
    return decoder


def _encode_scales_of_6_bits(scales: npt.NDArray[np.int16], lows: npt.NDArray[np.int16]) -> Bytes:
    """Eight steps and eight minima of 6 bits in 12 bytes (get_scale_min_k4)."""
    s, m = scales.astype(np.uint8), lows.astype(np.uint8)
    return np.concatenate([s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6),
                           (s[:, 4:] & 0x0F) | (m[:, 4:] << 4)], axis=1)


def _decode_scales_of_6_bits(data: Bytes) -> tuple[Bytes, Bytes]:
    s, m, both = data[:, :4], data[:, 4:8], data[:, 8:]
    return (np.concatenate([s & 63, (both & 0x0F) | (s >> 6 << 4)], axis=1),
            np.concatenate([m & 63, (both >> 4) | (m >> 6 << 4)], axis=1))


def _encode_q4_k(codes: Bytes, blocks: Blocks, numbers: _Numbers, integers: _Integers) -> list[Bytes]:
    head = [numbers(blocks.step), numbers(blocks.low),
            _encode_scales_of_6_bits(integers(blocks.scales), integers(blocks.lows))]
    high = [_stack(codes >> 4, 256, 1)] if blocks.grid.layout.bits == 5 else []
    return [*head, *high, _stack(codes & 0x0F, 64, 4)]


def _decode_q4_k(layout: Layout) -> _Decoder:
    def decoder(rows: Bytes) -> _Decoded:
        scales, lows = _decode_scales_of_6_bits(rows[:, 4:16])
        codes = _unstack(rows[:, -128:], 64, 4)
        if layout.bits == 5:
            codes = codes | (_unstack(rows[:, 16:48], 256, 1) << 4)
        return codes, _number(rows, 0), _number(rows, 2), scales, lows
    return decoder


def _encode_q2_k(codes: Bytes, blocks: Blocks, numbers: _Numbers, integers: _Integers) -> list[Bytes]:
    scales, lows = integers(blocks.scales).astype(np.uint8), integers(blocks.lows).astype(np.uint8)
    return [scales | (lows << 4), _stack(codes, 128, 2), numbers(blocks.step), numbers(blocks.low)]


def _decode_q2_k(rows: Bytes) -> _Decoded:
    return _unstack(rows[:, 16:80], 128, 2), _number(rows, 80), _number(rows, 82), rows[:, :16] & 0x0F, rows[:, :16] >> 4


def _encode_q3_k(codes: Bytes, blocks: Blocks, numbers: _Numbers, integers: _Integers) -> list[Bytes]:
    scales = (integers(blocks.scales) + 32).astype(np.uint8)
    low = (scales[:, :8] & 0x0F) | (scales[:, 8:] << 4)
    return [_stack(codes >> 2, 256, 1), _stack(codes & 3, 128, 2), low, _stack(scales >> 4, 16, 2), numbers(blocks.step)]


def _decode_q3_k(rows: Bytes) -> _Decoded:
    low = np.concatenate([rows[:, 96:104] & 0x0F, rows[:, 96:104] >> 4], axis=1)
    scales = (low | (_unstack(rows[:, 104:108], 16, 2) << 4)).astype(np.int16) - 32
    return _unstack(rows[:, 32:96], 128, 2) | (_unstack(rows[:, :32], 256, 1) << 2), _number(rows, 108), None, scales, None


def _encode_q6_k(codes: Bytes, blocks: Blocks, numbers: _Numbers, integers: _Integers) -> list[Bytes]:
    scales = integers(blocks.scales).astype(np.int8).view(np.uint8)
    return [_stack(codes & 0x0F, 128, 4), _stack(codes >> 4, 128, 2), scales, numbers(blocks.step)]


def _decode_q6_k(rows: Bytes) -> _Decoded:
    codes = _unstack(rows[:, :128], 128, 4) | (_unstack(rows[:, 128:192], 128, 2) << 4)
    return codes, _number(rows, 208), None, np.ascontiguousarray(rows[:, 192:208]).view(np.int8).astype(np.int16), None


def _encode_iq4_xs(codes: Bytes, blocks: Blocks, numbers: _Numbers, integers: _Integers) -> list[Bytes]:
    scales = (integers(blocks.scales) + 32).astype(np.uint8)
    return [numbers(blocks.step), _stack(scales >> 4, 4, 2), _stack(scales & 0x0F, 2, 4), _stack(codes, 32, 4)]


def _decode_iq4_xs(rows: Bytes) -> _Decoded:
    scales = (_unstack(rows[:, 4:8], 2, 4) | (_unstack(rows[:, 2:4], 4, 2) << 4)).astype(np.int16) - 32
    return _unstack(rows[:, 8:], 32, 4), _number(rows, 0), None, scales, None


def _encode_tq2_0(codes: Bytes, blocks: Blocks, numbers: _Numbers, _integers: _Integers) -> list[Bytes]:
    return [_stack(codes, 128, 2), numbers(blocks.step)]


def _decode_tq2_0(rows: Bytes) -> _Decoded:
    return _unstack(rows[:, :64], 128, 2), _number(rows, 64), None, None, None


_ENCODERS: dict[str, _Encoder] = {
    **dict.fromkeys(_SIMPLE, _encode_simple),
    "q2_k": _encode_q2_k, "q3_k": _encode_q3_k, "q4_k": _encode_q4_k, "q5_k": _encode_q4_k, "q6_k": _encode_q6_k,
    "iq4_xs": _encode_iq4_xs, "tq2_0": _encode_tq2_0}
_DECODERS: dict[str, _Decoder] = {
    **{name: _decode_simple(LAYOUTS[name]) for name in _SIMPLE},
    "q2_k": _decode_q2_k, "q3_k": _decode_q3_k, "q4_k": _decode_q4_k(LAYOUTS["q4_k"]),
    "q5_k": _decode_q4_k(LAYOUTS["q5_k"]), "q6_k": _decode_q6_k, "iq4_xs": _decode_iq4_xs, "tq2_0": _decode_tq2_0}
