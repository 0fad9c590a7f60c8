"""Depth pruning: every importance chooses layers, and a measuring pass goes on where it was stopped."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import tsotsallm
from tests.compressing import SMALL, Stop, same_bytes
from tests.conftest import build
from tsotsallm.streaming import targets
from tsotsallm.streaming.hidden import HiddenStates


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("importance", ["perplexity", "taylor", "cosine"])
def test_a_measuring_pass_that_is_stopped_again_and_again_finishes_with_the_same_choice(
        importance: str, iterative: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "source", "llama3", num_hidden_layers=6)
    recipe = [{"depth": {"remove": 2, "importance": importance, "protect": {"first": 1, "last": 1}, "iterative": iterative}}]
    options = {"calibration": text, "windows": 12, "window": 256}
    monkeypatch.setattr(targets, "HEAD_TOKENS", 1024)     # the head's gradient in three writes
    write = HiddenStates.write
    written = itertools.count(1)

    def count(states: HiddenStates, batch: list[int], values: torch.Tensor) -> None:
        next(written)
        write(states, batch, values)

    monkeypatch.setattr(HiddenStates, "write", count)
    tsotsallm.compress(source, recipe, tmp_path / "whole", **options)
    needed = next(written)
    allowed = 9     # writes in one attempt: enough for the head's gradient and a layer, never for the whole pass

    def stop(states: HiddenStates, batch: list[int], values: torch.Tensor) -> None:
        if next(in_this_attempt) > allowed:
            raise Stop
        write(states, batch, values)

    monkeypatch.setattr(HiddenStates, "write", stop)
    for attempt in itertools.count(1):
        in_this_attempt = itertools.count(1)
        try:
            tsotsallm.compress(source, recipe, tmp_path / "cut", **options)
            break
        except Stop:
            assert attempt <= needed
    assert needed >= 2 * allowed
    assert attempt >= 2
    whole, cut = (json.loads((tmp_path / name / "tsotsallm.json").read_text())["choices"] for name in ("whole", "cut"))
    assert whole == cut
    assert same_bytes(tmp_path / "whole", tmp_path / "cut")


def test_all_importances_choose_layers(tmp_path: Path, text: Path) -> None:
    source = build(tmp_path / "source", "llama3", num_hidden_layers=6)
    for importance in ("perplexity", "taylor", "magnitude", "cosine"):
        for iterative in (False, True):
            out = tmp_path / f"{importance}-{iterative}"
            recipe = [{"depth": {"remove": 2, "importance": importance, "protect": {"first": 1, "last": 1},
                                 "iterative": iterative}}]
            tsotsallm.compress(source, recipe, out, calibration=text, **SMALL)
            choice = json.loads((out / "tsotsallm.json").read_text())["choices"][0]
            assert len(choice["order"]) == 4
            assert {0, 5} <= set(choice["order"])
            assert len(choice["rounds"]) == (2 if iterative else 1)
            first, *more = choice["rounds"]
            assert ("whole" in first) == (importance == "perplexity")
            for then in more:
                if importance == "perplexity":      # the second round's model is the first one's without the layer
                    assert then["whole"] == pytest.approx(first["importance"][str(first["removed"][0])], rel=1e-6)
