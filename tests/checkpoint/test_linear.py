"""A linear while it is edited: what it says of itself is what a reader computes from the tensors that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.packing import unpack
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.numerics.grids import Grid, IntegerGrid, NormalFloatGrid, grid_from
from tsotsallm.numerics.rounding import round_plainly

NAME = "mlp.up_proj"


def linear(d_out: int = 20, d_in: int = 64, storage: torch.dtype = torch.bfloat16, seed: int = 0) -> Linear:
    return Linear(NAME, torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(seed)), storage)


def read_back(one: Linear, path: Path, grid: Grid | None = None) -> torch.Tensor:
    """The weight from the written file alone, by the definition of each form."""
    save_file(one.tensors(), path)
    tensors = {name.removeprefix(f"{NAME}."): tensor for name, tensor in load_file(path).items()}
    base = tensors["weight"].float() if grid is None else unpack(tensors, grid).dequantise()
    if "lora_B.weight" in tensors:
        base = base + tensors["lora_B.weight"].float() @ tensors["lora_A.weight"].float()
    if "lora_B.codes" in tensors:
        left, right = ((tensors[f"{half}.codes"].float() * tensors[f"{half}.scales"].float()).to(
            tensors[f"{half}.scales"].dtype).float() for half in ("lora_B", "lora_A"))
        base = base + left.mT @ right
    return base


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_an_untouched_linear_is_written_in_its_storage(tmp_path: Path, storage: torch.dtype) -> None:
    one = linear(storage=storage)
    assert (one.d_out, one.d_in, one.edited) == (20, 64, False)
    assert {name: tensor.dtype for name, tensor in one.tensors().items()} == {f"{NAME}.weight": storage}
    assert torch.equal(one.effective(), read_back(one, tmp_path / "a.safetensors"))
    assert torch.equal(one.effective(), one.reference.to(storage).float())


def test_pruning_again_keeps_what_was_pruned_before() -> None:
    one = linear()
    first, second = torch.rand(20, 64) > 0.3, torch.rand(20, 64) > 0.3
    one.prune(first)
    one.prune(second, one.reference.clone())        # compensated values stand in place of what was zero
    assert one.mask is not None
    assert torch.equal(one.mask, first & second)
    for row in range(20):
        for column in range(64):
            kept = bool(first[row, column]) and bool(second[row, column])
            assert float(one.dense[row, column]) == (float(one.reference[row, column]) if kept else 0.0)
    assert one.edited


def test_compensated_values_replace_the_dense_ones_where_they_are_kept() -> None:
    one, keep, values = linear(), torch.rand(20, 64) > 0.5, torch.randn(20, 64)
    one.prune(keep, values)
    assert torch.equal(one.dense, torch.where(keep, values, 0.0))
    assert torch.equal(one.reference, linear().reference)           # what corrections aim at stays


@pytest.mark.parametrize("grid", [
    IntegerGrid(4, 32), IntegerGrid(3, None), IntegerGrid(2, 16, symmetric=False), IntegerGrid(8, 64), NormalFloatGrid(),
    grid_from({"type": "q4_0"}), grid_from({"type": "q8_0"}), grid_from({"type": "q5_1"}),
    grid_from({"type": "iq4_nl"})], ids=str)
@pytest.mark.parametrize("bits", [None, 16, 8])
def test_what_it_says_is_what_a_reader_of_the_file_computes(tmp_path: Path, grid: Any, bits: int | None) -> None:
    one = linear()
    one.quantise(round_plainly(one.dense, grid) if isinstance(grid, GgmlGrid) else grid.round(one.dense, one.storage))
    if bits is not None:
        one.compensate(torch.randn(20, 3) * 0.1, torch.randn(3, 64) * 0.1, bits)
    assert f"{NAME}.weight" not in one.tensors()
    torch.testing.assert_close(one.effective(), read_back(one, tmp_path / "a.safetensors", grid), rtol=0, atol=1e-6)


def test_pruned_weights_stay_zero_in_codes(tmp_path: Path) -> None:
    one, grid = linear(), IntegerGrid(3, 32)
    keep = torch.rand(20, 64) > 0.5
    one.prune(keep)
    one.quantise(grid.round(one.dense, one.storage, one.mask))
    assert bool((read_back(one, tmp_path / "a.safetensors", grid)[~keep] == 0).all())


def test_pruning_takes_codes_away_and_quantising_dense_values() -> None:
    one, grid = linear(), IntegerGrid(4, 32)
    one.quantise(grid.round(one.dense, one.storage))
    one.prune(torch.ones(20, 64, dtype=torch.bool))
    assert one.stored is None
    assert torch.equal(one.effective(), one.reference.bfloat16().float())
    one.prune(torch.zeros(20, 64, dtype=torch.bool))
    one.quantise(grid.round(one.reference, one.storage))
    assert one.values is None
    assert float(one.effective().abs().max()) > 0


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_a_correction_in_8_bits_is_within_half_a_step_of_its_factors(storage: torch.dtype) -> None:
    one, left, right = linear(storage=storage), torch.randn(20, 3), torch.randn(3, 64)
    one.compensate(left, right, 8)
    assert one.low_rank is not None
    for found, wanted in ((one.low_rank.left.mT, left.mT), (one.low_rank.right, right)):
        for row, expected in zip(found.float(), wanted, strict=True):
            step = 2 * float(expected.abs().max()) / 255
            # half a step, and the rounding of value and scale to 8 or 11 bits of mantissa
            assert float((row - expected).abs().max()) <= 0.51 * step + float(expected.abs().max()) * 2 ** -7
