"""How the header of a GGUF file rotates positions, in transformers' terms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tsotsallm.checkpoint.families import Gguf
from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.gguf_terms import LONG_FACTORS, ROPE_FACTORS
from tsotsallm.errors import CheckpointError
from tsotsallm.files import quoted

KNOWN_SCALINGS = ((1.0, 4.0, 8192),)
"""Low factor, high factor and first context of the models that Llama 3's scaling came with."""
SAME = 1e-5
"""Relative difference below which two factors in float32 are equal."""
_OLD_BASES = {"rope.global.freq_base": "rope.freq_base", "rope.local.freq_base": "rope.freq_base_swa"}
Factors = Mapping[str, Sequence[float]]
"""Tensor of a file -> the factors of frequencies that it holds."""


def number_of(file: GgufFile, name: str, default: float | None = None) -> float:
    """A number in float32 as its shortest decimal, which is what the config that the file was made from says."""
    found = file.fields.get(f"{file.architecture}.{name}", default)
    if type(found) not in (int, float):
        raise CheckpointError(f"{file.path} gives {file.architecture}.{name} as {quoted(found)}, where a number is "
                              "expected; convert or download it again")
    return float(str(np.float32(found)))


def rope_of_file(file: GgufFile, form: Gguf, head_dim: int, factors: Factors) -> dict[str, Any]:
    """How positions are rotated in layers without a window; CheckpointError for a scaling that the family does not have."""
    arch, theta = file.architecture, number_of(file, "rope.freq_base", 10000.0)
    if not theta > 0:
        raise CheckpointError(f"{file.path} gives {arch}.rope.freq_base as {theta}, where a number above 0 is expected; "
                              "convert or download it again")
    for other, known in _OLD_BASES.items():
        if f"{arch}.{other}" in file.fields and f"{arch}.{known}" not in file.fields:
            raise CheckpointError(f"{file.path} gives {arch}.{other}, as old files of Ollama do, and no {arch}.{known}, "
                                  "which llama.cpp reads; start from a file of llama.cpp's converter")
    rotated = file.number(f"{arch}.rope.dimension_count", most=head_dim) or head_dim
    rope = _scaling(file, theta, rotated, factors)
    if rope["rope_type"] not in form.ropes:
        raise CheckpointError(f"{file.path} scales its positions by {quoted(rope['rope_type'])}, which is not read for the "
                              f"architecture {arch}; known are {', '.join(form.ropes)}: start from the model's own "
                              "checkpoint")
    if form.partial:
        rope["partial_rotary_factor"] = _share(rotated, head_dim)
    return rope


def base_within_windows(file: GgufFile, form: Gguf, theta: float) -> float:
    """RoPE's base in layers with a window."""
    found = number_of(file, "rope.freq_base_swa", form.base or theta)
    if not found > 0:
        raise CheckpointError(f"{file.path} gives {file.architecture}.rope.freq_base_swa as {found}, where a number above 0 "
                              "is expected; convert or download it again")
    return found


def _scaling(file: GgufFile, theta: float, rotated: int, factors: Factors) -> dict[str, Any]:
    """The scaling that a header describes, whatever the family."""
    arch = file.architecture
    kind = file.text(f"{arch}.rope.scaling.type") or "linear"
    old = "rope.scaling.factor" if f"{arch}.rope.scaling.factor" in file.fields else "rope.scale_linear"
    factor = 1.0 if kind == "none" else number_of(file, old, 1.0) or 1.0
    if longs := [name for name in LONG_FACTORS if name in factors]:
        if factor != 1 or ROPE_FACTORS in factors or kind not in ("none", "linear", "longrope"):
            raise _both(file, kind, longs[0])
        return {"rope_type": "longrope", "rope_theta": theta, **_long(file, rotated, factors)}
    if number_of(file, "rope.scaling.attn_factor", 1.0) != 1:
        raise CheckpointError(f"{file.path} multiplies its scores by {arch}.rope.scaling.attn_factor, which is read with "
                              f"{' and '.join(LONG_FACTORS)} only; start from the model's own checkpoint")
    if kind not in ("none", "linear", "yarn"):
        return {"rope_type": kind}
    if kind == "yarn":
        return {"rope_type": "yarn", "rope_theta": theta, "factor": factor, **_yarn(file, factor)}
    found = factors.get(ROPE_FACTORS)
    if found is not None and any(not abs(one - 1) < SAME for one in found):
        if factor != 1:
            raise _both(file, kind, ROPE_FACTORS)
        scaling = llama3_scaling(found, rotated, theta)
        if scaling is None:
            raise CheckpointError(f"{file.path}: the factors in {ROPE_FACTORS} are not those of Llama 3's scaling with any "
                                  "parameters; start from the model's own checkpoint")
        return {"rope_type": "llama3", "rope_theta": theta, **scaling}
    return {"rope_type": "default", "rope_theta": theta} if factor == 1 else {
        "rope_type": "linear", "rope_theta": theta, "factor": factor}


def _both(file: GgufFile, kind: str, name: str) -> CheckpointError:
    told = "linearly" if kind == "linear" else f"by {quoted(kind)}"
    return CheckpointError(f"{file.path} scales its positions both {told} and by {name}; no family here has both: start "
                           "from the model's own checkpoint")


def _yarn(file: GgufFile, factor: float) -> dict[str, Any]:
    """The parameters of YaRN (arXiv:2309.00071); llama.cpp derives the factor of attention by itself."""
    arch, derived = file.architecture, 0.1 * math.log(max(factor, 1.0)) + 1
    for name, known in (("yarn_attn_factor", (1.0, derived)), ("yarn_ext_factor", (1.0, -1.0))):
        found = number_of(file, f"rope.scaling.{name}", 1.0)
        if all(abs(found - one) > SAME for one in known):
            raise CheckpointError(f"{file.path} gives {arch}.rope.scaling.{name} as {found:g}, which llama.cpp does not "
                                  f"compute with for {arch}; start from the model's own checkpoint")
    betas = {key: number_of(file, f"rope.scaling.yarn_{key}", usual) for key, usual in (
        ("beta_fast", 32.0), ("beta_slow", 1.0))}
    for key, found in betas.items():
        if not found > 0:
            raise CheckpointError(f"{file.path} gives {arch}.rope.scaling.yarn_{key} as {found:g}, where a number above 0 "
                                  "is expected; convert or download it again")
    rope: dict[str, Any] = {
        "original_max_position_embeddings": _first_context(file), **betas}
    if multiplier := number_of(file, "rope.scaling.yarn_log_multiplier", 0.0):
        rope |= {"mscale": 1.0, "mscale_all_dim": multiplier}
    return rope


def _long(file: GgufFile, rotated: int, factors: Factors) -> dict[str, Any]:
    """The parameters of LongRoPE (arXiv:2402.13753)."""
    for name in LONG_FACTORS:
        found = factors.get(name)
        if found is None or len(found) != rotated // 2 or not all(math.isfinite(one) and one > 0 for one in found):
            told = "is missing" if found is None else f"does not hold {rotated // 2} numbers above 0"
            raise CheckpointError(f"{file.path}: {name} {told}, which LongRoPE needs; convert or download it again")
    return {**{key: [float(str(np.float32(one))) for one in factors[name]] for name, key in LONG_FACTORS.items()},
            "original_max_position_embeddings": _first_context(file),
            "attention_factor": number_of(file, "rope.scaling.attn_factor", 1.0)}


def _first_context(file: GgufFile) -> int | None:
    """The context before it was scaled."""
    return file.number(f"{file.architecture}.rope.scaling.original_context_length") or file.context


def _share(rotated: int, head_dim: int) -> float:
    """The shortest decimal that makes the numbers that are rotated of a head's width, exactly or rounded down."""
    shares = [round(rotated / head_dim, digits) for digits in range(1, 17)]
    exact = [share for share in shares if head_dim * share == rotated]
    near = [share for share in shares if int(head_dim * share) == rotated]
    return (exact or near or [math.nextafter(rotated / head_dim, 1)])[0]


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
