"""Forecasts of time: what passes took here is remembered by kind, and the next forecast asks it."""

from __future__ import annotations

from pathlib import Path

import pytest

import tsotsallm
from tsotsallm import pace
from tsotsallm.pace import Kind, Measured, expected, remember

KIND = Kind("gptq:q4_0", "text gram factor", 2)
SECONDS = {"forward passes": 60.0, "backward passes": 30.0, "head and loss": 10.0, "Grams": 15.0, "factors": 5.0,
           "rounding": 50.0, "disk": 8.0, "rest": 2.0}


def measured(kind: Kind = KIND, floor_s: float = 100.0, weights: int = 10 ** 8, factor: float = 1.0) -> Measured:
    found = Measured.of(kind, floor_s, weights, {part: factor * seconds for part, seconds in SECONDS.items()})
    assert found is not None
    return found


def test_a_pass_is_expected_to_take_what_it_took() -> None:
    remember(measured())
    found = expected(KIND, 100.0, 10 ** 8)
    assert (found.seconds, found.runs) == (pytest.approx(sum(SECONDS.values())), 1)


def test_operations_and_weights_count_apart() -> None:
    remember(measured())
    assert expected(KIND, 200.0, 10 ** 8).seconds == pytest.approx(240 + 60)      # twice the text
    assert expected(KIND, 200.0, 2 * 10 ** 8).seconds == pytest.approx(240 + 120)     # twice the model


def test_the_median_of_the_last_passes_counts() -> None:
    for factor in (50.0, 1.0, 1.0, 3.0, 2.0, 2.0, 9.0, 2.0):      # the first is forgotten
        remember(measured(factor=factor))
    found = expected(KIND, 100.0, 10 ** 8)
    assert (found.seconds, found.runs) == (pytest.approx(2 * sum(SECONDS.values())), pace.KEPT)


def test_other_stages_with_the_same_needs_are_the_next_best() -> None:
    remember(measured())
    alike = Kind("gptq:q4_k", KIND.needs, 2)
    assert expected(alike, 100.0, 10 ** 8).seconds == pytest.approx(sum(SECONDS.values()))
    remember(measured(alike, factor=2.0))
    assert expected(alike, 100.0, 10 ** 8).seconds == pytest.approx(2 * sum(SECONDS.values()))


@pytest.mark.parametrize("other", [Kind("gptq:q4_0", KIND.needs, 1), Kind("wanda:2:4", "text gram", 2),
                                   Kind("gptq:q4_0", KIND.needs, 2, trains=True),
                                   Kind("gptq:q4_0", KIND.needs, 2, device="cuda")])
def test_what_differs_in_kind_says_nothing(other: Kind) -> None:
    remember(measured())
    assert expected(other, 100.0, 10 ** 8).runs == 0


def test_all_of_a_training_grows_with_its_operations() -> None:
    kind = Kind("lora:8", "gradients", 2, trains=True)
    remember(measured(kind))
    assert expected(kind, 300.0, 10 ** 8).seconds == pytest.approx(3 * sum(SECONDS.values()))


def test_a_pass_without_operations_grows_with_its_weights() -> None:
    kind = Kind("rtn:q4_0", "", 2)
    remember(measured(kind, floor_s=0.0))
    assert expected(kind, 0.0, 3 * 10 ** 8).seconds == pytest.approx(3 * sum(SECONDS.values()))


def test_short_passes_are_not_remembered() -> None:
    assert Measured.of(KIND, 0.2, 1000, SECONDS) is None


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff", b'[{"ratio": 1}]'])
def test_a_damaged_memory_is_begun_anew(content: bytes) -> None:
    path = pace._path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert expected(KIND, 1.0, 1).runs == 0
    remember(measured())
    assert expected(KIND, 1.0, 1).runs == 1


def test_runs_teach_the_next_plan(tiny: Path, tmp_path: Path) -> None:
    before = tsotsallm.plan(tiny, "rtn:4:32")
    assert before.runs == 0
    result = tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out")
    after = tsotsallm.plan(tiny, "rtn:4:32")
    assert after.runs == 1
    assert 0 < after.expected_s <= result.elapsed_s + 0.05         # which is rounded to a tenth
    assert after.plain()["expected_s"] == after.expected_s
