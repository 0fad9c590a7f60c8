"""Seconds by part: each without what is inside it, whatever ends it, and all together the whole."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tsotsallm
from tsotsallm.timing import PARTS, Stopwatch, counted, part, shared_with_threads


@counted("disk")
def slept(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_part_has_its_seconds_without_those_inside_it() -> None:
    watch = Stopwatch()
    with part("forward passes"):
        time.sleep(0.05)
        assert slept(0.2) == 0.2
        with pytest.raises(ZeroDivisionError), part("Grams"):
            _ = 1 / 0
    seconds = watch.seconds()
    assert seconds["disk"] >= 0.2
    assert 0.05 <= seconds["forward passes"] < seconds["disk"] + 0.05
    assert 0 < seconds["Grams"] < 0.05
    assert set(seconds) == {*PARTS, "rest"}
    assert Stopwatch().seconds()["disk"] == 0


def test_what_threads_do_at_once_counts_once() -> None:
    def work(seconds: float) -> None:
        with part("rounding"):
            time.sleep(seconds)
        slept(seconds)

    watch = Stopwatch()
    with part("Grams"):
        time.sleep(0.1)
        with shared_with_threads() as measured, ThreadPoolExecutor(2) as pool:
            list(pool.map(measured(work), [0.1, 0.1]))
    seconds = watch.seconds()
    assert seconds["rounding"] == pytest.approx(0.1, abs=0.05)        # two threads for 0.1 s each
    assert seconds["disk"] == pytest.approx(0.1, abs=0.05)
    assert seconds["Grams"] == pytest.approx(0.1, abs=0.05)           # without what is inside it


def test_threads_without_parts_leave_the_seconds_where_they_are() -> None:
    watch = Stopwatch()
    with part("Grams"), shared_with_threads() as measured, ThreadPoolExecutor(2) as pool:
        list(pool.map(measured(time.sleep), [0.05, 0.05]))
    assert watch.seconds()["Grams"] >= 0.05
    with shared_with_threads():
        pass


def test_a_part_that_no_table_shows_is_refused() -> None:
    with pytest.raises(KeyError, match="lunch"), part("lunch"):
        pass


def test_a_run_says_where_its_time_went(tiny: Path, text: Path, tmp_path: Path) -> None:
    result = tsotsallm.compress(tiny, "gptq:q4_0", tmp_path / "out", calibration=text, windows=4, window=48)
    assert all(result.timings[name] > 0 for name in PARTS)
    assert sum(result.timings.values()) == pytest.approx(result.elapsed_s, abs=1)
    plain = tsotsallm.compress(tiny, "wanda:2:4", tmp_path / "pruned", calibration=text, windows=4, window=48)
    assert plain.timings["backward passes"] == plain.timings["rounding"] == 0
