"""A GGUF file as the source of a checkpoint: tensors stay where they are, config and tokenizer are made from the header."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from tsotsallm.checkpoint import packing
from tsotsallm.checkpoint.families import FAMILIES
from tsotsallm.checkpoint.gguf_config import config_of, require_family
from tsotsallm.checkpoint.gguf_file import GgufFile, GgufTensor
from tsotsallm.checkpoint.gguf_place import open_parts
from tsotsallm.checkpoint.gguf_records import FLOATS, blocks_of, record_of, require_readable, shifted
from tsotsallm.checkpoint.gguf_terms import (
    EMBEDDING_IN_FILE,
    HEAD_IN_FILE,
    LONG_FACTORS,
    NORM_IN_FILE,
    ROPE_FACTORS,
    in_halves,
)
from tsotsallm.checkpoint.gguf_tokenizer import token_files
from tsotsallm.checkpoint.shapes import layer_shapes
from tsotsallm.checkpoint.shards import TensorRecord
from tsotsallm.checkpoint.source import CONFIG, PROVENANCE
from tsotsallm.checkpoint.spec import CONTAINER, EMBEDDING, FINAL_NORM, HEAD, ModelSpec
from tsotsallm.checkpoint.stored import LocalFile, StoredFile, bytes_at
from tsotsallm.errors import CheckpointError
from tsotsallm.files import SIDE_FILE_BYTES, one_line, quoted
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid
from tsotsallm.numerics.grids import Grid

FEW_BITS = 5.0
"""Below this many bits a weight, what a source lost already is worth a warning."""
FACTORS = {ROPE_FACTORS: "llama3", **dict.fromkeys(LONG_FACTORS, "longrope")}
"""Tensor of factors for positions -> the scaling that it belongs to."""
_ENDS = {EMBEDDING_IN_FILE: EMBEDDING, NORM_IN_FILE: FINAL_NORM, HEAD_IN_FILE: HEAD}
_IN_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(\w+)\.(weight|bias)")
_HEADS = ("self_attn.q_proj", "self_attn.k_proj")
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


class GgufSource:
    """A GGUF file, or all parts of a split one.

    Raises CheckpointError where the file is damaged, incomplete or of an architecture that is not known, MissingExtraError
    where its types need the gguf library.
    """

    keeps_types = True

    def __init__(self, path: Path, stored: Callable[[Path], StoredFile] | None = None) -> None:
        self.path, self._remote = path, stored
        parts = open_parts(path, stored)
        self._starts = {part.path: min((one.start for one in part.tensors.values()), default=part.size) for part in parts}
        self._paths = {name: part.path for part in parts for name in part.tensors}
        tensors = {name: one for part in parts for name, one in part.tensors.items()}
        self.file = dataclasses.replace(parts[0], tensors=tensors)
        require_family(self.file)
        self.file.require_language_model()
        self.title = self.file.text("general.name") or path.stem
        self._require_tokens()
        config = config_of(self.file, self.file.tensors, self._rope_factors())
        config["dtype"] = _DTYPES.get(self.file.tensors[EMBEDDING_IN_FILE].type, "float16")
        self.records: dict[str, TensorRecord] = {}
        grids: dict[str, Grid | None] = {}
        for tensor in self.file.tensors.values():
            if tensor.name not in self._known_factors(config["model_type"]):
                self._add(tensor, config, grids)
        if any(grids.values()):
            config["quantization_config"] = packing.quantization_config(grids)
        self._config = {"model_type": CONTAINER, "layer_order": list(range(config["num_hidden_layers"])), "model": config}
        self.spec = ModelSpec.parsed(json.loads(json.dumps(self._config)), path)
        self._require_whole()
        self.lossy, self.notes = "", tuple[str, ...]()
        self._note_losses()

    def _add(self, tensor: GgufTensor, config: dict[str, Any], grids: dict[str, Grid | None]) -> None:
        """Note where a tensor is, by the name that transformers knows it by; `grids` gets the grid of a matrix."""
        where = f"{self.path}: {quoted(tensor.name)}"
        name, order, match = _ENDS.get(tensor.name), None, _IN_LAYER.fullmatch(tensor.name)
        family = FAMILIES[config["model_type"]]
        if match is not None and match[2] in family.modules:
            module = family.modules[match[2]]
            name = f"model.layers.{match[1]}.{module}.{match[3]}"
            if module in _HEADS and family.gguf.pairs:
                kind = "num_attention_heads" if module == _HEADS[0] else "num_key_value_heads"
                rows = config[kind] * (self.file.key_length or 0)
                if tensor.shape[:1] != (rows,) or (self.file.key_length or 0) % 2:     # before memory is taken by a header
                    raise self._misshapen(tensor.name, tensor.shape, (rows, *tensor.shape[1:]))
                order = in_halves(config[kind], self.file.key_length or 0)
        if name is None:
            raise CheckpointError(f"{where} is not part of a {config['model_type']} model; the file was made for other "
                                  "software, or for a variant that is not supported")
        path = self._paths[tensor.name]
        file = None if self._remote is None else self._remote(path)
        if tensor.type in LAYOUTS and len(tensor.shape) == 2:
            module = name.removesuffix(".weight")
            self.records[f"{module}.weight_blocks"] = blocks_of(tensor, path, order, file)
            grids[module] = GgmlGrid(tensor.type)
            return
        if tensor.type not in FLOATS:
            if len(tensor.shape) != 2:
                raise CheckpointError(f"{where} is stored as {tensor.type}, where a row of numbers is expected; convert or "
                                      "download it again")
            require_readable(tensor.type, where)
        self.records[name] = record_of(tensor, path, order, file)
        if family.offset and len(tensor.shape) == 1 and name.endswith("norm.weight"):
            self.records[name] = shifted(self.records[name], family.offset)
        if len(tensor.shape) == 2:
            grids[name.removesuffix(".weight")] = None

    def _require_tokens(self) -> None:
        """Raise CheckpointError unless there is a row of the embeddings for every token."""
        embeddings = self.file.tensors.get(EMBEDDING_IN_FILE)
        if embeddings is None or len(embeddings.shape) != 2:
            raise CheckpointError(f"{self.path} has no matrix {EMBEDDING_IN_FILE}; it is damaged or incomplete: convert or "
                                  "download it again")
        if embeddings.shape[0] != len(self.file.tokens):
            raise CheckpointError(f"{self.path} lists {len(self.file.tokens)} tokens, but its embeddings have "
                                  f"{embeddings.shape[0]} rows; tokenizer and weights do not belong together: convert or "
                                  "download it again")

    def _rope_factors(self) -> dict[str, list[float]]:
        """The factors of frequencies that the file holds, by the names of their tensors."""
        found = {}
        for name in FACTORS.keys() & self.file.tensors.keys():
            tensor = self.file.tensors[name]
            if tensor.type not in FLOATS or len(tensor.shape) != 1 or tensor.elements > 1 << 16:
                raise CheckpointError(f"{self.path}: {name} holds {list(tensor.shape)} of {tensor.type}, where a row of "
                                      "numbers is expected; convert or download it again")
            file = None if self._remote is None else self._remote(self._paths[name])
            found[name] = list(record_of(tensor, self._paths[name], None, file).read().double().tolist())
        return found

    @staticmethod
    def _known_factors(family: str) -> set[str]:
        """Tensors of factors that llama.cpp loads for a family."""
        return {name for name, kind in FACTORS.items() if kind in FAMILIES[family].gguf.ropes}

    def _require_whole(self) -> None:
        """Raise CheckpointError unless every tensor that the header calls for is there, in the right shape."""
        spec = self.spec
        needed = {EMBEDDING_IN_FILE: (spec.vocabulary, spec.hidden), NORM_IN_FILE: (spec.hidden,)}
        if not spec.tied:
            needed[HEAD_IN_FILE] = (spec.vocabulary, spec.hidden)
        for index in range(spec.layers):
            try:
                shapes = layer_shapes(spec, index)
            except Exception as error:  # transformers raises many types for numbers with which no layer can be built
                raise CheckpointError(f"{self.path}: no layer of a {spec.family} can be built from the header "
                                      f"({type(error).__name__}: {one_line(error)}); convert or download it again") from None
            for name, shape in shapes.items():
                module, _, leaf = name.rpartition(".")
                needed[f"blk.{index}.{spec.traits.gguf.name_of(module)}.{leaf}"] = shape
        for name, shape in needed.items():
            tensor = self.file.tensors.get(name)
            if tensor is None:
                raise CheckpointError(f"{self.path} has no tensor {name}, which a model of {spec.layers} layers needs; the "
                                      "file is incomplete: convert or download it again")
            if tensor.shape != shape:
                raise self._misshapen(name, tensor.shape, shape)
        if extra := [name for name in self.file.tensors if name not in needed and
                 name not in self._known_factors(spec.family)]:
            raise CheckpointError(f"{self.path} holds {quoted(extra[0])}, which a {spec.traits.gguf.architecture} of "
                                  f"{spec.layers} layers does not have; header and weights do not belong together")

    def _misshapen(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(f"{self.path}: {name} has shape {list(found)}, the header says {list(expected)}; header and "
                               "weights do not belong together: convert or download it again")

    def _note_losses(self) -> None:
        """Note what the source lost already, where its matrices are not in floating point."""
        matrices = [one for one in self.file.tensors.values() if len(one.shape) == 2]
        types = sorted({one.type for one in matrices if one.type not in FLOATS},
                       key=lambda kind: -sum(one.size for one in matrices if one.type == kind))
        if self.spec.context < (self.file.context or 0):
            self.notes = (f"the context is {self.spec.context} instead of the file's {self.file.context}: beyond it, "
                          "positions are scaled otherwise, or an attention window begins that llama.cpp ignores",)
        if not types:
            return
        bits = 8 * sum(one.size for one in matrices) / sum(one.elements for one in matrices)
        self.lossy = f"{', '.join(types)}, {bits:.2f} bits a weight"
        notes = [f"the source is a GGUF file that was quantised already: {self.lossy}"]
        if bits < FEW_BITS:
            notes[0] += ("; what that lost stays in every result, and losses that are measured against this file do not "
                         "count it: start from the 16-bit checkpoint where you can have it")
        if dense := [kind for kind in types if kind not in LAYOUTS]:
            notes.append(f"weights of the type {', '.join(dense)} have no grid here: they are read as numbers in 16 "
                         "bits, and written so unless a stage quantises them")
        self.notes += tuple(notes)

    # -- files beside the weights -----------------------------------------------------------------------------

    @cached_property
    def _tokens(self) -> dict[str, bytes]:
        return token_files(GgufFile.open(self.file.path, merges=True,
                                         stored=None if self._remote is None else self._remote(self.file.path)))

    @cached_property
    def _made(self) -> dict[str, bytes]:
        made = {CONFIG: json.dumps(self._config, sort_keys=True).encode()}
        if self.file.recipe is not None:        # one of our own files: its history goes on
            made[PROVENANCE] = json.dumps({
                "source": self.file.text("tsotsallm.source") or "", "recipe": self.file.recipe, "choices": [],
                "inputs": None, "ancestry": None, "calibration": None, "measures": {}}).encode()
        return made

    def names(self) -> list[str]:
        """Names of the files that are made from the header."""
        return sorted({**self._made, **self._tokens})

    def read(self, name: str, limit: int = SIDE_FILE_BYTES) -> bytes:
        """A file that is made from the header."""
        found = self._made.get(name)
        if found is None and name.endswith((".json", ".jinja")) and name != PROVENANCE and not name.startswith("vocabulary"):
            found = self._tokens.get(name)
        if found is None:
            raise FileNotFoundError(f"{self.path} has no {name}")
        return found

    def read_json(self, name: str) -> Any:
        """A JSON file that is made from the header."""
        return json.loads(self.read(name))

    def files(self) -> set[Path]:
        """None: everything is in the files of the tensors."""
        return set()

    def stored(self, path: Path) -> StoredFile:
        """What a part is read from."""
        return LocalFile(path) if self._remote is None else self._remote(path)

    def release(self) -> None:
        """Nothing is on disk only because it was read."""

    def header(self, path: Path) -> bytes:
        """What stands before the tensors in a part."""
        return bytes_at(self.stored(path), 0, self._starts[path])
