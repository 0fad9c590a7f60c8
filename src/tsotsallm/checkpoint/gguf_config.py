"""The header of a GGUF file as a Hugging Face config: the inverse of what the export writes, from the same records."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

from tsotsallm.checkpoint.families import ARCHITECTURES, FAMILIES, Family, Gguf
from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.gguf_rope import Factors, base_within_windows, number_of, rope_of_file
from tsotsallm.checkpoint.gguf_terms import HEAD_IN_FILE
from tsotsallm.errors import CheckpointError
from tsotsallm.files import quoted

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ASSUMED_WINDOW = 4096
"""The attention window that llama.cpp takes for models that always have one, where the file states none."""


def config_of(file: GgufFile, tensors: Container[str], factors: Factors) -> dict[str, Any]:
    """The config of the model that a header describes, without its type of weights.

    `factors` are those by which frequencies are divided, by the tensors that hold them. Raises CheckpointError for whatever
    the family does not have.
    """
    name = family_of(file)
    family = FAMILIES[name]
    form = family.gguf
    if file.experts[0] > 1:
        raise CheckpointError(f"{file.path} has {file.experts[0]} experts in every layer; only dense models are read")
    heads, kv_heads, feed_forward = (_alike(file, key, values) for key, values in (
        ("attention.head_count", file.heads), ("attention.head_count_kv", file.kv_heads),
        ("feed_forward_length", file.feed_forward)))
    head_dim = _head_width(file, form)
    fields, usual = _class_of(name)
    full = rope_of_file(file, form, head_dim, factors)
    windows, window = windows_of(file, form)
    config: dict[str, Any] = {
        "model_type": name, "num_hidden_layers": file.layers, "hidden_size": file.hidden,
        "hidden_activation" if "hidden_activation" in fields else "hidden_act": form.activation[0],
        "intermediate_size": feed_forward, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "vocab_size": file.vocabulary, "max_position_embeddings": file.context,
        "rms_norm_eps": number_of(file, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD_IN_FILE not in tensors, "rope_parameters": full}
    if fields.get("head_dim") is None and getattr(usual, "head_dim", 0) is not None and heads * head_dim == file.hidden:
        del config["head_dim"]                      # what the family's class derives by itself
    for key, (module, stored) in _BIASES.items():
        if key in fields:
            config[key] = module in form.biases and f"blk.0.{stored}.bias" in tensors
    if form.period:
        config["layer_types"] = ["sliding_attention" if one else "full_attention" for one in windows]
        if any(windows) or form.windowed:           # otherwise no layer asks for it, but its class does
            config["sliding_window"] = window if form.windowed in (0, file.layers) else None
        _within_windows(file, form, config, any(
            isinstance(one, dict) for one in (usual.rope_parameters or {}).values()))
    if window and not any(windows):                 # llama.cpp ignores it: within it, both are the same
        config["max_position_embeddings"] = min(file.context or window, window)
    if full["rope_type"] == "longrope" and "original_max_position_embeddings" in fields:
        config["original_max_position_embeddings"] = full["original_max_position_embeddings"]
    if form.per_head and file.hidden is not None:
        config["query_pre_attn_scalar"] = file.hidden // heads if file.layers == form.per_head else head_dim
    _scalings(file, family, config, head_dim)
    if (tokenizer := file.tokenizer) is not None:
        config["bos_token_id"], config["eos_token_id"] = tokenizer.bos, tokenizer.eos
    return config


_BIASES = {"attention_bias": ("self_attn.q_proj", "attn_q"), "attention_out_bias": ("self_attn.o_proj", "attn_output"),
           "mlp_bias": ("mlp.gate_proj", "ffn_gate")}
"""Key of a config -> a linear that then has a bias, and what it is called in a file."""


def require_family(file: GgufFile) -> None:
    """Raise CheckpointError for a model of an architecture that is not known."""
    arch = file.architecture
    if arch not in (*ARCHITECTURES, "", "clip") and file.text("general.type") in (None, "model") and (
            "adapter.type" not in file.fields):
        raise CheckpointError(f"{file.path}: unknown architecture {quoted(arch)}; supported are {', '.join(ARCHITECTURES)}; "
                              "start from a model of one of these")


def family_of(file: GgufFile) -> str:
    """The family of a file's architecture: of those that share one, the first that has windows exactly where it has."""
    arch, some = file.architecture, bool(_window(file))
    names = ARCHITECTURES[arch]
    name = next((name for name in names if bool(FAMILIES[name].gguf.period) == some), names[0])
    form = FAMILIES[name].gguf
    if form.otherwise and file.text(f"{arch}.rope.scaling.type") not in form.ropes and not any(
            file.fields.get(f"{arch}.{key}") for key in form.keys):
        return form.otherwise
    return name


def windows_of(file: GgufFile, form: Gguf) -> tuple[list[bool], int | None]:
    """Which layers have an attention window in llama.cpp, and the window that the file states or llama.cpp assumes."""
    layers, key = file.layers or 0, f"{file.architecture}.attention.sliding_window_pattern"
    window = _window(file)
    if not form.period or form.windowed not in (0, layers):
        return [False] * layers, window
    if window is None and (form.assumed or form.windowed):
        window = ASSUMED_WINDOW
    if not window:
        return [False] * layers, None
    pattern = file.fields.get(key)
    if isinstance(pattern, list):
        if len(pattern) < layers or not all(type(one) is int and one in (0, 1) for one in pattern):
            raise CheckpointError(f"{file.path} gives {key} as {quoted(pattern)}, where one of 0 and 1 for each of {layers} "
                                  "layers is expected; convert or download it again")
        return [bool(one) for one in pattern[:layers]], window
    period = form.period if pattern is None else file.number(key, least=0) or 0
    return [not period or (index + 1) % period != 0 for index in range(layers)], window


def _window(file: GgufFile) -> int | None:
    return file.number(f"{file.architecture}.attention.sliding_window", least=0)


def _head_width(file: GgufFile, form: Gguf) -> int:
    """The width of a head; CheckpointError where keys, values or what is rotated have another one, as no family has."""
    arch, head_dim = file.architecture, file.key_length or 0
    rotated = file.number(f"{arch}.rope.dimension_count")
    others = [(f"{arch}.{key}_swa", usual) for key, usual in (
        ("attention.key_length", head_dim), ("attention.value_length", head_dim), ("rope.dimension_count", rotated))]
    if head_dim != (file.value_length or 0) or (rotated not in (None, head_dim) and not (
            form.partial and rotated is not None and rotated < head_dim and rotated % 2 == 0)):
        raise CheckpointError(f"{file.path} has keys of {head_dim}, values of {file.value_length} and rotates {rotated} "
                              f"numbers of a head; a model of the architecture {arch} has "
                              + ("keys and values alike and rotates at most these" if form.partial else
                                 "the same for all three"))
    if head_dim < 1:
        raise CheckpointError(f"{file.path} has no {arch}.attention.key_length in its header; convert or download it again")
    for key, usual in others:
        if key in file.fields and file.number(key, least=0) != usual:
            raise CheckpointError(f"{file.path} gives {key} as {quoted(file.fields[key])}; only models whose layers are "
                                  "alike are read")
    return head_dim


def _class_of(name: str) -> tuple[dict[str, Any], PreTrainedConfig]:
    """The keys of a family's config with their defaults, and the config that says nothing itself."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    return {key: one.default for key, one in kind.__dataclass_fields__.items()}, kind()


def _within_windows(file: GgufFile, form: Gguf, config: dict[str, Any], apart: bool) -> None:
    """Write how layers with a window rotate positions: in a dictionary `apart`, or like all others."""
    full = config["rope_parameters"]
    base = base_within_windows(file, form, full["rope_theta"])
    if apart:
        config["rope_parameters"] = {"full_attention": full, "sliding_attention": {"rope_type": "default",
                                                                                   "rope_theta": base}}
    elif base != full["rope_theta"]:
        raise CheckpointError(f"{file.path} rotates layers with a window by the base {base:g} and others by "
                              f"{full['rope_theta']:g}; a {config['model_type']} has the same for all: start from the "
                              "model's own checkpoint")


def _scalings(file: GgufFile, family: Family, config: dict[str, Any], head_dim: int) -> None:
    """Write the numbers of the record's keys; where the file has none, what llama.cpp computes with instead."""
    absent = {"attention.scale": head_dim ** -0.5, "attention.temperature_scale": 0.0}
    for key, path in family.gguf.keys.items():
        stated = f"{file.architecture}.{key}" in file.fields
        value: float | None = number_of(file, key) if stated else None
        if value is not None and (value < 0 or (not value and key in family.gguf.required)):
            raise CheckpointError(f"{file.path} gives {file.architecture}.{key} as {value:g}, where a number above 0 is "
                                  "expected; convert or download it again")
        value = value or absent.get(key)
        if value is not None:
            *places, last = path.split(".")
            inner = config
            for place in places:
                inner = inner[place]
            inner[last] = value
    if file.architecture == "granite" and file.fields.get("granite.rope.scaling.finetuned") is False:
        raise CheckpointError(f"{file.path} leaves RoPE out (granite.rope.scaling.finetuned), which a granite here does not "
                              "do; start from the model's own checkpoint")
    if file.fields.get(f"{file.architecture}.attention.causal") is False:
        raise CheckpointError(f"{file.path} attends in both directions ({file.architecture}.attention.causal); only models "
                              "that predict the next token are read")


def _alike(file: GgufFile, name: str, values: Sequence[int]) -> int:
    """A number that every layer must have alike."""
    if not values or not values[0]:
        raise CheckpointError(f"{file.path} has no {file.architecture}.{name} in its header; convert or download it again")
    if len(set(values)) > 1:
        raise CheckpointError(f"{file.path}: layers differ in {name}, from {min(values)} to {max(values)}; only models "
                              "whose layers are alike are read")
    return values[0]
