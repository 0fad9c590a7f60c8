"""The contents of a GGUF file: header fields with llama.cpp's defaults, its tokenizer, the places of its tensors.

The header is read once, and every size is compared with the file before anything is allocated; tensors are read later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tsotsallm.checkpoint.spec import MOST_LAYERS
from tsotsallm.checkpoint.stored import StoredFile, opened
from tsotsallm.errors import CheckpointError
from tsotsallm.files import one_line, quoted, regular_size
from tsotsallm.units import human_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TYPES = {
    0: ("f32", 1, 4), 1: ("f16", 1, 2), 2: ("q4_0", 32, 18), 3: ("q4_1", 32, 20), 6: ("q5_0", 32, 22), 7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34), 9: ("q8_1", 32, 40), 10: ("q2_k", 256, 84), 11: ("q3_k", 256, 110), 12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176), 14: ("q6_k", 256, 210), 15: ("q8_k", 256, 292), 16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74), 18: ("iq3_xxs", 256, 98), 19: ("iq1_s", 256, 50), 20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110), 22: ("iq2_s", 256, 82), 23: ("iq4_xs", 256, 136), 24: ("i8", 1, 1), 25: ("i16", 1, 2),
    26: ("i32", 1, 4), 27: ("i64", 1, 8), 28: ("f64", 1, 8), 29: ("iq1_m", 256, 56), 30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54), 35: ("tq2_0", 256, 66), 39: ("mxfp4", 32, 17), 40: ("nvfp4", 64, 36), 41: ("q1_0", 128, 18)}
"""Number of a tensor's type -> name, weights of a block, bytes of a block."""
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4", 40: "Q1_0"}
"""general.file_type -> the name of the quantisation."""
KINDS = {"gpt2": "byte-level BPE", "llama": "SentencePiece", "bert": "WordPiece", "t5": "Unigram", "rwkv": "RWKV"}
"""tokenizer.ggml.model -> the usual name of such a tokenizer."""
_SPECIAL = {"llama": (1, 2), "gpt2": (11, 11), "bert": (101, None), "t5": (None, 1)}
"""tokenizer.ggml.model -> the BOS and EOS that llama.cpp uses where the header names none."""
_BOS_BY_PRE = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
               "tekken", "chameleon")
"""tokenizer.ggml.pre of the BPE tokenizers for which llama.cpp adds BOS where the header does not say."""

MOST_HEADER_BYTES = 256 << 20
MOST_STRING_BYTES = 16 << 20
MOST_KEYS, MOST_TENSORS, MOST_ELEMENTS = 1 << 16, 1 << 17, 1 << 21
MOST_NUMBER, LEAST_ALIGNMENT = 2 ** 31 - 1, 32
CHUNK_BYTES = 32 << 20
MERGES = "tokenizer.ggml.merges"
HEADER = "its header"
ALPHA = "adapter.lora.alpha"

_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_FLOAT, _BOOL, _STRING, _ARRAY = 6, 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its type, its shape with rows first, and its bytes [start, start + size) in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def elements(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class GgufTokenizer:
    """How a file splits text into tokens: `bos` and `eos` as llama.cpp uses them, None where there are none."""

    model: str
    pre: str | None
    size: int
    merges: int
    bos: int | None
    eos: int | None
    adds_bos: bool
    adds_eos: bool
    chat_template: bool

    @property
    def kind(self) -> str:
        """The usual name of its algorithm, such as byte-level BPE."""
        return KINDS.get(self.model, self.model)


@dataclass(frozen=True)
class GgufFile:
    """The header of a file: fields by key, the types of the fields, tensors by name.

    Of the texts of merges there is only the number, unless they were asked for.
    """

    path: Path
    version: int
    size: int
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]
    types: dict[str, int] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path, *, merges: bool = False, stored: StoredFile | None = None) -> GgufFile:
        """Read a header, with `merges` their texts as well; raises CheckpointError with the fault.

        `stored` is what it is read from; None: the file at `path`.
        """
        path = Path(path)
        try:
            size = regular_size(path, CheckpointError) if stored is None else stored.size
            with path.open("rb") if stored is None else opened(stored) as file:
                return _Header(file, path, size, merges=merges).read()
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; give a GGUF file, such as `tsotsallm export` writes") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror or one_line(error)})") from None

    # -- the model ----------------------------------------------------------------------------------------------------

    @cached_property
    def architecture(self) -> str:
        """The name of the architecture; empty where the header does not say."""
        return self.text("general.architecture") or ""

    @cached_property
    def layers(self) -> int | None:
        """Number of layers; None where the header does not say."""
        return self.number(f"{self.architecture}.block_count", most=MOST_LAYERS)

    @cached_property
    def hidden(self) -> int | None:
        """Width of the hidden states; None where the header does not say."""
        return self.number(f"{self.architecture}.embedding_length")

    @cached_property
    def context(self) -> int | None:
        """Positions that the model was trained for; None where the header does not say."""
        return self.number(f"{self.architecture}.context_length")

    @cached_property
    def vocabulary(self) -> int | None:
        """Rows of the embeddings, including those of tokens that the tokenizer does not have; None where unknown."""
        embeddings = self.tensors.get("token_embd.weight")
        if embeddings is not None and len(embeddings.shape) == 2:
            return embeddings.shape[0]
        return self.number(f"{self.architecture}.vocab_size") or len(self.tokens) or None

    @cached_property
    def feed_forward(self) -> tuple[int, ...]:
        """Width of every feed-forward layer; empty where the header does not say."""
        return self._per_layer("feed_forward_length") or ()

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of every layer; 0 where the header does not say, as in models without attention."""
        return self._per_layer("attention.head_count") or (0,) * (self.layers or 0)

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """Key and value heads of every layer; by default as many as attention heads."""
        return self._per_layer("attention.head_count_kv") or self.heads

    @cached_property
    def key_length(self) -> int | None:
        """Width of a head's keys; None where the header does not say."""
        return self._head_width("key")

    @cached_property
    def value_length(self) -> int | None:
        """Width of a head's values; None where the header does not say."""
        return self._head_width("value")

    @property
    def cache_elements_per_token(self) -> int | None:
        """Numbers in the key-value cache for each token; None where the header does not say."""
        if self.key_length is None or self.value_length is None:
            return None
        return sum(self.kv_heads) * (self.key_length + self.value_length)

    @cached_property
    def experts(self) -> tuple[int, int]:
        """Experts of a layer, and how many of them a token uses; 1 of 1 in dense models."""
        count = self.number(f"{self.architecture}.expert_count", least=0) or 1
        found = self.fields.get(f"{self.architecture}.expert_used_count")
        used = max(found, default=1) if isinstance(found, list) else found
        return count, used if type(used) is int and 0 < used <= count else count

    @property
    def parameters(self) -> int:
        """Number of weights; factors of RoPE, which follow from the config, do not count."""
        return sum(one.elements for one in self.tensors.values() if not one.name.startswith("rope_"))

    def require_language_model(self) -> None:
        """Raise CheckpointError unless the header has everything that llama.cpp needs to run a language model."""
        part, parts = self.split
        if part > 1:
            raise CheckpointError(f"{self.path} is part {part} of {parts} of a model; give the first part, with the others "
                                  "beside it")
        kind = self.text("general.type") or "model"
        if kind == "adapter" or "adapter.type" in self.fields:
            raise CheckpointError(f"{self.path} is an adapter, which runs beside the model that it was made for; give that "
                                  "model's GGUF file")
        if kind != "model" or self.architecture == "clip":
            what = "the part of a model that sees pictures" if kind == "model" else quoted(kind)
            raise CheckpointError(f"{self.path} is {what}, not a language model; give a language model's GGUF file")
        needed = {"general.architecture": self.architecture, f"{self.architecture}.block_count": self.layers,
                  f"{self.architecture}.embedding_length": self.hidden, f"{self.architecture}.context_length": self.context,
                  "tokenizer.ggml.model": self.text("tokenizer.ggml.model"), "tokenizer.ggml.tokens": self.tokens}
        missing = [key for key, value in needed.items() if not value]
        if missing:
            raise CheckpointError(f"{self.path} has no {missing[0]} in its header, without which no engine runs a language "
                                  "model; convert or download it again")
        for key, value in self.fields.items():
            if isinstance(value, float) and key.startswith(f"{self.architecture}."):
                least = 0.0 if key.endswith(("epsilon", "freq_base")) else -math.inf
                if not math.isfinite(value) or value < least:
                    raise self._strange(key, value, "a finite number" + " from 0 on" * (least == 0))
        if not self.tensors:
            raise CheckpointError(f"{self.path} holds a vocabulary but no weights; give a language model's GGUF file")

    def require_adapter_of(self, model: GgufFile) -> None:
        """Raise CheckpointError unless this is an adapter for `model`.

        llama.cpp aborts where a field of an adapter has a type that it does not expect.
        """
        if self.text("general.type") != "adapter" or self.text("adapter.type") != "lora":
            raise CheckpointError(f"{self.path} is not an adapter of low-rank factors; give the file that `tsotsallm "
                                  "export` wrote beside the model's")
        if self.architecture != model.architecture:
            raise CheckpointError(f"{self.path} is an adapter for {quoted(self.architecture)}, but {model.path} is a model "
                                  f"of {quoted(model.architecture)}; give the adapter that was made for it")
        alpha = self.fields.get(ALPHA)
        if self.types.get(ALPHA) != _FLOAT or not math.isfinite(alpha or 0.0):
            raise self._strange(ALPHA, alpha, "a finite number in 32 bits")

    @property
    def split(self) -> tuple[int, int]:
        """The number of this part and the number of all parts: (1, 1) for a whole model."""
        parts = self.number("split.count", least=0) or 1
        return (self.number("split.no", least=0) or 0) + 1, parts

    # -- its tokenizer and where it comes from ------------------------------------------------------------------------

    @cached_property
    def tokens(self) -> list[str]:
        """The texts of the tokens in the order of their numbers; empty where the file has none."""
        found = self.fields.get("tokenizer.ggml.tokens", [])
        if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
            raise self._strange("tokenizer.ggml.tokens", found, "a list of texts")
        return found

    @cached_property
    def tokenizer(self) -> GgufTokenizer | None:
        """The header's description of the tokenizer, with llama.cpp's defaults; None where it has no tokens."""
        if not self.tokens:
            return None
        model, pre = self.text("tokenizer.ggml.model") or "", self.text("tokenizer.ggml.pre")
        bos, eos = (self._special(name, default) for name, default in
                    zip(("bos", "eos"), _SPECIAL.get(model, (None, None)), strict=True))
        adds_bos = model in ("llama", "bert") or (model == "gpt2" and pre in _BOS_BY_PRE)
        found = self.fields.get(MERGES, 0)
        merges = found if type(found) is int else len(found) if isinstance(found, list) else 0
        return GgufTokenizer(
            model, pre, len(self.tokens), merges, bos, eos,
            bool(self.fields.get("tokenizer.ggml.add_bos_token", adds_bos)) and bos is not None,
            bool(self.fields.get("tokenizer.ggml.add_eos_token", model == "t5")) and eos is not None,
            bool(self.text("tokenizer.chat_template")))

    @cached_property
    def recipe(self) -> list[Any] | None:
        """The stages that made one of our own files; None in others."""
        text = self.text("tsotsallm.recipe")
        if text is None:
            return None
        try:
            stages = json.loads(text)
        except (ValueError, RecursionError):
            stages = None
        if not isinstance(stages, list):
            raise self._strange("tsotsallm.recipe", text, "a recipe in JSON")
        return stages

    @property
    def quantisation(self) -> str | None:
        """The file's own name of its quantisation; None where it has none."""
        number = self.number("general.file_type", least=0)
        return None if number is None else FILE_TYPES.get(number & ~1024, f"type {number}")

    # -- fields -------------------------------------------------------------------------------------------------------

    def text(self, key: str) -> str | None:
        """A field that must be text; None where it is missing, CheckpointError where it is something else."""
        found = self.fields.get(key)
        if found is not None and not isinstance(found, str):
            raise self._strange(key, found, "a text")
        return found

    def number(self, key: str, *, least: int = 1, most: int = MOST_NUMBER) -> int | None:
        """A field that must be a whole number in [least, most]; None where it is missing, else CheckpointError."""
        found = self.fields.get(key)
        if found is not None and not (type(found) is int and least <= found <= most):
            raise self._strange(key, found, f"a number from {least} to {most}")
        return found

    def numbers(self, key: str) -> list[int]:
        """A field that must be a list of whole numbers; empty where it is missing, else CheckpointError."""
        found = self.fields.get(key, [])
        if not isinstance(found, list) or not all(type(one) is int for one in found):
            raise self._strange(key, found, "a list of whole numbers")
        return found

    def _per_layer(self, name: str) -> tuple[int, ...] | None:
        """A number for every layer, from one number or a list; None where it is missing."""
        key, layers = f"{self.architecture}.{name}", self.layers
        found = self.fields.get(key)
        if found is None or layers is None:
            return None
        values = found if isinstance(found, list) else [found] * layers
        if len(values) < layers or not all(type(value) is int and 0 <= value <= MOST_NUMBER for value in values):
            raise self._strange(key, found, f"a number, or one for each of {layers} layers")
        return tuple(values[:layers])

    def _head_width(self, kind: str) -> int | None:
        given = self.number(f"{self.architecture}.attention.{kind}_length", least=0)
        if given is not None or self.hidden is None:
            return given
        heads = next((count for count in self.heads[:1] if count), None)      # llama.cpp divides by the first layer's
        return None if heads is None else self.hidden // heads

    def token_number(self, name: str) -> int | None:
        """The number that the header gives for a special token such as `bos`, whether or not that token exists."""
        return self.number(f"tokenizer.ggml.{name}_token_id", least=0, most=2 ** 32 - 1)

    def _special(self, name: str, default: int | None) -> int | None:
        found = self.token_number(name)
        known = [token for token in (found, default) if token is not None and token < len(self.tokens)]
        return known[0] if known else None

    def _strange(self, key: str, found: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path} gives {key} as {quoted(found)}, where {expected} is expected; convert or "
                               "download it again")

    # -- tensors ------------------------------------------------------------------------------------------------------

    def rows(self, tensor: GgufTensor, most: int | None = None) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the bytes of a tensor's rows, or of the first `most`, as (rows, bytes of a row) of at most 32 MiB."""
        count = math.prod(tensor.shape[:-1])
        width = tensor.size // count if count else 0
        left, step = count if most is None else min(count, most), max(1, CHUNK_BYTES // max(1, width))
        with self.path.open("rb") as file:
            file.seek(tensor.start)
            while left and width:
                data = file.read(min(left, step) * width)
                if len(data) < min(left, step) * width:
                    raise CheckpointError(f"{self.path} became shorter while it was read; copy or download it again")
                yield np.frombuffer(data, np.uint8).reshape(-1, width)
                left -= min(left, step)


def begins_as_gguf(path: Path) -> bool:
    """Whether a path is a regular file that begins like GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class _Header:
    """Reads a header from its beginning; no size in it is trusted before it is compared with the file's."""

    def __init__(self, file: BinaryIO, path: Path, size: int, *, merges: bool = False) -> None:
        self.file, self.path, self.size, self.merges = file, path, size, merges
        self.place = 0

    def read(self) -> GgufFile:
        start = self.file.read(len(MAGIC))
        if start != MAGIC:
            why = "it does not begin with GGUF" if start else "it is empty"
            raise CheckpointError(f"{self.path} is not a GGUF file ({why}); give one such as `tsotsallm export` writes")
        self.place = len(MAGIC)
        version = self.integer(4)
        if version & 0xFFFF == 0:
            raise CheckpointError(f"{self.path} is a GGUF file for big-endian computers, which no engine runs here; "
                                  "download or convert it for little-endian ones")
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path} is a GGUF file of version {version}; versions 2 and 3 are read: "
                                  f"{'convert it again' if version < 2 else 'a newer tsotsallm may read it'}")
        tensors, keys = self.count("tensors", MOST_TENSORS, 24), self.count("keys", MOST_KEYS, 13)
        fields: dict[str, Any] = {}
        types: dict[str, int] = {}
        for _ in range(keys):
            key = self.string("a key")
            if not key or key in fields:
                raise self.damaged(f"names {quoted(key)} twice" if key else "has a key without a name")
            types[key] = self.integer(4)
            fields[key] = self.value(key, types[key])
        file = GgufFile(self.path, version, self.size, fields, {}, types)
        alignment = file.number("general.alignment", most=1 << 20) or 32
        if alignment & (alignment - 1):
            raise self.damaged(f"aligns its tensors to {alignment} bytes, which is not a power of two")
        if alignment < LEAST_ALIGNMENT:
            raise self.damaged(f"aligns its tensors to {alignment} bytes, where llama.cpp needs {LEAST_ALIGNMENT}")
        entries = [self.entry(alignment) for _ in range(tensors)]
        data = -(-self.place // alignment) * alignment
        for name, kind, shape, offset, size in entries:
            if name in file.tensors:
                raise self.damaged(f"names the tensor {quoted(name)} twice")
            file.tensors[name] = GgufTensor(name, kind, shape, data + offset, size)
        self.check_places(file.tensors)
        return file

    def check_places(self, tensors: dict[str, GgufTensor]) -> None:
        """Raise CheckpointError unless all tensors are inside the file and none overlap."""
        end = max((one.start + one.size for one in tensors.values()), default=0)
        if end > self.size:
            raise self.too_short(f"its header describes {quoted(end)}")
        spans = sorted((one.start, one.start + one.size) for one in tensors.values() if one.size)
        if any(before[1] > after[0] for before, after in pairwise(spans)):
            raise self.damaged("has tensors that overlap")

    def entry(self, alignment: int) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, offset and bytes of the next tensor."""
        name = self.string("a tensor's name")
        dimensions = self.integer(4)
        if dimensions > 4:
            raise self.damaged(f"gives the tensor {quoted(name)} {dimensions} dimensions, of which there are at most 4")
        sizes = [self.integer(8) for _ in range(dimensions)]
        number, offset = self.integer(4), self.integer(8)
        if number not in TYPES:
            raise CheckpointError(f"{self.path} stores {quoted(name)} as type {number}, which is not known here: the file "
                                  "is damaged, or too old or too new for this version")
        kind, block, block_bytes = TYPES[number]
        elements = math.prod(sizes)
        if (row := sizes[0] if sizes else 1) % block:
            raise self.damaged(f"stores {quoted(name)} as {kind}, in blocks of {block}, with rows of {row}")
        size = elements // block * block_bytes
        if size > self.size:
            raise self.too_short(f"{quoted(name)} alone has {quoted(size)}")
        if offset % alignment:
            raise self.damaged(f"stores {quoted(name)} at byte {offset}, which is not aligned to {alignment}")
        return name, kind, tuple(reversed(sizes)), offset, size

    def value(self, key: str, kind: int) -> object:
        """The next value, of type number `kind`; of merges only their number."""
        if kind == _STRING:
            return self.string(key)
        if kind in _NUMBERS:
            [number] = self.numbers(key, kind, 1)
            return bool(number) if kind == _BOOL else number
        if kind != _ARRAY:
            raise self.damaged(f"gives {quoted(key)} a type of number {kind}, which GGUF does not have")
        kind, count = self.integer(4), self.integer(8)
        smallest = 8 if kind == _STRING else 1
        if count > min(MOST_ELEMENTS, (self.size - self.place) // smallest):
            raise self.damaged(f"gives {quoted(key)} {count} elements, more than it can hold")
        if kind == _STRING and key == MERGES and not self.merges:
            for _ in range(count):
                self.take(self.integer(8), key)
            return count
        if kind == _STRING:
            return [self.string(key) for _ in range(count)]
        if kind not in _NUMBERS:
            raise self.damaged(f"gives {quoted(key)} elements of type {kind}, which arrays do not have")
        return self.numbers(key, kind, count)

    def numbers(self, key: str, kind: int, count: int) -> list[int | float]:
        dtype = np.dtype(_NUMBERS[kind])
        data = self.take(count * dtype.itemsize, key)
        return list(np.frombuffer(data, dtype).tolist())

    def count(self, what: str, most: int, smallest: int) -> int:
        found = self.integer(8)
        if found > min(most, self.size // smallest):
            raise self.damaged(f"claims to have {found} {what}, more than it can hold")
        return found

    def string(self, what: str) -> str:
        length = self.integer(8)
        if length > MOST_STRING_BYTES:
            raise self.damaged(f"has a text of {length} bytes in {quoted(what)}")
        return self.take(length, what).decode("utf-8", "replace")

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size, HEADER), "little")

    def take(self, size: int, what: str) -> bytes:
        if size > self.size - self.place:
            raise CheckpointError(f"{self.path} ends within {what if what == HEADER else quoted(what)}: it is damaged or "
                                  "cut short; copy or download it again")
        if self.place + size > MOST_HEADER_BYTES:
            raise self.damaged(f"has a header of more than {human_bytes(MOST_HEADER_BYTES)}")
        data = self.file.read(size)
        if len(data) < size:
            raise CheckpointError(f"{self.path} has become shorter while it was read; copy or download it again")
        self.place += size
        return data

    def too_short(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is {self.size} bytes long, but {what}: it is damaged or cut short; copy or "
                               "download it again")

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}; it is damaged: copy or download it again")
