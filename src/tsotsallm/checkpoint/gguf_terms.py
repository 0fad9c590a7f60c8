"""The terms in which GGUF and transformers name the same model: architectures, tensors, the order of rotated rows."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from tsotsallm.checkpoint.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
"""Family -> the architecture of its files."""
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
"""Module of a layer -> its name in a file."""
EMBEDDING_IN_FILE, NORM_IN_FILE, HEAD_IN_FILE = "token_embd.weight", "output_norm.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
PAIRED_HALVES = ("llama", "smollm3")
"""Architectures whose engine applies RoPE to neighbouring numbers, not to the two halves of a head."""


def row_order(spec: ModelSpec, module: str) -> Tensor | None:
    """The order in which the engine expects the rows of queries and keys, halves of a head interleaved; None: as stored."""
    heads = {"self_attn.q_proj": spec.heads, "self_attn.k_proj": spec.kv_heads}.get(module)
    if heads is None or ARCHITECTURES[spec.family] not in PAIRED_HALVES:
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
