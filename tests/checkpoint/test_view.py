"""Layers dropped, reordered and repeated without a copy, against transformers models that are made the same way."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.resident import resident
from tsotsallm.errors import CorpusError

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7, 9, 5]])
ORDERS = [(0, 1, 2, 3), (0, 3), (3, 1, 0), (0, 1, 1, 2, 1, 3)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_view_computes_as_a_transformers_model_with_its_layers_moved(family_checkpoint: Path,
                                                                       order: tuple[int, ...]) -> None:
    """Every layer keeps its kind of attention (sliding window, no rotary embedding) wherever it goes."""
    theirs = AutoModelForCausalLM.from_pretrained(family_checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    moved = [copy.deepcopy(theirs.model.layers[index]) for index in order]
    for place, layer in enumerate(moved):
        layer.self_attn.layer_idx = place
    theirs.model.layers = torch.nn.ModuleList(moved)
    config = theirs.config
    config.num_hidden_layers = len(order)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in order]
    view = View.of(Checkpoint.open(family_checkpoint)).reordered(order)
    with torch.no_grad():
        expected, found = theirs(IDS, use_cache=False).logits, resident(view)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_its_tensors_are_those_of_the_layers_behind_it(tiny: Path) -> None:
    checkpoint = Checkpoint.open(tiny)
    view = View.of(checkpoint).reordered([2, 0, 2])
    assert view.spec.layers == 3
    assert [view.stored(index) for index in range(3)] == [2, 0, 2]
    for index, behind in enumerate((2, 0, 2)):
        expected = checkpoint.layer(behind)
        assert view.layer(index).keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in view.layer(index).items())
        assert torch.equal(view.layer_tensor(index, "mlp.up_proj.weight"), expected["mlp.up_proj.weight"])
        assert view.layer_records(index) == checkpoint.layer_records(behind)


def test_orders_follow_one_another(tiny: Path) -> None:
    view = View.of(Checkpoint.open(tiny))
    twice = view.reordered([3, 2, 0]).reordered([2, 2, 1])
    assert twice.order == (0, 0, 2)
    assert twice.spec.config == view.reordered([0, 0, 2]).spec.config
    assert view.order == (0, 1, 2, 3)                           # the one it was made from stays


def test_a_view_of_layers_that_are_stored_once_finds_them(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, [{"layers": {"order": [0, 1, 1, 2], "shared": True}}], tmp_path / "shared")
    shared, source = Checkpoint.open(tmp_path / "shared"), Checkpoint.open(tiny)
    view = View.of(shared).reordered([3, 2])
    assert view.spec.layers == 2
    for index, behind in enumerate((2, 1)):
        assert all(torch.equal(tensor, source.layer(behind)[name]) for name, tensor in view.layer(index).items())


def test_embeddings_are_looked_up_row_by_row(tiny: Path) -> None:
    view = View.of(Checkpoint.open(tiny))
    table = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).get_input_embeddings().weight
    for ids in ([7], [0, 255, 0, 3], list(range(256)), []):
        asked = torch.tensor(ids, dtype=torch.int64)
        if ids:
            assert torch.equal(view.embed(asked), torch.nn.functional.embedding(asked, table))


@pytest.mark.parametrize("token", [256, 100_000])
def test_a_token_past_the_embeddings_is_named(tiny: Path, token: int) -> None:
    with pytest.raises(CorpusError, match=rf"the text has token {token}, but .* has 256 tokens"):
        View.of(Checkpoint.open(tiny)).embed(torch.tensor([1, token, 2]))
