"""Linears that are edited by several threads at once: the same result, and errors that come through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tsotsallm
from tests.compressing import SMALL, same_bytes
from tsotsallm import machine
from tsotsallm.errors import NumericsError
from tsotsallm.numerics import rounding
from tsotsallm.run import editing
from tsotsallm.stages.allocation import Probe
from tsotsallm.stages.quantize.gguf import BlockQuantize

THREADS = 3
OBSERVED_AGAIN = "[{quantize: {grid: q4_0, sequential: true, follow: 0, weigh: false}}]"
WITH_ZEROS = "[{sparsity: {prune: 2, group: 4}}, {quantize: {grid: q4_0, lose_zeros: true}}]"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three threads, and edits that run on them at once whether or not a compiler is installed; lists who rounded what."""
    for edit in (BlockQuantize, Probe):
        monkeypatch.setattr(edit, "leaves_python", True)
    seen: list[str] = []
    plainly = rounding.round_to_blocks

    def noted(*given: object, **named: object) -> object:
        import threading

        seen.append(threading.current_thread().name)
        return plainly(*given, **named)         # type: ignore[arg-type]

    for module in ("tsotsallm.stages.quantize.common", "tsotsallm.stages.allocation"):
        monkeypatch.setattr(f"{module}.round_to_blocks", noted)
    return seen


@pytest.mark.parametrize("recipe", ["gptq:q4_0", "gptq:mixed:4.5", WITH_ZEROS, OBSERVED_AGAIN])
def test_several_linears_at_once_are_what_they_are_one_by_one(recipe: str, tiny: Path, text: Path, tmp_path: Path,
                                                              at_once: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with machine.on_threads(1):
        tsotsallm.compress(tiny, recipe, tmp_path / "one", calibration=text, **SMALL)
    assert set(at_once) == {"MainThread"}
    at_once.clear()
    monkeypatch.setattr(machine, "chosen_by_caller", lambda: THREADS)       # threads of torch stay one: the same sums
    with machine.on_threads(1):
        result = tsotsallm.compress(tiny, recipe, tmp_path / "several", calibration=text, **SMALL)
    assert len({name for name in at_once if name != "MainThread"}) > 1
    assert same_bytes(tmp_path / "one", tmp_path / "several")
    assert sum(result.timings.values()) == pytest.approx(result.elapsed_s, abs=1)
    assert result.timings["rounding"] > 0


def test_large_linears_are_edited_one_by_one(tiny: Path, text: Path, tmp_path: Path, at_once: list[str],
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "SMALL", 0)
    monkeypatch.setattr(machine, "chosen_by_caller", lambda: THREADS)
    tsotsallm.compress(tiny, "gptq:q4_0", tmp_path / "out", calibration=text, **SMALL)
    assert set(at_once) == {"MainThread"}


def test_an_error_of_a_thread_names_the_linear(tiny: Path, text: Path, tmp_path: Path, at_once: list[str],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "chosen_by_caller", lambda: THREADS)
    broken = torch.linalg.LinAlgError

    def no_factor(*_given: object, **_named: object) -> object:
        raise NumericsError(f"not positive definite ({broken.__name__})")

    monkeypatch.setattr("tsotsallm.streaming.statistics.reversed_factor", no_factor)
    with pytest.raises(NumericsError, match=r"layer 0, mlp\.\w+_proj: not positive definite"):
        tsotsallm.compress(tiny, "gptq:q4_0", tmp_path / "out", calibration=text, **SMALL)
    assert not at_once
