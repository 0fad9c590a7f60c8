"""The anatomy of a checkpoint: layers, widths, parameters, bytes by part, cache and work per token."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from tsotsallm.checkpoint.adapter import is_adapter
from tsotsallm.checkpoint.anatomy import layer_shapes, linear_shapes, work_of
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD
from tsotsallm.stages.layers import Layers


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


@dataclass(frozen=True)
class LayerMap:
    """Which layers of the original a model runs, in order, and how many bits a weight of each of their linears takes."""

    layers: int
    runs: tuple[int, ...]
    bits: tuple[dict[str, float], ...]
    ends: dict[str, float]

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def layer_map(checkpoint: Checkpoint) -> LayerMap:
    """What became of every layer of the first ancestor, as far as results tell."""
    provenance = checkpoint.provenance
    runs = _runs(provenance) if provenance is not None else None
    if runs is None or len(runs) != checkpoint.spec.layers:
        runs = list(range(checkpoint.spec.layers))
    layers = max(_layers_before(provenance), *(one + 1 for one in runs))
    bits = []
    for index in range(checkpoint.spec.layers):
        sizes: dict[str, int] = {}
        for name, record in checkpoint.layer_records(checkpoint.spec.layer_order[index]).items():
            if not is_adapter(name):
                sizes[name.rpartition(".")[0]] = sizes.get(name.rpartition(".")[0], 0) + record.size
        bits.append({name: 8 * sizes[name] / math.prod(shape)
                     for name, shape in linear_shapes(checkpoint.spec, index).items()})
    ends: dict[str, float] = {}
    for name, record in checkpoint.end_records().items():
        if part_of(name) in ("embeddings", "head"):
            ends[part_of(name)] = ends.get(part_of(name), 0.0) + record.size
    weights = checkpoint.spec.vocabulary * checkpoint.spec.hidden
    return LayerMap(layers, tuple(runs), tuple(bits), {part: 8 * size / weights for part, size in ends.items()})


def _layers_before(provenance: dict[str, Any] | None) -> int:
    found = 0
    while provenance is not None:
        found, provenance = provenance["measures"].get("source_layers", 0), provenance.get("ancestry")
    return int(found)


def _runs(provenance: dict[str, Any]) -> list[int] | None:
    """Layers of the first ancestor in the order that a result runs them; None where an older result does not tell."""
    parent, count = provenance.get("ancestry"), provenance["measures"].get("source_layers")
    runs = _runs(parent) if parent is not None else None if count is None else list(range(count))
    chosen = iter([choice["order"] for choice in provenance["choices"] if "order" in choice])
    for stage in provenance["recipe"] if runs is not None else ():
        assert runs is not None
        [(name, fields)] = stage.items()
        if name == "layers":
            runs = [runs[place] for place in Layers(**fields).resolve(len(runs))]
        elif name == "depth" and fields.get("remove"):
            runs = [runs[place] for place in next(chosen)]
    return runs


def importance_in(provenance: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metric -> layer -> what `depth` measured of it before anything was removed, as a result's provenance tells."""
    metrics = [stage["depth"]["importance"] for stage in provenance.get("recipe", [])
               if stage.get("depth", {}).get("remove")]
    rounds = [choice["rounds"][0] for choice in provenance.get("choices", []) if choice.get("rounds")]
    return {metric: {str(layer): float(value) for layer, value in one["importance"].items()}
            for metric, one in zip(metrics, rounds, strict=False)}


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
