"""The header of a GGUF file as a Hugging Face config."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np

from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.gguf_terms import HEAD_IN_FILE, ROPE_FACTORS
from tsotsallm.errors import CheckpointError
from tsotsallm.files import quoted

FAMILY_OF = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
"""Architecture of a file -> family; Mistral's files say llama."""
KNOWN_SCALINGS = ((1.0, 4.0, 8192),)
"""Low factor, high factor and first context of the models that Llama 3's scaling came with."""
SAME = 1e-5
"""Relative difference below which two factors in float32 are equal."""


def config_of(file: GgufFile, tensors: Container[str], factors: Sequence[float] | None) -> dict[str, Any]:
    """The config of the model that a header describes, without its type of weights.

    `factors` are those of Llama 3's scaling, where the file has them. Raises CheckpointError for whatever the family does
    not have.
    """
    arch = file.architecture
    if file.experts[0] > 1:
        raise CheckpointError(f"{file.path} has {file.experts[0]} experts in every layer; only dense models are read")
    heads, kv_heads, feed_forward = (_alike(file, name, values) for name, values in (
        ("attention.head_count", file.heads), ("attention.head_count_kv", file.kv_heads),
        ("feed_forward_length", file.feed_forward)))
    head_dim = file.key_length
    rotated = file.number(f"{arch}.rope.dimension_count")
    if head_dim != file.value_length or rotated not in (None, head_dim):
        raise CheckpointError(f"{file.path} has keys of {head_dim}, values of {file.value_length} and rotates {rotated} "
                              f"numbers of a head; a {FAMILY_OF[arch]} has the same for all three")
    config: dict[str, Any] = {
        "model_type": FAMILY_OF[arch], "hidden_act": "silu", "num_hidden_layers": file.layers, "hidden_size": file.hidden,
        "intermediate_size": feed_forward, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "vocab_size": file.vocabulary, "max_position_embeddings": file.context,
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD_IN_FILE not in tensors, "rope_parameters": _rope(file, head_dim or 0, factors)}
    if arch != "qwen3" and head_dim is not None and heads * head_dim == file.hidden:
        del config["head_dim"]                      # what it is by default
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    if (tokenizer := file.tokenizer) is not None:
        config["bos_token_id"], config["eos_token_id"] = tokenizer.bos, tokenizer.eos
    return config


def require_family(file: GgufFile) -> None:
    """Raise CheckpointError for a model of an architecture that is not known."""
    arch = file.architecture
    if arch not in (*FAMILY_OF, "", "clip") and file.text("general.type") in (None, "model") and (
            "adapter.type" not in file.fields):
        raise CheckpointError(f"{file.path}: unknown architecture {quoted(arch)}; supported are {', '.join(FAMILY_OF)} "
                              "(Llama 2 and 3, SmolLM, Mistral, Qwen2, Qwen3)")


def _alike(file: GgufFile, name: str, values: Sequence[int]) -> int:
    """A number that every layer must have alike."""
    if not values or not values[0]:
        raise CheckpointError(f"{file.path} has no {file.architecture}.{name} in its header; convert or download it again")
    if len(set(values)) > 1:
        raise CheckpointError(f"{file.path}: layers differ in {name}, from {min(values)} to {max(values)}; only models "
                              "whose layers are alike are read")
    return values[0]


def _number(file: GgufFile, name: str, default: float | None = None) -> float:
    """A number in float32 as its shortest decimal, which is what the config that the file was made from says."""
    found = file.fields.get(f"{file.architecture}.{name}", default)
    if type(found) not in (int, float):
        raise CheckpointError(f"{file.path} gives {file.architecture}.{name} as {quoted(found)}, where a number is "
                              "expected; convert or download it again")
    return float(str(np.float32(found)))


def _rope(file: GgufFile, head_dim: int, factors: Sequence[float] | None) -> dict[str, Any]:
    """How positions are rotated, in transformers' terms."""
    arch, theta = file.architecture, _number(file, "rope.freq_base", 10000.0)
    if not theta > 0:
        raise CheckpointError(f"{file.path} gives {arch}.rope.freq_base as {theta}, where a number above 0 is expected; "
                              "convert or download it again")
    kind = file.text(f"{arch}.rope.scaling.type") or "none"
    linear = f"{arch}.rope.scale_linear"            # the key of old files
    if kind == "none" and linear in file.fields and _number(file, "rope.scale_linear") != 1:
        return {"rope_type": "linear", "rope_theta": theta, "factor": _number(file, "rope.scale_linear")}
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{file.path} scales its positions by {quoted(kind)}, which is not read; supported are no "
                              "scaling, linear, and Llama 3's")
    factor = _number(file, "rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    if factors is None or all(abs(one - 1) < SAME for one in factors):
        return {"rope_type": "default", "rope_theta": theta} if factor == 1 else {
            "rope_type": "linear", "rope_theta": theta, "factor": factor}
    if factor != 1:
        raise CheckpointError(f"{file.path} scales its positions both linearly and by {ROPE_FACTORS}; no family here has "
                              "both")
    found = llama3_scaling(factors, head_dim, theta)
    if found is None:
        raise CheckpointError(f"{file.path}: the factors in {ROPE_FACTORS} are not those of Llama 3's scaling with any "
                              "parameters; start from the model's own checkpoint")
    return {"rope_type": "llama3", "rope_theta": theta, **found}


def llama3_scaling(factors: Sequence[float], head_dim: int, theta: float) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling that give these factors, (head_dim / 2,); None where none do.

    With x the frequency in turns per token, 1/factor = (1 − s)/F + s, where s = (context·x − low)/(high − low), between 0
    and 1. The same factors follow from context, low and high times any number: low is 1 unless a known model has another.
    """
    known = np.asarray(factors, dtype=np.float64)
    if len(known) != head_dim // 2 or not np.isfinite(known).all() or known.min() < 1 - SAME:
        return None
    turns = theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    most = _rounded(float(known.max()))
    for low, high, context in _candidates(known, turns, most):
        smooth = np.clip((context * turns - low) / (high - low), 0, 1)
        if np.abs(1 / ((1 - smooth) / most + smooth) / known - 1).max() < SAME:
            return {"factor": most, "low_freq_factor": low, "high_freq_factor": high,
                    "original_max_position_embeddings": context}
    return None


def _candidates(known: Any, turns: Any, most: float) -> Iterator[tuple[float, float, int]]:
    """Low, high and context, the likeliest first."""
    yield from KNOWN_SCALINGS
    between = (known > 1 + SAME) & (known < most * (1 - SAME))
    smooth, x = ((1 / known - 1 / most) / (1 - 1 / most))[between], turns[between]
    for share, turn in zip(smooth, x, strict=True):
        yield 1.0, 4.0, max(1, round((3 * share + 1) / turn))
    if len(x) > 1:
        slope, shift = np.polyfit(x, smooth, 1)
        if shift < 0:
            yield 1.0, _rounded(1 - 1 / shift), max(1, round(-slope / shift))
    if not len(x):
        for power in range(4, 24):
            yield 1.0, 4.0, 2 ** power


def _rounded(value: float) -> float:
    """The nearest whole number where it is equal in float32, else the value."""
    return float(round(value)) if abs(value - round(value)) < SAME * value else value
