"""Depth pruning: its measuring pass goes on where it was stopped."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import tsotsallm
from tests.conftest import build
from tsotsallm.streaming.hidden import HiddenStates


class Stop(Exception):
    """Stands for a kill at an unlucky moment."""


@pytest.mark.parametrize("iterative", [False, True])
@pytest.mark.parametrize("importance", ["perplexity", "taylor", "cosine"])
def test_a_measuring_pass_that_is_stopped_again_and_again_finishes_with_the_same_choice(
        importance: str, iterative: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "source", "llama3", num_hidden_layers=6)
    recipe = [{"depth": {"remove": 2, "importance": importance, "protect": {"first": 1, "last": 1}, "iterative": iterative}}]
    options = {"calibration": text, "windows": 12, "window": 256}
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
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (tmp_path / "cut" / "model.safetensors").read_bytes()
