"""Shapes and operations of layers against transformers' own models; shapes are remembered for a bounded number of kinds."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tsotsallm.checkpoint import shapes
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import work_of
from tsotsallm.checkpoint.spec import ModelSpec


def test_the_shapes_of_a_bounded_number_of_layers_are_remembered() -> None:
    spec = Checkpoint.open("embedded").spec
    expected = {"self_attn.q_proj": (256, 256), "self_attn.k_proj": (64, 256), "mlp.down_proj": (256, 768)}
    for width in range(2, 2 * shapes.MOST_SHAPES + 10, 2):
        other = replace(spec, config=spec.config | {"intermediate_size": width})
        assert shapes.linear_shapes(other, 0)["mlp.up_proj"] == (width, 256)
    assert len(shapes._remembered) == shapes.MOST_SHAPES
    assert {name: shapes.linear_shapes(spec, 0)[name] for name in expected} == expected
    assert shapes.layer_shapes(spec, 0) is shapes.layer_shapes(spec, 1)


def test_shapes_are_those_of_the_whole_model(family_checkpoint: Path) -> None:
    spec = ModelSpec.read(family_checkpoint)
    layers = AutoModelForCausalLM.from_pretrained(family_checkpoint).model.layers
    for index, layer in enumerate(layers):
        assert shapes.layer_shapes(spec, index) == {name: tuple(one.shape) for name, one in layer.state_dict().items()}
        assert shapes.linear_shapes(spec, index) == {
            name: (module.out_features, module.in_features) for name, module in layer.named_modules()
            if isinstance(module, torch.nn.Linear)}


def test_linears_of_one_group_read_the_very_same_input(family_checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family_checkpoint, dtype=torch.float32)
    readers: dict[int, list[str]] = defaultdict(list)
    alive = []
    for name, module in model.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            def note(_module: Any, inputs: Any, name: str = name) -> None:
                alive.append(inputs[0])         # so that no other tensor gets its place in memory
                readers[inputs[0].data_ptr()].append(name)
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        model(torch.tensor([[3, 1, 4, 1, 5]]))
    names = [name for group in readers.values() for name in group]
    assert sorted(map(sorted, shapes.input_groups(names))) == sorted(map(sorted, readers.values()))


def test_groups_of_some_linears_alone() -> None:
    assert shapes.input_groups([]) == []
    assert shapes.input_groups(["mlp.up_proj", "self_attn.v_proj", "self_attn.q_proj"]) == [
        ["mlp.up_proj"], ["self_attn.v_proj", "self_attn.q_proj"]]


def test_one_layer_computes_as_in_the_whole_model(family_checkpoint: Path) -> None:
    spec = ModelSpec.read(family_checkpoint)
    whole = AutoModelForCausalLM.from_pretrained(family_checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    with torch.no_grad():
        states = whole(torch.arange(40)[None], output_hidden_states=True, use_cache=False).hidden_states
    for index in range(spec.layers - 1):        # the last ones are told after the final norm
        one = shapes.one_layer_model(spec, index)
        one.layers[0].load_state_dict(whole.model.layers[index].state_dict(), assign=True)
        with torch.no_grad():
            found = one(inputs_embeds=states[index], use_cache=False).last_hidden_state
        torch.testing.assert_close(found, states[index + 1], rtol=1e-4, atol=1e-4)
    norm = shapes.final_norm(spec)
    assert all(parameter.is_meta for parameter in norm.parameters())
    norm.load_state_dict(whole.model.norm.state_dict(), assign=True)
    assert torch.equal(norm(states[1]), whole.model.norm(states[1]))


@pytest.mark.parametrize("rope", [{"rope_theta": 0.0}, {"rope_type": "linear", "factor": 0.0}, {"partial_rotary_factor": 0},
                                  {"partial_rotary_factor": 2.0}, {"partial_rotary_factor": "half"}], ids=str)
def test_rotary_embeddings_that_cannot_be_computed_are_refused(family_checkpoint: Path, rope: dict[str, Any]) -> None:
    spec = ModelSpec.read(family_checkpoint)
    shapes.require_rotary(spec)
    before = spec.config.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0}
    other = replace(spec, config=spec.config | {"rope_parameters": before | rope})
    with pytest.raises((ValueError, KeyError, ZeroDivisionError, TypeError)):
        shapes.require_rotary(other)


def test_multiply_accumulates_equal_a_counted_forward(family_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(family_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(family_checkpoint, attn_implementation="eager")
    spec, tokens = checkpoint.spec, 24
    counted = [0]

    def of_linear(module: torch.nn.Linear, inputs: Any, output: torch.Tensor) -> None:
        counted[0] += output.numel() * module.in_features

    def of_attention(_module: Any, _inputs: Any, output: Any) -> None:
        weights = output[1]
        counted[0] += 2 * weights.numel() * spec.head_dim       # scores, and their weighted sum of values

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(of_linear)
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(of_attention)
    with torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.int64), output_attentions=True)
    assert work_of(spec).prefill(tokens) == counted[0]


def test_the_work_of_llama_2_7b_is_the_known_formula(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False}))
    work = work_of(ModelSpec.read(tmp_path))
    assert work.linear == pytest.approx(6.607e9, rel=1e-4)
    assert work.attention == 262144


@pytest.mark.parametrize("past", [0, 1, 100])
def test_decoding_is_the_difference_between_two_prompts(past: int) -> None:
    """What one more token costs is what it adds, where every query is multiplied with the keys before it only."""
    work = shapes.MultiplyAccumulates(linear=7, attention=3)
    causal = [7 * tokens + 3 * sum(range(1, tokens + 1)) for tokens in (past, past + 1)]
    assert work.decode(past) == causal[1] - causal[0]
    assert work.prefill(past) == 7 * past + 3 * past * past
