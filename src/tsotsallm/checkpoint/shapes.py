"""Shapes and operations of decoder layers, taken from the transformers library itself: no family is described by hand."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.files import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def one_layer_model(spec: ModelSpec, index: int) -> PreTrainedModel:
    """The family's base model with only layer `index`, its parameters without memory (on the meta device).

    Embeddings are left out and the final norm passes its input through: with hidden states (batch, tokens, hidden) as
    `inputs_embeds`, the model computes exactly that layer, with the library's own masks and rotary embeddings.
    """
    model = _without_memory(spec, index)
    model.rotary_emb = type(model.rotary_emb)(config=model.config)
    model.embed_tokens = torch.nn.Identity()
    model.norm = torch.nn.Identity()
    return model.eval()


def final_norm(spec: ModelSpec) -> torch.nn.Module:
    """The family's final norm module, its parameters without memory."""
    norm: torch.nn.Module = _without_memory(spec, 0).norm
    return norm


def require_rotary(spec: ModelSpec) -> None:
    """Raise ValueError, or whatever transformers raises, unless the config's rotary embeddings can be computed.

    They use memory in proportion to a head's width: call this once that is known to match the weights.
    """
    for kind, rope in spec.ropes.items():
        factor = rope.get("partial_rotary_factor", 1.0)
        if type(factor) not in (int, float) or not 0 < factor <= 1:
            raise ValueError(f"partial_rotary_factor is {quoted(factor)}; it must be a number above 0, at most 1")
        kinds = getattr(spec.hf_config, "layer_types", None) or []
        if kind and kind not in kinds:
            continue
        rotary = one_layer_model(spec, kinds.index(kind) if kind else 0).rotary_emb
        prefix = f"{kind}_" if kind else ""
        if not bool(torch.isfinite(getattr(rotary, f"{prefix}inv_freq")).all()) or not math.isfinite(
                getattr(rotary, f"{prefix}attention_scaling")):
            raise ValueError(f"rotary embeddings are not finite numbers with {quoted(rope)}")
    for path in spec.traits.needed:
        found = spec.hf_config
        for key in path.split("."):
            found = found.get(key) if isinstance(found, dict) else getattr(found, key, None)
        if type(found) not in (int, float):
            raise ValueError(f"{path} is {quoted(found)}; it must be a number")


def _without_memory(spec: ModelSpec, index: int) -> PreTrainedModel:
    from transformers import AutoModel

    config = spec.layer_config(index)
    config.vocab_size = 1
    config.pad_token_id = None
    config._attn_implementation = spec.traits.attention
    with torch.device("meta"):
        return AutoModel.from_config(config)


def layer_shapes(spec: ModelSpec, index: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of executed layer `index`. The dictionary is shared: do not change it."""
    return _shapes(json.dumps(spec.config, sort_keys=True), spec.signature(index), spec, index)


def linear_shapes(spec: ModelSpec, index: int) -> dict[str, tuple[int, int]]:
    """Name -> (d_out, d_in) of the linears of executed layer `index`."""
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in layer_shapes(spec, index).items()
            if len(shape) == 2 and name.endswith(".weight")}


MOST_SHAPES = 64
"""Kinds of layers whose shapes are remembered; those asked for longest ago are forgotten first."""
_remembered: OrderedDict[tuple[str, str], dict[str, tuple[int, ...]]] = OrderedDict()


def _shapes(config: str, signature: str, spec: ModelSpec, index: int) -> dict[str, tuple[int, ...]]:
    key = (config, signature)
    shapes = _remembered.pop(key, None)
    if shapes is None:
        layer = _without_memory(spec, index).layers[0]
        shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    _remembered[key] = shapes
    while len(_remembered) > MOST_SHAPES:
        _remembered.popitem(last=False)
    return shapes


def input_groups(linears: Iterable[str]) -> list[list[str]]:
    """The linears of a layer by the input they share: q, k, v; o; gate, up; down."""
    groups: dict[str, list[str]] = {}
    for name in linears:
        block, _, kind = name.rpartition(".")
        role = {"q_proj": "in", "k_proj": "in", "v_proj": "in", "gate_proj": "in", "up_proj": "in"}.get(kind, kind)
        groups.setdefault(f"{block}.{role}", []).append(name)
    return list(groups.values())


@dataclass(frozen=True)
class MultiplyAccumulates:
    """Multiply-accumulates of a model: `linear` for each token, `attention` for each pair of query and key."""

    linear: int
    attention: int

    def prefill(self, tokens: int) -> int:
        """Those of a prompt of `tokens` tokens as dense matrix products, every query against every key."""
        return self.linear * tokens + self.attention * tokens ** 2

    def decode(self, past: int) -> int:
        """Those of one token after `past` others in the cache."""
        return self.linear + self.attention * (past + 1)


def work_of(spec: ModelSpec) -> MultiplyAccumulates:
    """Linears and head once for each token; scores and their weighted sum, heads · head width each, once for each pair.

    For Llama-2-7B and N tokens: 6.607e9·N + 262144·N². Embeddings are looked up, not multiplied.
    """
    weights = sum(rows * columns for layer in range(spec.layers) for rows, columns in linear_shapes(spec, layer).values())
    return MultiplyAccumulates(weights + spec.vocabulary * spec.hidden, 2 * spec.layers * spec.heads * spec.head_dim)
