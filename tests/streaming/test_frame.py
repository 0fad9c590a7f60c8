"""A layer in the frame computes what it computes in the model of transformers, whatever the batch before was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.streaming.frame import Frame

CPU = torch.device("cpu")


def test_rotations_are_those_of_the_positions_asked_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tsotsallm.load(tiny)
    layer, rotary = model.model.layers[1], model.model.rotary_emb
    computed: list[torch.nn.Module] = []
    plain = type(rotary).forward

    def noted(module: torch.nn.Module, *given: object, **named: object) -> object:
        computed.append(module)
        return plain(module, *given, **named)

    monkeypatch.setattr(type(rotary), "forward", noted)
    view = View.of(Checkpoint.open(tiny))
    frame, generator = Frame(view.spec, CPU), torch.Generator().manual_seed(0)
    frame.load(1, view.layer(1))
    with torch.no_grad():
        for windows, tokens, first in ((1, 12, 0), (3, 12, 0), (2, 7, 0), (2, 12, 5), (2, 12, 0), (2, 12, 0)):
            states = torch.randn(windows, tokens, view.spec.hidden, generator=generator)
            positions = torch.arange(first, first + tokens)[None].expand(windows, -1)
            found = frame(states, positions=positions if first else None)
            expected = layer(states, position_embeddings=rotary(states, positions), attention_mask=torch.ones(
                tokens, tokens, dtype=torch.bool).tril()[None, None])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sum(module is not rotary for module in computed) == 4       # of six batches, two follow one like them
