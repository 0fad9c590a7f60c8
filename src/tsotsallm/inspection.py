"""The anatomy of a checkpoint or a GGUF file: layers, widths, parameters, bytes by part, cache and operations per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsotsallm.checkpoint.adapter import is_adapter
from tsotsallm.checkpoint.gguf_file import GgufFile, GgufTensor
from tsotsallm.checkpoint.gguf_place import open_parts
from tsotsallm.checkpoint.hub_source import hub_files
from tsotsallm.checkpoint.provenance import Provenance
from tsotsallm.checkpoint.reader import PACKED_NAME, Checkpoint
from tsotsallm.checkpoint.shapes import layer_shapes, linear_shapes, work_of
from tsotsallm.checkpoint.source import PROVENANCE
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD, MOST_LAYERS
from tsotsallm.checkpoint.stored import StoredFile
from tsotsallm.errors import CheckpointError
from tsotsallm.files import JsonObject
from tsotsallm.records import Record
from tsotsallm.remote.names import HubName
from tsotsallm.stages.layers import Layers


@dataclass(frozen=True)
class Anatomy(Record):
    """The anatomy of a checkpoint; bytes are those of the stored tensors, and parameters count stored weights once."""

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
    notes: tuple[str, ...] = ()


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to: embeddings, attention, feed-forward, norms, head or adapter."""
    if is_adapter(name):
        return "adapter"
    if name.startswith(EMBEDDING):
        return "embeddings"
    if name.startswith(HEAD):
        return "head"
    if ".self_attn." in name and "norm" not in name:
        return "attention"
    return "feed-forward" if ".mlp." in name else "norms"


@dataclass(frozen=True)
class LayerMap(Record):
    """The layers of the original that a model runs, in order, and the bits per weight of their linears.

    layers  number of layers of the original
    runs    the original's layer behind each layer
    bits    linear -> bits per weight, for each layer
    ends    embeddings or head -> bits per weight
    """

    layers: int
    runs: tuple[int, ...]
    bits: tuple[dict[str, float], ...]
    ends: dict[str, float]


def layer_map(checkpoint: Checkpoint) -> LayerMap:
    """What became of every layer of the first ancestor, as far as the provenance says."""
    provenance = checkpoint.provenance
    runs = _runs(provenance) if provenance is not None else None
    if runs is None or len(runs) != checkpoint.spec.layers:
        runs = list(range(checkpoint.spec.layers))
    first = provenance.generations[-1].measures.source_layers if provenance is not None else None
    layers = max(first or 0, *(layer + 1 for layer in runs))
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


def _runs(provenance: Provenance) -> list[int] | None:
    """Layers of the first ancestor in the order in which a result runs them; None where an older result does not say."""
    parent, count = provenance.ancestry, provenance.measures.source_layers
    if count is not None and not 0 < count <= MOST_LAYERS:
        raise CheckpointError(f"{PROVENANCE} gives its source {count} layers; restore it")
    runs = _runs(parent) if parent is not None else None if count is None else list(range(count))
    chosen = (one.order for one in provenance.choices if one.order is not None and one.stage in ("", "depth"))
    for stage in provenance.recipe if runs is not None else ():
        assert runs is not None
        [(name, fields)] = stage.items()
        if name == "layers":
            runs = [runs[place] for place in Layers.from_fields(fields).resolve(len(runs))]
        elif name == "depth" and fields.get("remove"):
            runs = [runs[place] for place in next(chosen)]
    return runs


@dataclass(frozen=True)
class Round(Record):
    """A round of `depth`: the importance of every candidate by its number as text, and the layers that went.

    whole  by perplexity, that of the model with all its layers; None by other metrics, and in older results
    """

    importance: dict[str, float]
    removed: list[int]
    whole: float | None = None


def importance_in(provenance: Provenance | None) -> dict[str, dict[str, float]]:
    """Metric -> layer -> its importance as `depth` measured it before anything was removed, from a result's provenance."""
    return {metric: {layer: float(value) for layer, value in one.importance.items()}
            for metric, one in _first_rounds(provenance).items()}


def whole_in(provenance: Provenance | None) -> dict[str, float]:
    """Metric -> its value for the model with all its layers, beside `importance_in`; metrics without one are left out."""
    return {metric: float(one.whole) for metric, one in _first_rounds(provenance).items() if one.whole is not None}


def first_by(metric: str, recipe: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the first stage of a recipe is its only `depth` by that metric, and so measures the recipe's source."""
    fields = [stage.get("depth") or {} for stage in recipe]
    asked = [one.get("importance", "perplexity") if one.get("remove") else None for one in fields]
    return asked[:1] == [metric] and asked.count(metric) == 1


def _first_rounds(provenance: Provenance | None) -> dict[str, Round]:
    if provenance is None:
        return {}
    metrics = [str(stage["depth"]["importance"]) for stage in provenance.recipe if stage.get("depth", {}).get("remove")]
    rounds = [rounds[0] for one in provenance.choices if isinstance(rounds := one.reasons.get("rounds"), list) and rounds]
    return {metric: Round.parsed(one) for metric, one in zip(metrics, rounds, strict=False)}


PARTS = ("embeddings", "attention", "feed-forward", "norms", "head", "adapter")


def end_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything outside the layers; packed embeddings and heads by the name and shape of their weight."""
    names = dict.fromkeys(PACKED_NAME.sub(".weight", name) for name in checkpoint.end_records() if not is_adapter(name))
    return {name: checkpoint.shape_of(name) for name in names}


def inspect_checkpoint(checkpoint: Checkpoint) -> Anatomy:
    """The anatomy of a checkpoint, from its headers alone."""
    spec = checkpoint.spec
    parameters, sizes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    kept = checkpoint.end_records()
    for name, record in checkpoint.records.items():
        if name in kept or name.startswith("model.layers."):
            sizes[part_of(name)] += record.size
    for name, shape in end_shapes(checkpoint).items():
        parameters[part_of(name)] += math.prod(shape)
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
        work_of(spec).linear, checkpoint.notes)


# -- GGUF files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileAnatomy(Record):
    """The anatomy of a GGUF file, in the terms of `Anatomy`; None where its header does not say.

    heads, kv_heads, feed_forward  those of the layer that has most; `notes` say where layers differ
    storage                        types of the tensors, the one with most bytes first
    bytes                          those of the tensors; `file_bytes` are those of the file
    tokenizer                      kind, model, pre, tokens, merges, bos and eos (number and text), adds_bos, adds_eos,
                                   chat_template
    made_from                      the header's fields on name, quantisation and origin, and our own recipe
    notes                          why no engine runs the file, and what else the user should know
    """

    path: str
    family: str
    layers: int | None
    hidden: int | None
    feed_forward: int | None
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    vocabulary: int | None
    context: int | None
    tied_embeddings: bool
    storage: str
    bits_per_linear_weight: float
    bits_per_weight: float
    parameters: int
    parameters_by_part: dict[str, int]
    bytes: int
    bytes_by_part: dict[str, int]
    parameters_by_type: dict[str, int]
    bytes_by_type: dict[str, int]
    file_bytes: int
    version: int
    kv_cache_bytes_per_token: int | None
    macs_per_token: int
    tokenizer: JsonObject | None
    made_from: dict[str, object]
    notes: tuple[str, ...]


FROM = {"name": "general.name", "basename": "general.basename", "size": "general.size_label",
        "organisation": "general.organization", "author": "general.author", "licence": "general.license",
        "base model": "general.base_model.0.name",
        "base model's page": "general.base_model.0.repo_url", "quantised by": "general.quantized_by",
        "importance matrix": "quantize.imatrix.file", "text of the importance matrix": "quantize.imatrix.dataset",
        "version of tsotsallm": "tsotsallm.version", "original": "tsotsallm.source"}
"""What a file's header may say about its origin -> the key."""


def part_of_gguf(name: str) -> str:
    """The part of the model that a tensor of a GGUF file belongs to; `other` for tensors that are not known here."""
    if name.endswith((".lora_a", ".lora_b")):
        return "adapter"
    if "norm" in name:
        return "norms"
    if name.startswith(("token_embd.", "token_types.", "position_embd.")):
        return "embeddings"
    if name.startswith("output."):
        return "head"
    _, _, role = name.removeprefix("blk.").partition(".")
    return "attention" if role.startswith("attn_") else "feed-forward" if role.startswith("ffn_") else "other"


def inspect_remote(name: HubName) -> FileAnatomy:
    """The anatomy of a GGUF file on the hub, of which only the header is fetched; raises HubError, CheckpointError."""
    files = hub_files(name)
    return inspect_file(*files) if isinstance(files, tuple) else inspect_file(files)


def inspect_file(path: str | Path, stored: Callable[[Path], StoredFile] | None = None) -> FileAnatomy:
    """The anatomy of a GGUF file, of a split one as a whole where all parts are there, from headers alone.

    `stored` gives what a file that is not on disk is read from. Raises CheckpointError where it cannot be read.
    """
    file = _whole_file(Path(path), stored)
    parameters, sizes = dict.fromkeys((*PARTS, "other"), 0), dict.fromkeys((*PARTS, "other"), 0)
    by_type: dict[str, list[int]] = {}
    for name, tensor in file.tensors.items():
        weights = 0 if name.startswith("rope_") else tensor.elements        # they follow from the config
        parameters[part_of_gguf(name)] += weights
        sizes[part_of_gguf(name)] += tensor.size
        counts = by_type.setdefault(tensor.type, [0, 0])
        counts[0], counts[1] = counts[0] + weights, counts[1] + tensor.size
    if not sizes["other"]:
        del parameters["other"], sizes["other"]
    types = sorted(by_type, key=lambda kind: -by_type[kind][1])
    linears = [tensor for name, tensor in file.tensors.items()
               if len(tensor.shape) > 1 and part_of_gguf(name) in ("attention", "feed-forward")]
    linear_weights = sum(tensor.elements for tensor in linears)
    total = sum(sizes.values())
    cache = file.cache_elements_per_token
    return FileAnatomy(
        str(path), file.architecture, file.layers, file.hidden, max(file.feed_forward, default=None),
        max(file.heads, default=None), max(file.kv_heads, default=None), file.key_length, file.vocabulary, file.context,
        "output.weight" not in file.tensors, ", ".join(types),
        round(8 * (sizes["attention"] + sizes["feed-forward"]) / max(linear_weights, 1), 3),
        round(8 * total / max(file.parameters, 1), 3), file.parameters, parameters, total, sizes,
        {kind: by_type[kind][0] for kind in types}, {kind: by_type[kind][1] for kind in types}, file.size, file.version,
        None if cache is None else 2 * cache, _macs(file, linears), _tokenizer(file), _made_from(file), tuple(_notes(file)))


def _whole_file(path: Path, stored: Callable[[Path], StoredFile] | None) -> GgufFile:
    """A file, or all parts of a split one as if they were one file; the part alone where others are missing."""
    file = GgufFile.open(path, stored=None if stored is None else stored(path))
    if file.split[1] == 1:
        return file
    try:
        parts = open_parts(path, stored)
    except CheckpointError:
        return file
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    whole = {key: value for key, value in parts[0].fields.items() if not key.startswith("split.")}
    return replace(parts[0], tensors=tensors, size=sum(part.size for part in parts), fields=whole)


def _macs(file: GgufFile, linears: list[GgufTensor]) -> int:
    """Multiply-accumulates for each token: the linears, of experts only those in use, and the head."""
    count, used = file.experts
    head = file.tensors.get("output.weight", file.tensors.get("token_embd.weight"))
    return sum(tensor.elements * used // count if "_exps." in tensor.name else tensor.elements for tensor in linears) + (
        0 if head is None else head.elements)


def _tokenizer(file: GgufFile) -> dict[str, object] | None:
    tokenizer = file.tokenizer
    if tokenizer is None:
        return None

    def named(number: int | None) -> dict[str, object] | None:
        return None if number is None else {"number": number, "text": file.tokens[number]}

    return {"kind": tokenizer.kind, "model": tokenizer.model, "pre": tokenizer.pre, "tokens": tokenizer.size,
            "merges": tokenizer.merges, "bos": named(tokenizer.bos), "eos": named(tokenizer.eos),
            "adds_bos": tokenizer.adds_bos, "adds_eos": tokenizer.adds_eos,
            "chat_template": tokenizer.chat_template}


def _made_from(file: GgufFile) -> dict[str, object]:
    said: dict[str, object] = {name: file.text(key) for name, key in FROM.items()}
    return {name: value for name, value in {**said, "quantisation": file.quantisation, "recipe": file.recipe}.items()
            if value is not None}


def _notes(file: GgufFile) -> list[str]:
    notes = []
    try:
        file.require_language_model()
    except CheckpointError as error:
        notes.append(str(error).removeprefix(f"{file.path} "))
    part, parts = file.split
    if parts > 1:
        notes.append(f"part {part} of {parts}: the figures are those of this part alone")
    for name, values in (("heads", file.heads), ("KV heads", file.kv_heads), ("feed-forward widths", file.feed_forward)):
        if len(set(values)) > 1:
            notes.append(f"{name} differ from layer to layer: from {min(values)} to {max(values)}")
    return notes
