"""config.json -> widths, layers and layout of a checkpoint."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tsotsallm.checkpoint import packing
from tsotsallm.checkpoint.families import FAMILIES, WITH_PICTURES, Family
from tsotsallm.errors import CheckpointError, nearest
from tsotsallm.files import one_line, quoted, read_json
from tsotsallm.numerics.grids import GRIDS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONTAINER = "tsotsallm"
MOST_LAYERS = 10_000
CONFIG_BYTES = 4 << 20
KERNELS = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
                   "_experts_implementation", "_experts_implementation_internal"}
"""Keys that choose among transformers' kernels; they belong to a machine, not to a model."""
RUNTIME = {"use_cache", "transformers_weights", "fusion_config", "distributed_config", *KERNELS}
OTHER_FAMILIES = {"sliding_window", "attention_chunk_size", "kv_sharing_modes"}
"""Keys that transformers' cache would obey in a family whose attention does not."""
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class ModelSpec:
    """Widths and layout of a LLaMA-family model.

    `config` is the Hugging Face config as a dictionary, without its quantisation section, describing the layers in
    `layer_order`; `layer_order[i]` is the stored layer that runs as layer i, so that stored layers may repeat. `whole` is
    the `model_type` of a model that sees pictures too, of which this is the text model; empty elsewhere.
    """

    config: dict[str, Any]
    quantization: dict[str, Any] | None
    layer_order: tuple[int, ...]
    whole: str = ""

    @classmethod
    def read(cls, directory: Path) -> ModelSpec:
        """Read the config of a checkpoint; raises CheckpointError where it is missing, unsound, or of an unknown family."""
        path = directory / "config.json"
        try:
            config = read_json(path, CheckpointError, CONFIG_BYTES)
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no config.json: it is not a Hugging Face checkpoint") from None
        return cls.parsed(config, path)

    @classmethod
    def parsed(cls, config: Any, path: Path) -> ModelSpec:
        """The spec of a config, plain or of the own container; raises CheckpointError, naming `path`, as `read` does."""
        order: Any = None
        if isinstance(config, dict) and config.get("model_type") == CONTAINER:
            order, config = config.get("layer_order"), config.get("model")
            if not isinstance(order, list) or not all(type(index) is int and 0 <= index < len(order) for index in order):
                raise CheckpointError(f"{path} has no usable layer_order: the container is damaged; compress again")
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} does not hold a JSON object: it is not a Hugging Face config")
        config, whole = _text_part(config, path)
        quantization = config.pop("quantization_config", None)
        _require_readable(quantization, path, own=order is not None)
        family = config.get("model_type")
        if not isinstance(family, str) or family not in FAMILIES:
            raise CheckpointError(f"{path}: unknown architecture {quoted(family)}{nearest(str(family), FAMILIES)}")
        _require_built_in(config, path)
        layers = config.get("num_hidden_layers")
        if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
            raise CheckpointError(f"{path} is not a valid {family} config: num_hidden_layers is {quoted(layers)}; "
                                  f"it must be a number from 1 to {MOST_LAYERS}")
        config = {key: value for key, value in config.items() if key not in KERNELS}
        for key in {"dtype", "torch_dtype"} & config.keys():
            if not isinstance(getattr(torch, str(config[key]), None), torch.dtype):
                del config[key]         # transformers then uses the weights' own type
        spec = cls(config, quantization, tuple(range(layers) if order is None else order), whole)
        try:
            spec._require_sound(layers)
        except Exception as error:  # transformers raises many types for a bad config
            raise CheckpointError(f"{path} is not a valid {family} config: {one_line(error)}") from None
        return spec

    def _require_sound(self, layers: int) -> None:
        """Raise ValueError, or whatever transformers raises, unless a layer can be computed with these numbers."""
        hf = self.hf_config
        sizes = {key: getattr(hf, key) for key in ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size",
                                                   "max_position_embeddings")}
        sizes |= {"num_key_value_heads": self.kv_heads, "head_dim": self.head_dim}
        for key, value in sizes.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"{key} is {quoted(value)}; it must be a number from 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads evenly")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even one")
        if not hf.rms_norm_eps >= 0:
            raise ValueError(f"rms_norm_eps is {hf.rms_norm_eps}; it must not be negative")
        window = getattr(hf, "sliding_window", None)
        if window is not None and (type(window) is not int or window < 1):
            raise ValueError(f"sliding_window is {quoted(window)}; it must be a number from 1, or null")
        for what, factor in (("the scale of embeddings", self.embedding_scale), ("residual_multiplier", self.residual_scale),
                             ("logits_scaling", self.logit_divisor), (self.traits.cap, self.logit_cap)):
            if factor is not None and not (math.isfinite(factor) and factor > 0):
                raise ValueError(f"{what} is {factor}; it must be a number above 0")
        if self.layers != layers:
            raise ValueError(f"{layers} layers, but an order of {self.layers}")
        self.layer_config(0)

    @cached_property
    def hf_config(self) -> PreTrainedConfig:
        """The transformers config of the model as it runs."""
        return hf_config(self.config)

    @property
    def family(self) -> str:
        """The model type, one of FAMILIES."""
        return str(self.config["model_type"])

    @property
    def traits(self) -> Family:
        """What is known of the model's family besides its layers."""
        return FAMILIES[self.family]

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by where they are read."""
        return self.traits.embedding(self.hf_config)

    @property
    def residual_scale(self) -> float:
        """What the outputs of a layer's branches are multiplied by before they are added."""
        return self.traits.residual(self.hf_config)

    @property
    def logit_divisor(self) -> float:
        """What logits are divided by."""
        return self.traits.divisor(self.hf_config)

    @property
    def logit_cap(self) -> float | None:
        """The c with which logits z become c·tanh(z / c); None where they stay as they are."""
        found = getattr(self.hf_config, self.traits.cap) if self.traits.cap else None
        return None if found is None else float(found)

    @cached_property
    def ropes(self) -> dict[str, dict[str, Any]]:
        """Kind of layer -> how it rotates positions; of the one kind "" where all layers do alike."""
        rope = self.hf_config.rope_parameters or {}
        return {kind: one for kind, one in rope.items() if isinstance(one, dict)} or {"": rope}

    @property
    def activation(self) -> str:
        """What the feed-forward applies, as the config names it."""
        own = "hidden_activation" if "hidden_activation" in type(self.hf_config).__dataclass_fields__ else "hidden_act"
        return str(getattr(self.hf_config, own))

    @property
    def layers(self) -> int:
        """Layers that are executed, repeated ones included."""
        return len(self.layer_order)

    @property
    def stored_layers(self) -> int:
        """Layers that are stored, each counted once."""
        return len(set(self.layer_order))

    @property
    def hidden(self) -> int:
        """Width of the hidden states."""
        return int(self.hf_config.hidden_size)

    @property
    def feed_forward(self) -> int:
        """Width of the feed-forward layers."""
        return int(self.hf_config.intermediate_size)

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return int(self.hf_config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a layer."""
        found = self.hf_config.num_key_value_heads
        return self.heads if found is None else int(found)

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return int(getattr(self.hf_config, "head_dim", None) or self.hidden // self.heads)

    @property
    def vocabulary(self) -> int:
        """Rows of the embeddings."""
        return int(self.hf_config.vocab_size)

    @property
    def tied(self) -> bool:
        """Whether the head uses the embeddings' weights."""
        return bool(self.hf_config.tie_word_embeddings)

    @property
    def context(self) -> int:
        """Positions that the model was trained for.

        Of LongRoPE (arXiv:2402.13753) those before it rotates otherwise: how a token is computed beyond them would depend on
        the length of the text that it stands in.
        """
        most = int(self.hf_config.max_position_embeddings)
        trained = [int(rope["original_max_position_embeddings"]) for rope in self.ropes.values()
                   if rope.get("rope_type") == "longrope"]
        return min([most, *trained])

    @property
    def rotated(self) -> int:
        """How many of a head's numbers are rotated by position."""
        return int(self.head_dim * min(float(rope.get("partial_rotary_factor") or 1) for rope in self.ropes.values()))

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of KV cache for each token, with elements of `element_bytes`; every executed layer has its own cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes

    def with_layers(self, count: int) -> ModelSpec:
        """The spec of a model with `count` layers of the same kind, no matter which."""
        order = [min(index, self.layers - 1) for index in range(count)]
        return ModelSpec(_sliced(self.config, self._by_layer, order), self.quantization, tuple(range(count)))

    @cached_property
    def _by_layer(self) -> dict[str, list[Any]]:
        return _lists_by_layer(self.config, self.layers)

    def layer_config(self, index: int) -> PreTrainedConfig:
        """The transformers config of a model that consists of layer `index` alone."""
        return hf_config({**_sliced(self.config, self._by_layer, [index]), **self.traits.neutral})

    def attention_window(self, index: int) -> int | None:
        """How many tokens, itself included, a token of layer `index` attends to; None: all before it."""
        config = self.layer_config(index)
        kinds = getattr(config, "layer_types", None)
        sliding = kinds[0] == "sliding_attention" if kinds else True
        window = getattr(config, "sliding_window", None)
        return int(window) if sliding and window else None

    def signature(self, index: int) -> str:
        """A text that is equal for layers that the same one-layer model can run."""
        return json.dumps({key: values[index] for key, values in self._by_layer.items()}, sort_keys=True)


SHARED_BY_PARTS = ("tie_word_embeddings", "dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id", "auto_map",
                   "quantization_config")
"""Keys that count for the text model where the config of a model that sees pictures too has them."""


def _text_part(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """The config of the text model, and the `model_type` of the whole that also sees pictures; empty where there is none."""
    whole = config.get("model_type")
    if not isinstance(whole, str) or whole not in WITH_PICTURES:
        return config, ""
    text, usual = config.get("text_config"), WITH_PICTURES[whole]
    if not isinstance(text, dict) or text.get("model_type", usual[0]) not in usual:
        named = quoted(text["model_type"]) if isinstance(text, dict) else "not there"
        raise CheckpointError(f"{path} is of a {whole}, whose text model (text_config) is {named}; it must be one of "
                              f"{', '.join(usual)}")
    return {"model_type": usual[0], **text, **{key: config[key] for key in SHARED_BY_PARTS if key in config}}, whole


def _require_built_in(config: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError where a config asks for more than its family's own architecture."""
    if "auto_map" in config:
        raise CheckpointError(f"{path} asks to run Python code that comes with the checkpoint (auto_map); code "
                              "from a checkpoint is never run; remove auto_map to use the built-in architecture")
    if config.get("per_layer_config"):
        raise CheckpointError(f"{path} gives single layers a config of their own (per_layer_config), which is not read; "
                              "start from a model whose layers are alike")
    for key, usual in (("is_causal", (True,)), ("use_bidirectional_attention", (False, None))):
        if not any(config.get(key, usual[0]) is one for one in usual):
            raise CheckpointError(f"{path} asks for attention in both directions ({key} is {quoted(config[key])}); only "
                                  "models that predict the next token are read")
    kinds = config.get("layer_types")
    if config["model_type"] == "llama" and kinds is not None and (not isinstance(kinds, list) or {*map(str, kinds)} - {
            "full_attention"}):
        raise CheckpointError(f"{path} lists kinds of attention (layer_types) that a llama does not have; remove the key, "
                              "or name the family that has them as model_type")
    waiting: list[tuple[str, object]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{path}: {quoted(key)} is {value}; a config holds finite numbers, download it again")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(key, item) for item in inner]


def _require_readable(quantization: object, path: Path, *, own: bool) -> None:
    """Raise CheckpointError unless the weights are dense, or in the one packed form that is read."""
    if quantization is None:
        return
    section = quantization if isinstance(quantization, dict) else {}
    groups = section.get("config_groups")
    if section.get("quant_method") != "compressed-tensors" or section.get("format") != "pack-quantized" or not (
            isinstance(groups, dict) and all(_is_readable(group, own=own) for group in groups.values())):
        method = f" with {quoted(section['quant_method'])}" if "quant_method" in section else ""
        form = f" in format {quoted(section['format'])}" if "format" in section else ""
        raise CheckpointError(f"{path}: quantised{method}{form}; only compressed-tensors' pack-quantized format is read, "
                              "with integer weights by group or channel; start from the 16-bit checkpoint")
    if section.get("transform_config"):
        raise CheckpointError(f"{path}: quantised with rotations at run time (transform_config), which are not read; start "
                              "from the 16-bit checkpoint")


def _is_readable(group: object, *, own: bool) -> bool:
    """Whether a config group of compressed-tensors has targets and a grid that can be read."""
    fields = group if isinstance(group, dict) else {}
    targets, scheme = fields.get("targets"), fields.get("weights")
    if not isinstance(targets, list) or not isinstance(scheme, dict):
        return False
    size = scheme.get("group_size")
    return (all(packing.is_target(target) for target in targets)
            and scheme.get("type") in (GRIDS if own else ("int",)) and scheme.get("strategy") in ("group", "channel")
            and (scheme["strategy"] != "group" or (type(size) is int and size > 0))
            and scheme.get("actorder") in (None, "weight", "static")
            and type(scheme.get("num_bits")) is int and 2 <= scheme["num_bits"] <= 8
            and type(scheme.get("symmetric", True)) is bool)


def hf_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config object of a config dictionary, limited to keys that describe the architecture."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[config["model_type"]]
    # a config completes its dictionaries in place: it gets copies
    found = kind(**{key: copy.deepcopy(value) for key, value in config.items() if _describes(kind, key)})
    if found.pad_token_id is not None and not 0 <= found.pad_token_id < found.vocab_size:
        found.pad_token_id = None       # padding has no effect on results
    return found


def _describes(kind: type[PreTrainedConfig], key: str) -> bool:
    """Whether a key of a config describes the model: a field of its family's class, or one that the class does not know.

    Keys that control running or loading, or would overwrite a method of the class, do not.
    """
    from transformers import PreTrainedConfig

    if key in RUNTIME or key.startswith("_"):
        return False
    own = kind.__dataclass_fields__
    if key in own:
        return key not in PreTrainedConfig.__dataclass_fields__
    return key == "rope_scaling" or (key not in OTHER_FAMILIES and not hasattr(kind, key))


def slice_config(config: dict[str, Any], order: Sequence[int], layers: int) -> dict[str, Any]:
    """The config with `order` as its layers; values that it lists layer by layer are sliced with them.

    Per-layer kinds that the config class derives from a layer's index (sliding windows, layers without RoPE) are
    written out, so that a layer keeps its kind wherever it moves.
    """
    return _sliced(config, _lists_by_layer(config, layers), order)


def _lists_by_layer(config: dict[str, Any], layers: int) -> dict[str, list[Any]]:
    """The values that a config lists layer by layer, by key."""
    return {key: value for key, value in hf_config(config).to_dict().items()
            if "layer" in key and isinstance(value, list) and len(value) == layers}


def _sliced(config: dict[str, Any], by_layer: dict[str, list[Any]], order: Sequence[int]) -> dict[str, Any]:
    return {**config, **{key: [values[index] for index in order] for key, values in by_layer.items()},
            "num_hidden_layers": len(order)}
