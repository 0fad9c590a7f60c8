"""The anatomy of a checkpoint: layers, widths, parameters, bytes by part, cache and work per token."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from tsotsallm.checkpoint.adapter import is_adapter
from tsotsallm.checkpoint.anatomy import layer_shapes, linear_shapes, work_of
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD


@dataclass(frozen=True)
class Anatomy:
    """Bytes are those of the stored tensors; parameters count stored weights once, packed or not."""

    path: str
    family: str
    layers: int
    stored_layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied_embeddings: bool
    storage: str
    bits_per_linear_weight: float
    parameters: int
    parameters_by_part: dict[str, int]
    bytes: int
    bytes_by_part: dict[str, int]
    kv_cache_bytes_per_token: int
    macs_per_token: int

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def part_of(name: str) -> str:
    """embeddings, attention, feed-forward, norms, head or adapter: the part of the model that a tensor belongs to."""
    if is_adapter(name):
        return "adapter"
    if name.startswith(EMBEDDING):
        return "embeddings"
    if name.startswith(HEAD):
        return "head"
    if ".self_attn." in name and "_norm" not in name:
        return "attention"
    return "feed-forward" if ".mlp." in name else "norms"


PARTS = ("embeddings", "attention", "feed-forward", "norms", "head", "adapter")


def inspect_checkpoint(checkpoint: Checkpoint) -> Anatomy:
    """Measure a checkpoint from its headers alone."""
    spec = checkpoint.spec
    parameters, sizes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    kept = checkpoint.end_records()
    for name, record in checkpoint.records.items():
        if name in kept or name.startswith("model.layers."):
            sizes[part_of(name)] += record.size
    for name, record in kept.items():
        parameters[part_of(name)] += math.prod(record.shape)
    for stored in sorted(set(spec.layer_order)):
        for name, shape in layer_shapes(spec, spec.layer_order.index(stored)).items():
            parameters[part_of(f"model.layers.0.{name}")] += math.prod(shape)
    parameters["adapter"] = sum(math.prod(record.shape) for name, record in checkpoint.records.items() if is_adapter(name))
    linear_count = sum(math.prod(shape) for stored in sorted(set(spec.layer_order))
                       for shape in linear_shapes(spec, spec.layer_order.index(stored)).values())
    linear_bytes = sizes["attention"] + sizes["feed-forward"]
    return Anatomy(
        str(checkpoint.directory), spec.family, spec.layers, spec.stored_layers, spec.hidden, spec.feed_forward,
        spec.heads, spec.kv_heads, spec.head_dim, spec.vocabulary, spec.context, spec.tied,
        str(checkpoint.storage).removeprefix("torch."), round(8 * linear_bytes / linear_count, 3),
        sum(parameters.values()), parameters, sum(sizes.values()), sizes, spec.kv_bytes_per_token(),
        work_of(spec).linear)
