"""The terms in which GGUF and transformers name the same model: tensors outside the layers, the order of rotated rows."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from tsotsallm.checkpoint.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING_IN_FILE, NORM_IN_FILE, HEAD_IN_FILE = "token_embd.weight", "output_norm.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
"""Tensor of a file with LongRoPE -> where a config has its numbers."""


def row_order(spec: ModelSpec, module: str) -> Tensor | None:
    """The order in which the engine expects the rows of queries and keys, halves of a head interleaved; None: as stored."""
    heads = {"self_attn.q_proj": spec.heads, "self_attn.k_proj": spec.kv_heads}.get(module)
    if heads is None or not spec.traits.gguf.pairs:
        return None
    return torch.tensor(_interleaved(heads, spec.head_dim))


@lru_cache(8)
def _interleaved(heads: int, head_dim: int) -> tuple[int, ...]:
    return tuple(torch.arange(heads * head_dim).view(heads, 2, head_dim // 2).transpose(1, 2).flatten().tolist())


@lru_cache(8)
def in_halves(heads: int, head_dim: int) -> tuple[int, ...]:
    """The inverse of the order in which the engine expects rows: where each row of the model is in the file."""
    return tuple(torch.arange(heads * head_dim).view(heads, head_dim // 2, 2).transpose(1, 2).flatten().tolist())


def rope_factors(spec: ModelSpec) -> Tensor:
    """The factors by which Llama 3's scaling divides each frequency, from the transformers library, (head_dim / 2,)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = float((spec.hf_config.rope_parameters or {})["rope_theta"])
    plain = 1.0 / theta ** (torch.arange(0, spec.head_dim, 2).float() / spec.head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](spec.hf_config, torch.device("cpu"))
    factors: Tensor = plain / scaled
    return factors.float()
