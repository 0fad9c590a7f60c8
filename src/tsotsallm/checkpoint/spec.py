"""config.json -> what a checkpoint is made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tsotsallm.errors import CheckpointError
from tsotsallm.numerics.grids import GRIDS

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
CONTAINER = "tsotsallm"
MOST_LAYERS = 10_000
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class ModelSpec:
    """Widths and layout of a LLaMA-family model.

    `config` is the Hugging Face config as a dictionary, without its quantisation section, describing the layers in
    `layer_order`; `layer_order[i]` is the stored layer that runs as layer i, so that stored layers may repeat.
    """

    config: dict[str, Any]
    quantization: dict[str, Any] | None
    layer_order: tuple[int, ...]

    @classmethod
    def read(cls, directory: Path) -> ModelSpec:
        path = directory / "config.json"
        try:
            config: Any = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{directory} has no config.json: it is not a Hugging Face checkpoint") from None
        except (ValueError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not valid JSON ({error})") from None
        order: Any = None
        if isinstance(config, dict) and config.get("model_type") == CONTAINER:
            order, config = config.get("layer_order"), config.get("model")
            if not isinstance(order, list) or not all(type(index) is int and 0 <= index < len(order) for index in order):
                raise CheckpointError(f"{path} has no usable layer_order: the container is damaged, compress again")
        if not isinstance(config, dict):
            raise CheckpointError(f"{path} does not hold a JSON object: it is not a Hugging Face config")
        quantization = config.pop("quantization_config", None)
        _require_readable(quantization, path, own=order is not None)
        family = config.get("model_type")
        if family not in FAMILIES:
            raise CheckpointError(f"{path}: unknown architecture {family!r}; supported are {', '.join(FAMILIES)} "
                                  "(Llama 2 and 3, SmolLM, Mistral, Qwen2, Qwen3)")
        if "auto_map" in config:
            raise CheckpointError(f"{path} asks to run Python code that comes with the checkpoint (auto_map); code "
                                  "from a checkpoint is never run; remove auto_map to use the built-in architecture")
        layers = config.get("num_hidden_layers")
        if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
            raise CheckpointError(f"{path} is not a valid {family} config: num_hidden_layers is {layers!r}; "
                                  f"it must be a number from 1 to {MOST_LAYERS}")
        spec = cls(config, quantization, tuple(range(layers) if order is None else order))
        try:
            hf = spec.hf_config
            if min(hf.hidden_size, hf.num_attention_heads, hf.intermediate_size, hf.vocab_size, spec.kv_heads) < 1:
                raise ValueError("a width is not positive")
            if spec.layers != layers:
                raise ValueError(f"{layers} layers, but an order of {spec.layers}")
            spec.layer_config(0)
        except Exception as error:  # transformers raises many types for a bad config
            raise CheckpointError(f"{path} is not a valid {family} config: {error}") from None
        return spec

    @cached_property
    def hf_config(self) -> Any:
        """The transformers config of the model that runs."""
        return hf_config(self.config)

    @property
    def family(self) -> str:
        return str(self.config["model_type"])

    @property
    def layers(self) -> int:
        return len(self.layer_order)

    @property
    def stored_layers(self) -> int:
        return len(set(self.layer_order))

    @property
    def hidden(self) -> int:
        return int(self.hf_config.hidden_size)

    @property
    def feed_forward(self) -> int:
        return int(self.hf_config.intermediate_size)

    @property
    def heads(self) -> int:
        return int(self.hf_config.num_attention_heads)

    @property
    def kv_heads(self) -> int:
        found = self.hf_config.num_key_value_heads
        return self.heads if found is None else int(found)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.hf_config, "head_dim", None) or self.hidden // self.heads)

    @property
    def vocabulary(self) -> int:
        return int(self.hf_config.vocab_size)

    @property
    def tied(self) -> bool:
        return bool(self.hf_config.tie_word_embeddings)

    @property
    def context(self) -> int:
        return int(self.hf_config.max_position_embeddings)

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """Bytes of KV cache for one token in a 16-bit cache; every executed layer has its own."""
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes

    def with_layers(self, count: int) -> ModelSpec:
        """The spec of a model with so many layers of the same kind, whichever they are."""
        order = [min(index, self.layers - 1) for index in range(count)]
        return ModelSpec(slice_config(self.config, order, self.layers), self.quantization, tuple(range(count)))

    def layer_config(self, index: int) -> Any:
        """The transformers config of a model that consists of layer `index` alone."""
        return hf_config(slice_config(self.config, [index], self.layers))

    def attention_window(self, index: int) -> int | None:
        """How many tokens, itself included, a token of layer `index` sees; None for all before it."""
        config = self.layer_config(index)
        kinds = getattr(config, "layer_types", None)
        sliding = kinds[0] == "sliding_attention" if kinds else True
        window = getattr(config, "sliding_window", None)
        return int(window) if sliding and window else None

    def signature(self, index: int) -> str:
        """Equal for layers that can be run by the same one-layer model."""
        config = self.layer_config(index)
        return json.dumps([config.layer_types if hasattr(config, "layer_types") else None,
                           getattr(config, "no_rope_layers", None)])


def _require_readable(quantization: Any, path: Path, *, own: bool) -> None:
    """Raise CheckpointError unless weights are dense or in the one packed form that is read exactly."""
    if quantization is None:
        return
    found = quantization if isinstance(quantization, dict) else {}
    groups = found.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) and all(
        isinstance(group, dict) and isinstance(group.get("targets"), list) for group in groups.values()) else [{}]
    if found.get("quant_method") != "compressed-tensors" or found.get("format") != "pack-quantized" or any(
            scheme.get("type") not in (GRIDS if own else ("int",)) or scheme.get("strategy") not in ("group", "channel")
            or (scheme["strategy"] == "group" and (type(scheme.get("group_size")) is not int or scheme["group_size"] < 1))
            or scheme.get("actorder") not in (None, "weight", "static") or type(scheme.get("num_bits")) is not int
            for scheme in weights):
        raise CheckpointError(f"{path}: quantised with {found.get('quant_method')} in format {found.get('format')}; what "
                              "is read is compressed-tensors' pack-quantized format with integer weights by group or "
                              "channel; start from the 16-bit checkpoint")


def hf_config(config: dict[str, Any]) -> Any:
    """The transformers config object of a config dictionary."""
    from transformers import AutoConfig

    return AutoConfig.for_model(config["model_type"], **{key: value for key, value in config.items()
                                                         if key != "model_type"})


def slice_config(config: dict[str, Any], order: Sequence[int], layers: int) -> dict[str, Any]:
    """The config with `order` as its layers: what it lists layer by layer is sliced with them.

    Per-layer kinds that the config class derives from a layer's index (sliding windows, layers without RoPE) are
    written out, so that a layer keeps its kind wherever it moves.
    """
    full = hf_config(config).to_dict()
    sliced = dict(config)
    for key, value in full.items():
        if "layer" in key and isinstance(value, list) and len(value) == layers:
            sliced[key] = [value[index] for index in order]
    sliced["num_hidden_layers"] = len(order)
    return sliced
