"""ggml's grids, bit for bit against ggml itself and against gguf's codecs; rounding onto them against a naive search."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from tests import llama
from tsotsallm.numerics import rounding
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid, decode, encode
from tsotsallm.numerics.gptq import reversed_factor
from tsotsallm.numerics.rounding import block_order, round_plainly, round_to_blocks


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_byte_means_what_ggml_says(name: str) -> None:
    grid, rng = GgmlGrid(name), np.random.default_rng(5)
    blocks = rng.integers(0, 256, (300, grid.stored_bytes(1, 256)), dtype=np.uint8)
    ours = decode(blocks, grid)
    values = ours.dequantise().numpy()
    theirs = llama.dequantise(name, blocks, 256)
    same = (values == theirs) | (np.isnan(values) & np.isnan(theirs))
    assert same.all()
    published = gguf.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])
    assert ((values == published) | (np.isnan(values) & np.isnan(published))).all()
    finite = np.isfinite(values).all(1)         # every other NaN becomes the one that arithmetic gives
    assert finite.any()
    assert (encode(ours)[finite] == blocks[finite]).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_ggml_quantised_is_read_and_written_back(name: str) -> None:
    weight = np.random.default_rng(1).standard_normal((12, 512)).astype(np.float32)
    blocks = llama.quantise(name, weight, np.ones(512, dtype=np.float32))
    found = decode(torch.from_numpy(blocks), GgmlGrid(name))
    assert (encode(found) == blocks).all()
    assert int(found.codes.min()) >= GgmlGrid(name).lowest
    assert int(found.codes.max()) <= GgmlGrid(name).highest


def problem(d_out: int = 40, d_in: int = 512) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(1500, d_in, generator=generator)
    inputs = inputs + 0.5 * inputs @ torch.randn(d_in, d_in, generator=generator) / d_in ** 0.5
    inputs *= torch.rand(d_in, generator=generator) + 0.2
    return torch.randn(d_out, d_in, generator=generator) * 0.1, inputs.mT @ inputs


def damped(gram: Tensor) -> Tensor:
    return gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))


@pytest.mark.parametrize("name", LAYOUTS)
def test_rounding_beats_ggml_and_every_visit_helps(name: str) -> None:
    weight, gram = problem()
    grid = GgmlGrid(name)
    order = block_order(gram.diagonal(), grid)
    factor = reversed_factor(gram, order, 0.01)

    def error(values: Tensor) -> float:
        difference = (weight - values).double()
        return float((difference @ damped(gram).double() * difference).sum())

    theirs = llama.dequantise(name, llama.quantise(name, weight.numpy(), (gram.diagonal() / 1500).numpy()), 512)
    found = [error(round_to_blocks(weight, factor, order, grid, passes=passes).dequantise()) for passes in range(4)]
    assert found[0] < 0.75 * error(torch.from_numpy(theirs))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(found))
    assert found[1] < 0.98 * found[0]
    assert error(round_plainly(weight, grid).dequantise()) < 1.25 * error(torch.from_numpy(theirs))


@pytest.mark.parametrize("name", LAYOUTS)
def test_rounding_to_nearest_is_rounding_in_the_metric_of_independent_inputs(name: str) -> None:
    weight, grid = problem()[0], GgmlGrid(name)
    columns = torch.arange(weight.shape[1])
    in_whole = round_to_blocks(weight, torch.eye(len(columns)), columns, grid, passes=0)
    torch.testing.assert_close(round_plainly(weight, grid).dequantise(), in_whole.dequantise(), rtol=0, atol=1e-6)


def coupled(d_out: int) -> Tensor:
    """A metric of outputs that move together in a few directions."""
    directions = torch.randn(d_out, 4, generator=torch.Generator().manual_seed(7))
    metric = directions @ directions.mT + 0.5 * torch.eye(d_out)
    return metric / metric.diagonal().mean()


def test_rows_make_up_for_each_other_as_in_a_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row: what is left to come is free, so that a row aims at the minimum over itself and all after it."""
    monkeypatch.setattr(rounding, "GROUPS", 1000)
    weight, gram = problem(d_out=10)
    grid, metric = GgmlGrid("q4_0"), coupled(10)
    order = block_order(gram.diagonal(), grid)
    factor = reversed_factor(gram, order, 0.01)
    visit = metric.diagonal().sort(descending=True, stable=True).indices.tolist()
    errors = torch.zeros_like(weight)
    for place, row in enumerate(visit):
        settled, free = visit[:place], visit[place:]
        best = -torch.linalg.solve(metric[free][:, free], metric[free][:, settled] @ errors[settled])   # of E[free]
        aim = weight[row] - best[0]
        errors[row] = weight[row] - round_to_blocks(aim[None], factor, order, grid, passes=0).dequantise()[0]
    found = round_to_blocks(weight, factor, order, grid, passes=0, outputs=metric).dequantise()
    assert float(((weight - errors - found).abs() < 1e-4).float().mean()) > 0.99


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q3_k", "q2_k", "iq4_nl", "iq4_xs"])
def test_coupled_rows_leave_less_error_and_every_visit_helps(name: str) -> None:
    weight, gram = problem()
    grid, metric = GgmlGrid(name), coupled(40)
    order = block_order(gram.diagonal(), grid)
    factor = reversed_factor(gram, order, 0.01)

    def error(passes: int, outputs: Tensor | None) -> float:
        values = round_to_blocks(weight, factor, order, grid, passes=passes, outputs=outputs).dequantise()
        difference = (weight - values).double()
        return float(((metric.double() @ difference @ damped(gram).double()) * difference).sum())

    assert error(0, metric) < 0.85 * error(0, None)
    found = [error(passes, metric) for passes in range(3)]
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(found))
    assert found[2] < 0.85 * error(2, None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_rounded_is_what_is_written(name: str) -> None:
    weight, gram = problem(d_out=9)
    grid = GgmlGrid(name)
    order = block_order(gram.diagonal(), grid)
    found = round_to_blocks(weight, reversed_factor(gram, order, 0.01), order, grid, passes=1)
    assert torch.equal(decode(encode(found), grid).dequantise(), found.dequantise())
    assert torch.equal(torch.from_numpy(llama.dequantise(name, encode(found), 512)), found.dequantise())


@pytest.mark.parametrize("name", [name for name in LAYOUTS if GgmlGrid(name).holds_zeros])
def test_pruned_weights_stay_zero_where_the_grid_has_a_zero(name: str) -> None:
    weight, gram = problem(d_out=8)
    grid = GgmlGrid(name)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    order = block_order(gram.diagonal(), grid)
    found = round_to_blocks(weight, reversed_factor(gram, order, 0.01), order, grid, passes=2, keep=keep)
    values = torch.from_numpy(llama.dequantise(name, encode(found), 512))
    assert bool((values[~keep] == 0).all())
    assert bool((values[keep] != 0).any())


def test_the_order_keeps_blocks_and_parts_together() -> None:
    grid = GgmlGrid("q4_k")
    order = block_order(torch.rand(1024, generator=torch.Generator().manual_seed(2)), grid)
    assert torch.equal(order.sort().values, torch.arange(1024))
    for size in (grid.layout.block, grid.layout.part):
        stretches = order.view(-1, size) // size
        assert bool((stretches == stretches[:, :1]).all())


def test_a_part_of_one_row_is_rounded_as_well_as_a_naive_search_does() -> None:
    """Q8_0 on two live columns: every 16-bit step near the best is tried with all roundings."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1] = 0.37, -0.11
    found = round_plainly(weight, GgmlGrid("q4_0")).dequantise()
    best = min(float(((weight - (weight / step).round().clamp(-8, 7) * step) ** 2).sum())
               for step in torch.linspace(-0.08, 0.08, 4001).half().float() if step != 0)
    assert float(((weight - found) ** 2).sum()) <= best + 2e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_values_get_the_nearest_code(name: str) -> None:
    grid = GgmlGrid(name)
    codes = torch.tensor(grid.layout.levels or list(range(grid.lowest, grid.highest + 1)), dtype=torch.float64)
    values = torch.cat([torch.linspace(-300, 300, 48001), torch.randn(5000) * 60, torch.randn(500) * 1e-30, torch.tensor(
        [-3e38, 3e38, -torch.inf, torch.inf])])
    found = grid.nearest(values.clone())
    distances = (values.double().clamp(-1e6, 1e6)[:, None] - codes).abs()
    assert torch.equal((values.double().clamp(-1e6, 1e6) - found).abs(), distances.amin(1))
    assert bool(torch.isin(found.double(), codes).all())
    if grid.layout.levels is not None:
        ties = (codes[1:] + codes[:-1]) / 2
        assert torch.equal(grid.nearest(ties.float()), codes[1:].float())
        assert float(grid.nearest(torch.tensor([torch.nan]))) in codes      # what it is does not matter
    in_place = values.clone()
    assert grid.nearest(in_place).data_ptr() == in_place.data_ptr()
    assert torch.equal(in_place, found)


@pytest.mark.parametrize("tails", [torch.inf, 3.0])
def test_scales_of_uneven_levels_are_nearly_as_good_as_those_of_a_naive_search(tails: float) -> None:
    """Every 16-bit step that covers the range of a part more or less, of either sign; ggml searches some of one sign."""
    torch.manual_seed(0)
    weight = torch.randn(200, 32) if tails == torch.inf else torch.distributions.StudentT(tails).sample((200, 32))
    shares = torch.linspace(1 / 160, 1 / 60, 800)
    best = torch.full((len(weight),), torch.inf)
    for share in torch.cat([shares, -shares]):
        step = (weight.abs().amax(1) * share).half().float()[:, None]
        best = torch.minimum(best, (weight - GgmlGrid("iq4_nl").nearest(weight / step) * step).square().sum(1))

    def error(values: Tensor) -> float:
        return float((weight - values.view(weight.shape)).square().sum())

    ones = np.ones(256, dtype=np.float32)
    for name, columns, most in (("iq4_nl", 32, 1.005), ("iq4_xs", 256, 1.04)):
        rows = weight.view(-1, columns)
        ours = error(round_plainly(rows, GgmlGrid(name)).dequantise())
        theirs = llama.dequantise(name, llama.quantise(name, rows.numpy(), ones[:columns]), columns)
        assert ours < most * float(best.sum())
        assert ours < 0.985 * error(torch.from_numpy(theirs))
    assert error(round_plainly(weight, GgmlGrid("q4_0")).dequantise()) > 1.15 * float(best.sum())


@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs"])
def test_uneven_levels_have_no_zero(name: str) -> None:
    assert not GgmlGrid(name).holds_zeros
    values = round_plainly(torch.cat([torch.zeros(1, 256), torch.randn(1, 256)]), GgmlGrid(name)).dequantise()
    assert bool((values[0] == 0).all())                         # a step of zero
    assert bool((values[1] != 0).all())


def test_the_next_grid_is_taken_where_blocks_do_not_divide() -> None:
    assert GgmlGrid("q4_k").fitting(512) == GgmlGrid("q4_k")
    assert GgmlGrid("q4_k").fitting(96) == GgmlGrid("q5_0")
    for name in ("q2_k", "q3_k", "iq4_xs"):
        assert GgmlGrid(name).fitting(96) == GgmlGrid("iq4_nl")
    assert GgmlGrid("q3_k").fitting(96, zeros=True) == GgmlGrid("q4_0")
    for name in LAYOUTS:
        for d_in in (96, 256):
            fits = GgmlGrid(name).fitting(d_in, zeros=True)
            assert fits is not None
            assert fits.holds_zeros or not GgmlGrid(name).holds_zeros
            assert fits.stored_bytes(4, d_in) == GgmlGrid(name).fitting(d_in).stored_bytes(4, d_in)     # type: ignore[union-attr]
    assert GgmlGrid("q6_k").fitting(172) is None
