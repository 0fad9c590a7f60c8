"""Packed codes against the reader of compressed-tensors, and what config.json says of them; expressions of strangers."""

from __future__ import annotations

import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsotsallm.checkpoint import packing
from tsotsallm.numerics.grids import GRIDS, Grid, IntegerGrid, NormalFloatGrid, grid_from
from tsotsallm.numerics.rounding import round_plainly

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


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_row_is_one_stream_of_bits(bits: int) -> None:
    """By the definition: code c of column j, shifted to be unsigned, is bits [j·bits, (j+1)·bits) of the row."""
    columns = 37
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, columns), dtype=torch.int8)
    codes[0], codes[1] = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    packed = packing.pack_rows(codes, bits)
    assert packed.dtype == torch.int32
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        stream = sum((code + (1 << (bits - 1))) << (place * bits) for place, code in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words)) == stream
        assert len(words) == (columns * bits + 31) // 32


def test_many_rows_are_packed_as_each_alone() -> None:
    codes = torch.randint(-4, 4, (packing.ROWS_AT_ONCE + 3, 33), dtype=torch.int8)
    packed = packing.pack_rows(codes, 3)
    for row in (0, packing.ROWS_AT_ONCE - 1, packing.ROWS_AT_ONCE, packing.ROWS_AT_ONCE + 2):
        assert torch.equal(packed[row:row + 1], packing.pack_rows(codes[row:row + 1], 3))
    assert torch.equal(packing.unpack_rows(packed, 3, 33), codes)


def test_codes_of_columns_in_any_order_of_memory() -> None:
    codes = torch.randint(-8, 8, (64, 40), dtype=torch.int8)
    assert torch.equal(packing.pack_rows(codes.mT, 4), packing.pack_rows(codes.mT.contiguous(), 4))


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_is_found_again_by_what_config_json_says(name: str) -> None:
    grids: list[Grid] = [grid_from({"type": name})] if name not in ("int", "nf4") else []
    if name == "nf4":
        grids = [NormalFloatGrid(group=group) for group in (64, 32)]
    if name == "int":
        grids = [IntegerGrid(*settings) for settings in itertools.product((2, 5, 8), (None, 32), (True, False))]
    for grid in grids:
        scheme = json.loads(json.dumps(packing.scheme_of(grid)))
        assert packing.grid_of_scheme(scheme) == grid
        if isinstance(grid, IntegerGrid):
            rounded: Any = grid.round(torch.randn(48, 64), torch.float16)
        else:
            rounded = round_plainly(torch.randn(48, 256), grid)
        packed = packing.Packed(packing.pack(rounded), grid)
        assert set(packed.tensors) <= set(packing.SUFFIXES)
        assert torch.equal(packed.unpack().dequantise(), rounded.dequantise())


def test_the_section_of_config_json_is_one_that_compressed_tensors_takes() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    four, two = IntegerGrid(4, 32), IntegerGrid(2, None, symmetric=False)
    names = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("mlp.up_proj", "mlp.down_proj")]
    for grids in (dict.fromkeys(names, four), {names[0]: four, names[1]: two, names[2]: None, names[3]: four},
                  {**dict.fromkeys(names, four), "lm_head": None}):
        section = packing.quantization_config(dict(grids))
        told = {name: value for name, value in section.items() if name != "dequantize"}
        parsed = QuantizationConfig.model_validate(told)
        assert ("dequantize" in section) == (two in grids.values())
        by_name: dict[str, Any] = {}
        for group in parsed.config_groups.values():
            for target in group.targets:
                for name in names if target == "Linear" else [target]:
                    by_name[name] = group.weights
        for name, grid in grids.items():
            if grid is None:
                assert name in parsed.ignore
            else:
                assert (by_name[name].num_bits, by_name[name].symmetric, by_name[name].group_size) == (
                    grid.bits, grid.symmetric, grid.group)
        assert "lm_head" in parsed.ignore


@pytest.mark.parametrize(("target", "readable"), [
    ("Linear", True), ("", True), ("re:.*mlp.*", True), (r"re:model\.layers\.\d+\.mlp\..*_proj", True), ("re:[", False),
    ("re:(", False), ("re:(a+)+$", False), ("re:(a*)*b", False), ("re:(a|a)*b" * 3, False), ("re:" + "a?" * 30, False),
    ("re:" + ".*" * 5, False), ("re:(?i)x", True), ("re:" + "(" * 5000, False), ("re:a{99999999999}", False), (None, False),
    (7, False), (["Linear"], False)], ids=lambda value: str(value)[:20])
def test_expressions_that_might_never_end_are_not_read(target: object, readable: bool) -> None:
    assert packing.is_target(target) == readable
    if readable and str(target).startswith("re:"):
        began = time.monotonic()
        re.match(str(target)[3:], "model.layers." + "a" * 500)
        assert time.monotonic() - began < 30        # a hang, not a measurement


@pytest.mark.parametrize("d_out", [1, 4, 8, 9])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_of_a_few_rows_are_read_back(tmp_path: Path, bits: int, d_out: int) -> None:
    """Those of all rows fit into one word."""
    rounded = IntegerGrid(bits, 16, symmetric=False).round(torch.randn(d_out, 64), torch.bfloat16)
    save_file(packing.pack(rounded), tmp_path / "a.safetensors")
    again = packing.unpack(load_file(tmp_path / "a.safetensors"), rounded.grid)
    assert torch.equal(again.dequantise(), rounded.dequantise())
