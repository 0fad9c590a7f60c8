"""Widths and layout of a model, against transformers' own configs, caches and masks; orders that cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import tsotsallm
from tests.checkpoint.damage import refused
from tests.conftest import build
from tsotsallm.checkpoint.spec import ModelSpec, slice_config
from tsotsallm.errors import CheckpointError

IDS = torch.arange(40)[None] % 256


def test_widths_are_those_of_the_weights(family_checkpoint: Path) -> None:
    spec = ModelSpec.read(family_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(family_checkpoint)
    attention, feed_forward = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert (spec.vocabulary, spec.hidden) == tuple(model.get_input_embeddings().weight.shape)
    assert feed_forward.down_proj.weight.shape == (spec.hidden, spec.feed_forward)
    assert attention.q_proj.weight.shape == (spec.heads * spec.head_dim, spec.hidden)
    assert attention.k_proj.weight.shape == (spec.kv_heads * spec.head_dim, spec.hidden)
    assert spec.layers == spec.stored_layers == len(model.model.layers)
    assert spec.tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    assert (spec.family, spec.context) == (model.config.model_type, model.config.max_position_embeddings)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 0, 0, 1)], ids=str)
def test_the_cache_takes_the_bytes_that_a_forward_fills(family_checkpoint: Path, order: tuple[int, ...]) -> None:
    """Within a sliding window; beyond it transformers forgets."""
    whole = ModelSpec.read(family_checkpoint)
    spec = ModelSpec(slice_config(whole.config, order, 4), None, tuple(range(len(order))))
    model, cache = AutoModelForCausalLM.from_config(spec.hf_config), DynamicCache()
    with torch.no_grad():
        model(IDS[:, :10], past_key_values=cache, use_cache=True)
    filled = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert spec.kv_bytes_per_token(4) * 10 == filled
    assert spec.kv_bytes_per_token() * 2 == spec.kv_bytes_per_token(4)


def test_a_layer_sees_as_far_as_transformers_lets_it(family_checkpoint: Path) -> None:
    """By gradients: on which inputs of a layer the last output depends."""
    spec = ModelSpec.read(family_checkpoint)
    for index in range(spec.layers):
        model = AutoModelForCausalLM.from_config(spec.layer_config(index)).model.eval()
        states = torch.randn(1, 40, spec.hidden, requires_grad=True)
        model(inputs_embeds=states).last_hidden_state[0, -1].sum().backward()
        assert states.grad is not None
        seen = int((states.grad[0].abs().sum(-1) > 0).sum())
        assert seen == min(spec.attention_window(index) or 40, 40), index


def test_layers_of_one_kind_have_one_signature(family_checkpoint: Path) -> None:
    spec = ModelSpec.read(family_checkpoint)
    kinds: dict[str, Any] = {}
    for index in range(spec.layers):
        config = spec.layer_config(index).to_dict()
        assert kinds.setdefault(spec.signature(index), config) == config
    distinct = {json.dumps(config, sort_keys=True, default=str) for config in kinds.values()}
    assert len(distinct) == len(kinds) == {"qwen2": 2, "smollm3": 2}.get(spec.family, 1)


@pytest.mark.parametrize("order", [(3,), (3, 2, 1, 0), (1, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3)], ids=str)
def test_lists_of_a_config_follow_the_layers(family_checkpoint: Path, order: tuple[int, ...]) -> None:
    whole = AutoConfig.from_pretrained(family_checkpoint)
    spec = ModelSpec.read(family_checkpoint)
    before = json.dumps(spec.config)
    sliced = ModelSpec(slice_config(spec.config, order, 4), None, tuple(range(len(order)))).hf_config
    assert json.dumps(spec.config) == before
    assert sliced.num_hidden_layers == len(order)
    for name in ("layer_types", "no_rope_layers"):
        if isinstance(value := getattr(whole, name, None), list):
            assert getattr(sliced, name) == [value[index] for index in order], name


def test_more_layers_of_the_same_kinds(family_checkpoint: Path) -> None:
    spec = ModelSpec.read(family_checkpoint)
    for count in (1, 4, 9):
        other = spec.with_layers(count)
        assert other.layers == other.hf_config.num_hidden_layers == count
        assert other.kv_bytes_per_token() * spec.layers == spec.kv_bytes_per_token() * count


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    source = build(folder / "source", "llama2")
    tsotsallm.compress(source, [{"layers": {"order": [0, 1, 1, 2], "shared": True}}], folder / "out")
    return folder / "out"


def test_repeated_layers_run_more_often_than_they_are_stored(shared: Path) -> None:
    spec = ModelSpec.read(shared)
    assert (spec.layer_order, spec.layers, spec.stored_layers) == ((0, 1, 1, 2), 4, 3)
    assert spec.hf_config.num_hidden_layers == 4


@pytest.mark.parametrize("order", [None, "0112", [0, 1, 1, -1], [0, 1, 1, 4], [0, 1, 1, 2.0], [0, True, 1, 2], [], [[0]],
                                   [0, 1, 1, 10 ** 30], [0, 1, 2], [0, 1, 1, 2, 2], [0, 1, 1, 3], [0, 0, 0, 0]], ids=str)
def test_an_order_that_cannot_be_is_refused(shared: Path, tmp_path: Path, order: object) -> None:
    path = Path(shutil.copytree(shared, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"layer_order": order}))
    refused(path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", '[{"a": [NaN]}]', '{"deep": {"deeper": Infinity}}'])
def test_numbers_that_are_none_are_refused_wherever_they_stand(tmp_path: Path, value: str) -> None:
    path = build(tmp_path / "model", "llama2", num_hidden_layers=1)
    text = (path / "config.json").read_text().rstrip().removesuffix("}")
    (path / "config.json").write_text(f'{text}, "strange": {value}}}')
    with pytest.raises(CheckpointError):
        ModelSpec.read(path)
