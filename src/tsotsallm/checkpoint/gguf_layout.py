"""What a GGUF file of a model holds, as plain data: its keys, its tensors, and how many bytes it takes, to the byte.

Whoever needs to know how large a file will be, and whoever writes it, work from the same description.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tsotsallm.checkpoint.codec import INFILL_ENDS, NAMED_ENDS
from tsotsallm.checkpoint.families import Gguf
from tsotsallm.checkpoint.gguf_file import MAGIC, TYPES
from tsotsallm.checkpoint.gguf_terms import (
    EMBEDDING_IN_FILE,
    HEAD_IN_FILE,
    LONG_FACTORS,
    NORM_IN_FILE,
    ROPE_FACTORS,
)
from tsotsallm.checkpoint.gguf_vocabulary import Vocabulary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import layer_shapes, one_layer_model
from tsotsallm.checkpoint.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec
from tsotsallm.checkpoint.textrules import COMPOSED, LEADING_SPACE, PREFIX
from tsotsallm.errors import ExportError
from tsotsallm.version import __version__

Dense = Literal["f32", "f16", "bf16"]
Kind = Literal["u32", "i32", "f32", "bool", "string"]

_VERSION, _ALIGNMENT = 3, 32
_KINDS = {"u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"), "string": (8, "")}
_ARRAY = 9
_BLOCKS = {name: (number, weights, size) for number, (name, weights, size) in TYPES.items()}


def aligned(size: int) -> int:
    """Bytes that data of a size takes in a file, where every tensor begins at a multiple of 32."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Entry:
    """One key of the header and its value, or its values, all of one kind."""

    key: str
    kind: Kind
    value: str | float | Sequence[str] | Sequence[float]

    @cached_property
    def encoded(self) -> bytes:
        """The entry as it stands in the file."""
        number, form = _KINDS[self.kind]
        if isinstance(self.value, str) or not isinstance(self.value, Sequence):
            return _text(self.key) + struct.pack("<I", number) + _encoded([self.value], form)
        head = struct.pack("<IIQ", _ARRAY, number, len(self.value))
        return _text(self.key) + head + _encoded(self.value, form)


def _text(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _encoded(values: Sequence[Any], form: str) -> bytes:
    return struct.pack(f"<{len(values)}{form}", *values) if form else b"".join(map(_text, values))


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file: its name, its shape with rows first, its type."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        _, weights, size = _BLOCKS[self.type]
        return math.prod(self.shape) // weights * size


@dataclass(frozen=True)
class Layout:
    """A file before it is written."""

    entries: tuple[Entry, ...]
    tensors: tuple[TensorInfo, ...]

    @property
    def head(self) -> bytes:
        """All that stands before the tensors' data."""
        found = b"".join(self._parts())
        return found.ljust(aligned(len(found)), b"\0")

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole file."""
        return self.bytes_beside_matrices + sum(aligned(one.bytes) for one in self.tensors if len(one.shape) > 1)

    @property
    def bytes_beside_matrices(self) -> int:
        """Bytes of the file without its matrices: header, vocabulary, norms and biases."""
        return aligned(sum(map(len, self._parts()))) + sum(aligned(one.bytes) for one in self.tensors if len(one.shape) == 1)

    def _parts(self) -> Iterator[bytes]:
        yield struct.pack("<4sIQQ", MAGIC, _VERSION, len(self.tensors), len(self.entries))
        yield from (entry.encoded for entry in self.entries)
        start = 0
        for one in self.tensors:
            sizes = one.shape[::-1]
            yield _text(one.name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, _BLOCKS[one.type][0], start)
            start += aligned(one.bytes)


@dataclass(frozen=True)
class Labels:
    """What a file says of where it comes from: its name and, of results of ours, the recipe and the source."""

    name: str
    recipe: Sequence[Mapping[str, Any]] | None = None
    source: str = ""

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> Labels:
        """What the file of a checkpoint says, under a name."""
        found = checkpoint.provenance
        return cls(name) if found is None else cls(name, found.recipe, found.source)

    def entries(self) -> Iterator[Entry]:
        """The keys of the header."""
        yield Entry("general.name", "string", self.name)
        yield Entry("tsotsallm.version", "string", __version__)
        if self.recipe is not None:
            yield Entry("tsotsallm.recipe", "string", json.dumps(self.recipe, ensure_ascii=False))
            yield Entry("tsotsallm.source", "string", Path(self.source).name if Path(self.source).exists() else self.source)


UNKNOWN_LABELS = Labels(" " * 4096, [])
"""Stands for labels of at most 4 KiB that are not known yet: those of a file are the result's name and its whole recipe."""


def layout_of(spec: ModelSpec, vocabulary: Iterable[Entry], labels: Labels, grids: Mapping[str, str] | None = None,
              dense: Dense = "f16") -> Layout:
    """The file of a model, written or not yet: matrices on `grids` (keys such as `3.mlp.up_proj`, `lm_head`), others dense.

    Raises ExportError where llama.cpp has no such model.
    """
    known = grids or {}
    ends = {EMBEDDING: (spec.vocabulary, spec.hidden), HEAD: (spec.vocabulary, spec.hidden), FINAL_NORM: (spec.hidden,),
            **dict.fromkeys((ROPE_FACTORS, *LONG_FACTORS), (spec.rotated // 2,))}
    tensors = []
    for slot in slots(spec, lambda index: layer_shapes(spec, index)):
        shape = ends[slot.source] if slot.layer is None else layer_shapes(spec, slot.layer)[slot.source]
        tensors.append(TensorInfo(slot.name, shape, "f32" if len(shape) == 1 else known.get(slot.key, dense)))
    return Layout((*model_entries(spec, labels), *vocabulary), tuple(tensors))


@dataclass(frozen=True)
class Slot:
    """A tensor's name in the file, and where it stands in the model: in a layer that runs, or None, under a name."""

    name: str
    layer: int | None
    source: str

    @property
    def key(self) -> str:
        """The matrix as recipes and decisions name it."""
        module = self.source.removesuffix(".weight")
        return module if self.layer is None else f"{self.layer}.{module}"


def slots(spec: ModelSpec, names: Callable[[int], Iterable[str]]) -> Iterator[Slot]:
    """All tensors in the order of the file; `names` gives those of a layer that runs, repeated layers written out."""
    yield Slot(EMBEDDING_IN_FILE, None, EMBEDDING)
    for name in {"llama3": (ROPE_FACTORS,), "longrope": LONG_FACTORS}.get(rope_of(spec)["rope_type"], ()):
        yield Slot(name, None, name)
    for index in range(spec.layers):
        for name in names(index):
            module, _, leaf = name.rpartition(".")
            yield Slot(f"blk.{index}.{spec.traits.gguf.name_of(module)}.{leaf}", index, name)
    yield Slot(NORM_IN_FILE, None, FINAL_NORM)
    if not spec.tied:
        yield Slot(HEAD_IN_FILE, None, HEAD)


def model_entries(spec: ModelSpec, labels: Labels) -> Iterator[Entry]:
    """The keys that say what llama.cpp must know about the model besides its tensors and its vocabulary.

    Raises ExportError where it would compute something else.
    """
    config, rope, form = spec.hf_config, rope_of(spec), spec.traits.gguf
    arch = form.architecture
    yield Entry("general.architecture", "string", arch)
    yield from labels.entries()
    for key, value in (("context_length", exported_context(spec)), ("embedding_length", spec.hidden),
                       ("block_count", spec.layers), ("feed_forward_length", spec.feed_forward),
                       ("attention.head_count", spec.heads), ("attention.head_count_kv", spec.kv_heads),
                       ("attention.key_length", spec.head_dim), ("attention.value_length", spec.head_dim)):
        yield Entry(f"{arch}.{key}", "u32", value)
    yield Entry(f"{arch}.attention.layer_norm_rms_epsilon", "f32", config.rms_norm_eps)
    yield Entry(f"{arch}.vocab_size", "u32", spec.vocabulary)
    yield Entry(f"{arch}.rope.dimension_count", "u32", spec.rotated)
    yield Entry("general.quantization_version", "u32", 2)
    yield Entry(f"{arch}.rope.freq_base", "f32", float(rope["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        yield Entry(f"{arch}.rope.scaling.type", "string", rope["rope_type"])
        yield Entry(f"{arch}.rope.scaling.factor", "f32", float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        yield from _yarn_entries(form, rope)
    if rope["rope_type"] == "longrope":
        yield Entry(f"{arch}.rope.scaling.original_context_length", "u32", int(rope["original_max_position_embeddings"]))
        scaling = one_layer_model(spec, 0).rotary_emb.attention_scaling
        yield Entry(f"{arch}.rope.scaling.attn_factor", "f32", float(scaling))
    for key, path in form.keys.items():
        found = _configured(config, path)
        if found is not None:
            yield Entry(f"{arch}.{key}", "f32", float(found))
        elif key in form.required:
            raise ExportError(f"{path} is null, but llama.cpp always computes {spec.family} with one; run this model with "
                              "transformers")
    yield from _window_entries(spec)
    if form.unrotated and list(config.no_rope_layers) != [int((index + 1) % form.unrotated != 0)
                                                          for index in range(spec.layers)]:
        raise ExportError(f"llama.cpp leaves RoPE out of every {form.unrotated}th layer of {spec.family}, but this model's "
                          f"layers are in another order; remove layers in groups of {form.unrotated}, or run it with "
                          "transformers")
    if form.per_head:
        scalar = spec.hidden // spec.heads if spec.layers == form.per_head else spec.head_dim
        if config.query_pre_attn_scalar != scalar:
            raise ExportError(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, but llama.cpp computes a "
                              f"{spec.family} of {spec.layers} layers with {scalar}; run this model with transformers")


def _configured(config: Any, path: str) -> Any:
    """The value of a config under a dotted path."""
    first, *inner = path.split(".")
    found = getattr(config, first)
    for key in inner:
        found = (found or {}).get(key)
    return found


def _yarn_entries(form: Gguf, rope: Mapping[str, Any]) -> Iterator[Entry]:
    """The keys of YaRN (arXiv:2309.00071), whose factor of attention llama.cpp derives by itself."""
    known = rope.get("attention_factor") in (None, 0.1 * math.log(rope["factor"]) + 1)
    multiplied = rope.get("mscale"), rope.get("mscale_all_dim")
    if not known or rope.get("truncate", True) is not True or (any(multiplied) and multiplied[0] != 1):
        raise ExportError("the model scales its positions by yarn with attention_factor, truncate or mscale of its own, "
                          "which llama.cpp does not compute; run this model with transformers")
    arch, betas = form.architecture, (float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1))
    if not form.betas and betas != (32, 1):
        raise ExportError(f"the model scales its positions by yarn with beta_fast {betas[0]:g} and beta_slow {betas[1]:g}, "
                          f"but llama.cpp computes {arch} with 32 and 1; run this model with transformers")
    yield Entry(f"{arch}.rope.scaling.original_context_length", "u32", int(rope["original_max_position_embeddings"]))
    yield Entry(f"{arch}.rope.scaling.yarn_beta_fast", "f32", betas[0])
    yield Entry(f"{arch}.rope.scaling.yarn_beta_slow", "f32", betas[1])
    if all(multiplied):
        yield Entry(f"{arch}.rope.scaling.yarn_log_multiplier", "f32", float(multiplied[1] or 0))


def _window_entries(spec: ModelSpec) -> Iterator[Entry]:
    """The keys of layers with an attention window; ExportError where llama.cpp would rotate or mask others."""
    form, windows = spec.traits.gguf, attention_windows(spec)
    known = knows_windows(spec)
    some = any(window is not None for window in windows)
    full, sliding = (spec.ropes.get(kind) for kind in ("full_attention", "sliding_attention"))
    if form.period and not known and ((some and full != sliding) or (form.windowed and (
            some or spec.layers == form.windowed))):
        raise ExportError(f"llama.cpp takes every layer of {spec.family} but each {form.period}th for one with a window"
                          f"{f', in models of {form.windowed} layers' if form.windowed else ''}, and rotates these "
                          f"otherwise; this model has others: remove layers in groups of {form.period}, or run it with "
                          "transformers")
    if form.period and (some or form.assumed):
        window = min([spec.context, *(one for one in windows if one is not None)])
        yield Entry(f"{form.architecture}.attention.sliding_window", "u32", window)
    if form.period and some and sliding is not None:
        if sliding.get("rope_type", "default") != "default":
            raise ExportError(f"layers with a window scale their positions by {sliding['rope_type']}, which is not "
                              "exported; run this model with transformers")
        yield Entry(f"{form.architecture}.rope.freq_base_swa", "f32", float(sliding["rope_theta"]))


def attention_windows(spec: ModelSpec) -> list[int | None]:
    """How many tokens each layer attends to; None: all."""
    kinds: dict[str, int | None] = {}
    return [kinds.setdefault(spec.signature(index), spec.attention_window(index)) for index in range(spec.layers)]


def knows_windows(spec: ModelSpec) -> bool:
    """Whether llama.cpp gives an attention window to the same layers as the model."""
    form = spec.traits.gguf
    return bool(form.period) and form.windowed in (0, spec.layers) and all(
        (window is not None) == ((index + 1) % form.period != 0) for index, window in enumerate(attention_windows(spec)))


def exported_context(spec: ModelSpec) -> int:
    """Positions that a file may state: within these, layers with a window that llama.cpp does not know attend to all."""
    if knows_windows(spec):
        return spec.context
    return min([spec.context, *(window for window in attention_windows(spec) if window is not None)])


def rope_of(spec: ModelSpec) -> dict[str, Any]:
    """How positions are rotated in layers without a window; raises ExportError for a scaling that is not exported."""
    ropes, form = spec.ropes, spec.traits.gguf
    rope = {"rope_type": "default", **ropes.get("full_attention", next(iter(ropes.values())))}
    if rope["rope_type"] == "dynamic" and rope.get("alpha") and "dynamic" in form.ropes:    # Hunyuan's: another base
        exponent = spec.head_dim / (spec.head_dim - 2)
        return {"rope_type": "default", "rope_theta": rope["rope_theta"] * rope["alpha"] ** exponent}
    if rope["rope_type"] not in form.ropes or rope["rope_type"] == "dynamic":
        raise ExportError(f"the model scales its positions by {rope['rope_type']}, which is not exported for {spec.family}; "
                          f"supported are {', '.join(form.ropes)}")
    return rope


def vocabulary_entries(vocabulary: Vocabulary) -> Iterator[Entry]:
    """The keys that say how text becomes tokens."""
    def entry(key: str, kind: Kind, value: Any) -> Entry:
        return Entry(f"tokenizer.ggml.{key}", kind, value)

    yield entry("model", "string", vocabulary.model)
    yield entry("pre", "string", vocabulary.pre)
    yield entry("tokens", "string", vocabulary.tokens)
    yield entry("token_type", "i32", vocabulary.types)
    if vocabulary.scores is not None:
        yield entry("scores", "f32", vocabulary.scores)
    if vocabulary.merges is not None:
        yield entry("merges", "string", vocabulary.merges)
    for name, token in (("bos", vocabulary.bos), ("unknown", vocabulary.unknown), ("padding", vocabulary.padding)):
        if token is not None:
            yield entry(f"{name}_token_id", "u32", token)
    for name, token in _end_keys(vocabulary).items():
        yield entry(f"{name}_token_id", "u32", token)
    yield entry("add_bos_token", "bool", vocabulary.add_bos)
    yield entry("add_eos_token", "bool", False)
    if vocabulary.model == "llama":
        yield entry("add_space_prefix", "bool", vocabulary.add_space_prefix)
    if vocabulary.prefix is not None:
        yield Entry(PREFIX, "i32", vocabulary.prefix)
    if vocabulary.leading_space:
        yield Entry(LEADING_SPACE, "string", vocabulary.leading_space)
    if vocabulary.composed:
        yield Entry(COMPOSED, "bool", True)
    if vocabulary.chat_template is not None:
        yield Entry("tokenizer.chat_template", "string", vocabulary.chat_template)


def _end_keys(vocabulary: Vocabulary) -> dict[str, int]:
    """Key -> token for everything that ends an answer: EOS, end of turn, end of message, and three tokens of infilling.

    Engines end at all of these. Tokens that llama.cpp knows by their names need no key. Raises ExportError where there are
    more tokens than keys.
    """
    first, *more = vocabulary.ends
    keys = {"eos": first}
    waiting = [token for token in more if vocabulary.tokens[token] not in NAMED_ENDS]
    for key, names in (("fim_pad", "pad"), ("fim_rep", "repository"), ("fim_sep", "separator")):
        own = next((token for token in waiting if vocabulary.tokens[token] in INFILL_ENDS[names]), None)
        if own is not None:
            keys[key] = own
            waiting.remove(own)
    free = [key for key in ("eot", "eom", "fim_pad", "fim_rep", "fim_sep") if key not in keys]
    if len(waiting) > len(free):
        raise ExportError(f"{len(vocabulary.ends)} tokens end an answer of this model, more than the "
                          f"{len(keys) + len(free)} for which GGUF has keys; name fewer under eos_token_id in "
                          "generation_config.json")
    return keys | dict(zip(free, waiting, strict=False))
