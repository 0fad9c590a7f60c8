"""Packed codes against the reader of compressed-tensors."""

from __future__ import annotations

import pytest
import torch

from tsotsallm.checkpoint import packing
from tsotsallm.numerics.grids import IntegerGrid

helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")


@pytest.mark.parametrize("columns", [32, 172, 33])
@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_that_of_compressed_tensors(bits: int, columns: int) -> None:
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (7, columns), dtype=torch.int8)
    packed = packing.pack_rows(codes, bits)
    assert torch.equal(packed, helpers.pack_to_int32(codes, bits))
    assert torch.equal(packing.unpack_rows(packed, bits, columns), codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_a_packed_linear_reads_back_exactly(group: int | None, symmetric: bool) -> None:
    rounded = IntegerGrid(3, group, symmetric).round(torch.randn(24, 64), torch.bfloat16)
    again = packing.unpack(packing.pack(rounded), rounded.grid)
    assert torch.equal(again.dequantise(), rounded.dequantise())
