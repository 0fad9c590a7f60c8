"""The compiled loops of rounding against those of torch, which are their oracle.

Where two scales are equally good to the last bit, torch may take either; -step with codes of the other sign is the same
weight. Values are compared therefore, with ties broken by the lower candidate in both. One scale that differs in its last
bit is enough to change much of a row and, where rows are coupled, of all later rows.
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from tests.numerics.test_ggml import coupled, damped, problem
from tsotsallm import machine
from tsotsallm.errors import NumericsError
from tsotsallm.numerics import rounding
from tsotsallm.numerics.ggml import LAYOUTS, Blocks, GgmlGrid
from tsotsallm.numerics.gptq import reversed_factor
from tsotsallm.numerics.rounding import block_order, round_plainly, round_to_blocks

needs_numba = pytest.mark.skipif(machine.compiler() is None, reason="numba is not installed (extra [fast]), or "
                                 "TSOTSALLM_COMPILED is 0")


def both(monkeypatch: pytest.MonkeyPatch, weight: Tensor, gram: Tensor, grid: GgmlGrid, **options: object
         ) -> tuple[Blocks, Blocks]:
    """Rounded by torch and by compiled loops."""
    order = block_order(gram.diagonal(), grid)
    factor = reversed_factor(gram, order, 0.01)
    monkeypatch.setattr(rounding, "_lowest", lambda loss: loss.sort(dim=0, stable=True).indices[:rounding.TRIED])
    with monkeypatch.context() as off:
        off.setenv(machine.COMPILED, "0")
        slow = round_to_blocks(weight, factor, order, grid, **options)      # type: ignore[arg-type]
    return slow, round_to_blocks(weight, factor, order, grid, **options)      # type: ignore[arg-type]


def error(values: Tensor, weight: Tensor, gram: Tensor, metric: Tensor | None) -> float:
    difference = (weight - values).double()
    pulled = difference if metric is None else metric.double() @ difference
    return float(((pulled @ damped(gram).double()) * difference).sum())


@needs_numba
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_apart_get_what_torch_gives_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale on the edge between two 16-bit numbers changes its row at most: 2.5% of the weight. Which scales lie there
    depends on how a processor sums."""
    weight, gram = problem(d_out=40)
    for passes in (0, 1, 2):
        slow, fast = both(monkeypatch, weight, gram, GgmlGrid(name), passes=passes)
        same = (slow.dequantise() - fast.dequantise()).abs() <= 1e-6
        assert float(same.float().mean()) >= 0.97
        assert float(same.all(1).float().mean()) >= 0.95
        assert error(fast.dequantise(), weight, gram, None) == pytest.approx(error(slow.dequantise(), weight, gram, None),
                                                                           rel=1e-3)


@needs_numba
@pytest.mark.parametrize("name", LAYOUTS)
def test_coupled_rows_get_what_torch_gives_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a scale is on an edge all rows are equal; afterwards they are as good."""
    weight, gram = problem(d_out=80, d_in=256)
    metric, ratios, equal = coupled(20), [], 0
    for rows in weight.split(20):
        slow, fast = both(monkeypatch, rows, gram, GgmlGrid(name), passes=2, outputs=metric)
        equal += bool(((slow.dequantise() - fast.dequantise()).abs() <= 1e-6).float().mean() >= 0.999)
        ratios.append(error(fast.dequantise(), rows, gram, metric) / error(slow.dequantise(), rows, gram, metric))
    assert equal >= 2
    assert sum(ratios) / 4 == pytest.approx(1, abs=0.03)


@needs_numba
@pytest.mark.parametrize(("name", "rows", "columns"), [
    ("q4_0", 1, 32), ("q4_0", 15, 96), ("q5_1", 33, 288), ("q8_0", 17, 544), ("q4_k", 1, 256), ("q3_k", 19, 768),
    ("iq4_nl", 15, 96), ("iq4_xs", 18, 512)])
def test_rows_need_not_fill_a_vector_nor_columns_a_span(name: str, rows: int, columns: int,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(rows, columns)
    for metric in (None, coupled(rows)):
        slow, fast = both(monkeypatch, weight, gram, GgmlGrid(name), passes=2, outputs=metric)
        assert error(fast.dequantise(), weight, gram, metric) == pytest.approx(
            error(slow.dequantise(), weight, gram, metric), rel=1e-2)


@needs_numba
@pytest.mark.parametrize("name", [name for name in LAYOUTS if GgmlGrid(name).holds_zeros])
def test_pruned_weights_stay_zero(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(d_out=21)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    for metric in (None, coupled(21)):
        slow, fast = both(monkeypatch, weight, gram, GgmlGrid(name), passes=2, outputs=metric, keep=keep)
        assert bool((fast.dequantise()[~keep] == 0).all())
        assert error(fast.dequantise(), weight, gram, metric) == pytest.approx(
            error(slow.dequantise(), weight, gram, metric), rel=2e-3)


@needs_numba
@pytest.mark.parametrize("name", ["q4_0", "q4_k", "iq4_xs"])
def test_the_same_bytes_every_time_on_one_thread_and_on_two(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "OUTPUTS", 48)         # several groups of rows that two threads share
    weight, gram = problem(d_out=110, d_in=256)
    grid = GgmlGrid(name)
    order = block_order(gram.diagonal(), grid)
    factor = reversed_factor(gram, order, 0.01)
    metric = torch.cat([torch.nn.functional.pad(coupled(rows), (0, 48 - rows)) for rows in (48, 48, 14)])
    for outputs in (None, metric):
        found = []
        for threads in (1, 2, 2):
            with machine.on_threads(threads):
                found.append(round_to_blocks(weight, factor, order, grid, passes=2, outputs=outputs))
        for other in found[1:]:
            assert torch.equal(other.codes, found[0].codes)
            assert torch.equal(other.step, found[0].step)


@needs_numba
def test_values_round_to_half_precision_as_the_processor_rounds_them() -> None:
    import numba
    import numpy as np

    from tsotsallm.numerics import vectors

    @numba.njit
    def halves(values, found):                                                          # type: ignore[no-untyped-def]
        for row in range(len(values)):
            vectors.store(found, row, 0, vectors.LANES, vectors.half(vectors.load(values, row, 0, vectors.LANES)))

    bits = np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
            + np.uint32(1 << 12))
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values)]
    values = np.ascontiguousarray(values[:len(values) // 16 * 16].reshape(-1, 16))
    found = np.empty_like(values)
    halves(values, found)
    with np.errstate(over="ignore"):
        assert (found == values.astype(np.float16).astype(np.float32)).all()


@needs_numba
def test_values_get_the_same_level_as_in_torch() -> None:
    import numba
    import numpy as np

    from tsotsallm.numerics import compiled, vectors

    level = compiled._level

    @numba.njit
    def levels(values, found):                                                          # type: ignore[no-untyped-def]
        for row in range(len(values)):
            vectors.store(found, row, 0, vectors.LANES, level(vectors.load(values, row, 0, vectors.LANES)))

    values = np.concatenate([np.arange(-1200, 1200) / 8, np.random.default_rng(1).normal(size=1600) * 50,
                             [np.inf, -np.inf] * 8]).astype(np.float32).reshape(-1, vectors.LANES)
    found = np.empty_like(values)
    levels(values, found)
    assert torch.equal(torch.from_numpy(found), GgmlGrid("iq4_nl").nearest(torch.from_numpy(values.copy())))


def test_what_compiles_is_recorded_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_numba_version", lambda: "0.68.1")
    monkeypatch.delenv(machine.COMPILED, raising=False)
    assert machine.fingerprint()["numba"] == "0.68.1"
    monkeypatch.setenv(machine.COMPILED, "0")
    assert "numba" not in machine.fingerprint()
    monkeypatch.delenv(machine.COMPILED)
    monkeypatch.setattr(machine, "_numba_version", lambda: None)
    assert "numba" not in machine.fingerprint()


def test_numba_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(machine.COMPILED, raising=False)
    monkeypatch.setattr(machine, "_numba_version", lambda: "0.68.1")
    for name in ("numba", "tsotsallm.numerics.compiled_rounding", "tsotsallm.numerics.compiled"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(NumericsError, match=r"numba 0\.68\.1 .* cannot be loaded .* TSOTSALLM_COMPILED=0"):
        round_plainly(torch.randn(4, 32), GgmlGrid("q4_0"))
