"""What units cost: text, time, rankings that were interrupted, smaller vocabularies."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import build
from tests.fit.parts import settings
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.evaluation.perplexity import evaluate_perplexity
from tsotsallm.fit import units as measuring
from tsotsallm.fit.plans import HOPELESS, Measured
from tsotsallm.fit.reach import Settings
from tsotsallm.lab.texts import world_text


def test_texts_to_keep_are_calibrated_on_where_no_other_is_given(model: Path, text: Path, tmp_path: Path) -> None:
    """Nothing is asked of the hub, for the report neither."""
    other = tmp_path / "other.txt"
    other.write_text("Habari ya asubuhi.", "utf-8")
    source = Checkpoint.open(model)
    how = Settings(None, (str(text), str(other)), windows=2, window=32)
    assert measuring.whole_text(source, how).whole == text.read_text("utf-8") + "\nHabari ya asubuhi."
    assert measuring.whole_text(source, replace(how, calibration=str(other))).whole == "Habari ya asubuhi."


def test_timing_goes_on_after_a_file_was_left(model: Path, text: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    bench = measuring.Bench(str(model), settings(text), tmp_path, lambda _line: None)
    (tmp_path / "speed.gguf").write_bytes(b"half a file")
    monkeypatch.setattr(measuring, "measure_gguf_speed", lambda _file: SimpleNamespace(decode_tokens_per_s=100.0))
    found = bench._seconds()
    assert "f16" in found
    assert all(seconds > 0 for seconds in found.values())
    assert not (tmp_path / "speed.gguf").exists()


def test_an_interrupted_ranking_leaves_the_next_one_as_it_is(text: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()
    ranked = measuring.leave_one_out_losses

    def stopped(*args: Any) -> Any:
        if next(calls) < 1:
            return ranked(*args)

        def tick(_what: str, share: float) -> None:
            if share > 0.6:
                raise KeyboardInterrupt
        return ranked(*args[:-1], tick)

    larger = build(tmp_path / "larger", "llama3", dtype=torch.bfloat16, num_hidden_layers=5, intermediate_size=128)

    def bench(name: str) -> measuring.Bench:
        (tmp_path / name).mkdir(exist_ok=True)
        return measuring.Bench(str(larger), settings(text), tmp_path / name, lambda _line: None)

    whole = bench("whole")._depth()
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "leave_one_out_losses", stopped)
        with pytest.raises(KeyboardInterrupt):
            bench("cut")._depth()
    assert bench("cut")._depth() == whole


def test_a_smaller_vocabulary_costs_what_the_text_costs_more(tmp_path: Path) -> None:
    text = tmp_path / "keep.txt"
    text.write_text(world_text(test=False, characters=30_000), "utf-8")
    bench = measuring.Bench("embedded", Settings(None, (str(text),), windows=2, window=128, compared=6), tmp_path / "work",
                            lambda _line: None)
    found = bench._vocabulary()
    assert bench.most == max(found) < 4096
    assert list(found.values()) == sorted(found.values())
    assert len(found) > 2
    nats = []
    for size in found:
        original = bench.original(size).checkpoint
        assert original.spec.vocabulary == size
        one = evaluate_perplexity(original, bench.compared_text, source="again", context=128)
        nats.append(one.loss * one.protocol.predicted_tokens)
    tokens = bench.original(bench.most).tokens
    assert list(found.values()) == pytest.approx([(one - nats[0]) / tokens for one in nats], rel=1e-4)


def test_cuts_are_measured_as_far_as_a_budget_may_need_them(text: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bits alone lose next to nothing, one layer and one share of neurons are enough; a smaller budget measures the
    rest, and takes over what is known of grids."""
    monkeypatch.setenv("TSOTSALLM_CACHE", str(tmp_path / "cache"))
    larger = build(tmp_path / "larger", "llama3", dtype=torch.bfloat16, num_hidden_layers=4, intermediate_size=128)
    lines: list[str] = []

    def measured(name: str, budget: int | None) -> Measured:
        (tmp_path / name).mkdir()
        bench = measuring.Bench(str(larger), settings(text), tmp_path / name, lines.append, budget=budget)
        return bench.measure(speed=False)[0]

    roomy = measured("roomy", 10 ** 9)
    assert (len(roomy.depth), len(roomy.width)) == (2, 2)
    assert roomy.until < min(roomy.depth[1], max(roomy.width.values()))
    monkeypatch.setattr(measuring.Bench, "_grids", lambda _bench: pytest.fail("grids are known"))
    tight = measured("tight", None)
    assert tight.until == HOPELESS
    assert len(tight.depth) > 2
    assert len(tight.width) > 2
    assert (tight.grids, tight.depth[:2]) == (roomy.grids, roomy.depth)
    assert not [line for line in lines if "taking over" in line]
    assert measured("roomy again", 10 ** 9) == tight
    assert "taking over what was measured before" in lines
