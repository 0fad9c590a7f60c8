"""A checkpoint read lazily from a directory or the hub: a layer, a tensor or some rows, never the whole model."""

from __future__ import annotations

import copy
import glob
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tsotsallm.checkpoint import adapter, packing
from tsotsallm.checkpoint.codec import TextCodec, ends_of
from tsotsallm.checkpoint.gguf_place import gguf_path
from tsotsallm.checkpoint.provenance import Provenance
from tsotsallm.checkpoint.shards import DTYPE_NAMES, Piece, TensorRecord
from tsotsallm.checkpoint.source import CONFIG, MORE_TEMPLATES, PROVENANCE, DirectorySource, Source, digest_of_ends
from tsotsallm.checkpoint.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec
from tsotsallm.checkpoint.weights import SINGLE, files_to_fetch
from tsotsallm.errors import CheckpointError
from tsotsallm.files import TOKENIZER_BYTES, one_line, quoted, regular_size
from tsotsallm.machine import quiet_stderr
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.numerics.grids import Grid, IntegerGrid
from tsotsallm.remote.names import HubName, hub_name
from tsotsallm.remote.repository import on_disk, say_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EMBEDDED = "embedded"
LONGEST_TOKEN = 10_000
"""Limit in characters of an added token, since every text is searched for it."""
PACKED = packing.SUFFIXES
KEPT_FILES = re.compile(
    r"(tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"chat_template\.(json|jinja)|generation_config\.json|(LICENSE|LICENCE|NOTICE|USE_POLICY|USAGE).*)", re.IGNORECASE)
GENERATION = "generation_config.json"
STALE = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
VOCABULARY = "vocabulary.json"
CHECKED_BYTES = 32 << 20
PACKED_NAME = re.compile(rf"\.({'|'.join(PACKED)})$")
OTHER_PACKINGS = {"qweight": "GPTQ or AWQ", "absmax": "bitsandbytes", "SCB": "bitsandbytes", "W_q": "HQQ",
                  "codebooks": "AQLM", "weight_scale_inv": "an FP8 method", "weight_bitmask": "sparse compressed-tensors"}
"""Suffix of the tensors of another method -> that method."""
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)")


def layer_prefix(index: int) -> str:
    """What the names of a stored layer's tensors begin with."""
    return f"model.layers.{index}."


class Checkpoint:
    """The tensors of one checkpoint by name; values are effective weights, whatever form they are stored in.

    `notes` say which files of the directory are not used. Opening raises CheckpointError for a directory that is not a
    whole, sound checkpoint of a known family.
    """

    def __init__(self, directory: Path, source: Source | None = None) -> None:
        self.directory = directory
        self.source = source_at(directory) if source is None else source
        self.spec, self.records, self.notes = self.source.spec, self.source.records, self.source.notes
        self.kept_tokens: list[int] | None = None
        self.token_files: dict[str, bytes] = {}
        self._check()

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local directory, a GGUF file, `ollama:NAME`, the packaged model `embedded`, or a hub id (downloaded once).

        Raises CheckpointError where it cannot be found or read.
        """
        return cls(locate(source))

    @classmethod
    def streamed(cls, source: str | Path) -> Checkpoint:
        """Open a model as `open` does, but one of the hub where it is: tensors come over the network as they are read.

        Raises HubError where the hub does not give it, CheckpointError as `open` does.
        """
        name = hub_name(source)
        if name is None or str(source) == EMBEDDED:
            return cls.open(source)
        from tsotsallm.checkpoint.hub_source import streamed

        found = streamed(name)
        return cls(found) if isinstance(found, Path) else cls(found.path, found)

    def restricted(self, tokens: Sequence[int], config: dict[str, Any], files: dict[str, bytes]) -> Checkpoint:
        """The same model with only the tokens `tokens` (rising old numbers), a new config and new tokenizer files."""
        other = copy.copy(self)
        other.spec = ModelSpec(config, self.spec.quantization, self.spec.layer_order)
        other.kept_tokens, other.token_files = list(tokens), files
        for name in ("names_by_layer", "provenance", "codec"):
            other.__dict__.pop(name, None)
        if not files:
            other.__dict__["codec"] = self.codec        # text keeps the old numbers of tokens
        return other

    @cached_property
    def tokens_of_original(self) -> list[int] | None:
        """The old numbers of this model's tokens where its vocabulary was reduced; None where it never was."""
        path = self.directory / VOCABULARY
        try:
            content = self.source.read_json(VOCABULARY)
        except FileNotFoundError:
            return None
        kept = content.get("kept") if isinstance(content, dict) else None
        if not isinstance(kept, list) or not all(type(old) is int and old >= 0 for old in kept) or (
                len(kept) != self.shape_of(EMBEDDING)[0] or any(low >= high for low, high in pairwise(kept))):
            raise CheckpointError(f"{path} is damaged: it does not hold {self.shape_of(EMBEDDING)[0]} rising numbers of "
                                  "tokens; restore it")
        return kept

    def with_tokens_of(self, other: Checkpoint) -> Checkpoint:
        """This model with only the tokens of its vocabulary that `other` kept; itself where the other kept all."""
        kept = other.tokens_of_original
        if kept is None or self.spec.vocabulary == other.spec.vocabulary or kept[-1] >= self.spec.vocabulary:
            return self
        return self.restricted(kept, self.spec.config | {"vocab_size": len(kept)}, {})

    # -- tensors ----------------------------------------------------------------------------------------------

    def record(self, name: str) -> TensorRecord:
        """The place of a stored tensor; raises CheckpointError where there is none."""
        try:
            return self.records[name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {quoted(name)}; the checkpoint is incomplete") from None

    def grid_of(self, name: str) -> Grid:
        """The grid of a packed linear, by its full module name; raises CheckpointError where the config names none."""
        for group in (self.spec.quantization or {}).get("config_groups", {}).values():
            for target in group["targets"]:
                matches = re.match(target[3:], name) if target.startswith("re:") else target in (name, "Linear")
                if matches:
                    return packing.grid_of_scheme(group["weights"])
        raise CheckpointError(f"{self.directory}: {name} is packed but config.json has no scheme for it")

    def tensor(self, name: str) -> Tensor:
        """The effective float32 values of a tensor, its low-rank correction added; CheckpointError for NaN and infinity."""
        if self.kept_tokens is not None and name in (EMBEDDING, HEAD):
            return self.rows(name, 0, len(self.kept_tokens))
        module = name.removesuffix(".weight")
        packed = self.packed(module)
        values = packed.unpack().dequantise() if packed is not None else self.record(name).read().float()
        correction = adapter.LowRank.read(self.records, module)
        if correction is not None:
            values = correction.added_to(values)
        self._require_finite(values, name)
        return values

    def packed(self, module: str) -> packing.Packed | None:
        """A packed linear as stored, by its full module name; None where it is dense."""
        if not self.is_packed(module):
            return None
        return read_packed(self.records, module, self.grid_of(module))

    def is_packed(self, module: str) -> bool:
        """Whether a matrix is stored as codes on a grid, by its full module name."""
        return f"{module}.weight_packed" in self.records or f"{module}.weight_blocks" in self.records

    def beside(self, module: str) -> adapter.LowRank | None:
        """The low-rank correction that is stored beside a linear, by its full module name; None where there is none."""
        return adapter.LowRank.read(self.records, module)

    def without_beside(self, modules: Iterable[str]) -> Checkpoint:
        """The same checkpoint without the low-rank corrections of some linears, by their full module names."""
        gone = set(modules)
        other = copy.copy(self)
        other.records = {name: record for name, record in self.records.items()
                         if not (adapter.is_adapter(name) and adapter.owner_of(name) in gone)}
        other.__dict__.pop("names_by_layer", None)
        return other

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of embeddings or head, (rows, hidden) float32; CheckpointError for NaN and infinity."""
        module = name.removesuffix(".weight")
        stored = self.stored_rows(name, first, last)
        if self.is_packed(module):
            values = packing.unpack({"weight_blocks": stored}, self.grid_of(module)).dequantise()
        else:
            values = stored.float()
        self._require_finite(values, name)
        return values

    def stored_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of embeddings or head as stored, by the numbers that tokens have here."""
        module = name.removesuffix(".weight")
        record = self.record(f"{module}.weight_blocks" if self.is_packed(module) else name)
        if self.kept_tokens is None or name not in (EMBEDDING, HEAD):
            return record.read(first, last)
        runs: list[list[int]] = []
        for token in self.kept_tokens[first:last]:
            if runs and runs[-1][1] == token:
                runs[-1][1] = token + 1
            else:
                runs.append([token, token + 1])
        return torch.cat([record.read(low, high) for low, high in runs])

    def require_finite(self, name: str) -> None:
        """Read a stored tensor in pieces and raise CheckpointError where it holds NaN or infinity."""
        record = self.record(name)
        if record.dtype.is_floating_point and not record.shape:
            self._require_finite(record.read().float(), name)
        elif record.dtype.is_floating_point:
            step = max(1, CHECKED_BYTES // max(1, record.size // max(1, record.shape[0])))
            rows = record.shape[0] if self.kept_tokens is None or name not in (EMBEDDING, HEAD) else len(self.kept_tokens)
            for first in range(0, rows, step):
                self.rows(name, first, first + step)

    def _require_finite(self, values: Tensor, name: str) -> None:
        # a sum is finite for finite weights (short of overflow) and costs one pass
        if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{self.directory}: tensor {name} holds NaN or infinity; the checkpoint is damaged; "
                                  "download or convert it again")

    @cached_property
    def names_by_layer(self) -> dict[int, list[str]]:
        """Stored layer -> names of its tensors as stored, without the layer's prefix."""
        names: dict[int, list[str]] = {}
        for name in self.records:
            if match := _LAYER.fullmatch(name):
                names.setdefault(int(match[1]), []).append(match[2])
        return names

    def layer_names(self, stored: int) -> list[str]:
        """Names of a stored layer's tensors as a model knows them, without prefix; of packed ones, that of their weight."""
        names = (PACKED_NAME.sub(".weight", name) for name in self.names_by_layer.get(stored, [])
                 if not adapter.is_adapter(name))
        return list(dict.fromkeys(names))

    def layer(self, stored: int) -> dict[str, Tensor]:
        """The effective float32 tensors of one stored layer, by name without prefix."""
        prefix = layer_prefix(stored)
        return {name: self.tensor(prefix + name) for name in self.layer_names(stored)}

    def layer_records(self, stored: int) -> dict[str, TensorRecord]:
        """The tensors of one stored layer exactly as on disk, by name without prefix."""
        prefix = layer_prefix(stored)
        return {name: self.records[prefix + name] for name in self.names_by_layer.get(stored, [])}

    @property
    def head_name(self) -> str:
        """The name of the tensor that serves as head: the embeddings where they are tied."""
        return EMBEDDING if self.spec.tied else HEAD

    @property
    def storage(self) -> torch.dtype:
        """The floating-point type for new tensors: that of dense embeddings, else that of the config, else float16."""
        if EMBEDDING in self.records:
            return self.records[EMBEDDING].dtype
        found = getattr(torch, str(self.spec.config.get("dtype") or self.spec.config.get("torch_dtype")), None)
        return found if isinstance(found, torch.dtype) else torch.float16

    def end_pieces(self) -> dict[str, Piece]:
        """Everything outside the layers, to be written as stored; of embeddings and head only the kept tokens."""
        found: dict[str, Piece] = dict(self.end_records())
        if self.kept_tokens is not None:
            for name in (EMBEDDING, HEAD):
                for stored in (name, f"{name}_blocks"):
                    if stored in found:
                        found[stored] = self.stored_rows(name, 0, len(self.kept_tokens))
        return found

    def end_records(self) -> dict[str, TensorRecord]:
        """Everything outside the layers, as stored; a tied head is left out."""
        skipped = {HEAD} if self.spec.tied else set()
        return {name: record for name, record in self.records.items()
                if not _LAYER.fullmatch(name) and name not in skipped}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(self.source.stored(path).size for path in {record.path for record in self.records.values()})

    # -- files ------------------------------------------------------------------------------------------------

    @property
    def kept_files(self) -> list[str]:
        """Names of tokenizer, generation config, chat templates and licences, except those that new ones replace."""
        stale = {*self.token_files, *(STALE if self.token_files else ())}
        return [name for name in self.source.names() if name not in stale and (
            KEPT_FILES.fullmatch(name) or name.startswith(f"{MORE_TEMPLATES}/"))]

    @cached_property
    def provenance(self) -> Provenance | None:
        """The tsotsallm.json of a result of ours; None elsewhere. Raises CheckpointError where it is damaged."""
        try:
            content = self.source.read_json(PROVENANCE)
        except FileNotFoundError:
            return None
        return Provenance.read(content, str(self.directory / PROVENANCE), CheckpointError,
                               "restore it, or delete it if the weights are not ours")

    @property
    def is_sparse(self) -> bool:
        """Whether the `sparsity` stage made zeros in it, here or in an ancestor."""
        generations = self.provenance.generations if self.provenance is not None else ()
        return any("sparsity" in stage for one in generations for stage in one.recipe)

    @property
    def generation(self) -> Any:
        """The content of generation_config.json; None where there is none."""
        if GENERATION in self.token_files:
            return json.loads(self.token_files[GENERATION])
        try:
            return self.source.read_json(GENERATION)
        except FileNotFoundError:
            return None

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; raises CheckpointError where transformers cannot load one."""
        return self.codec.tokenizer

    @cached_property
    def codec(self) -> TextCodec:
        """Text <-> tokens for this model, with the ends of answers and the chat template."""
        tokenizer = self._load_tokenizer()
        config = self.generation or {}
        ends = ends_of(self.spec.config, config if isinstance(config, dict) else {})
        return TextCodec(tokenizer, self.spec.vocabulary, str(self.directory), ends)

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        try:
            with self._token_directory() as directory, quiet_stderr():
                for path in directory.iterdir() if directory == self.directory else ():
                    if path.name in self.kept_files and (size := regular_size(path, CheckpointError)) > TOKENIZER_BYTES:
                        raise CheckpointError(f"{path.name} has {size} bytes")
                tokenizer = AutoTokenizer.from_pretrained(directory, config=self.spec.hf_config, local_files_only=True,
                                                      trust_remote_code=False)
            _ = tokenizer.all_special_ids           # where a special token is None, transformers recurses for ever
            longest = max((len(str(token)) for token in tokenizer.added_tokens_decoder.values()), default=0)
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:  # transformers raises many types, and panics of Rust are BaseExceptions
            raise CheckpointError(f"{self.directory} has no usable tokenizer ({type(error).__name__}: {one_line(error)}); "
                                  "copy tokenizer.json and tokenizer_config.json of the original model into it") from None
        if longest > LONGEST_TOKEN:
            raise CheckpointError(f"{self.directory} has an added token of {longest} characters, more than the "
                                  f"{LONGEST_TOKEN} that one may have; copy the original model's tokenizer files into it")
        return tokenizer

    @contextmanager
    def _token_directory(self) -> Iterator[Path]:
        """The directory of the tokenizer's files: the checkpoint, or a temporary one where new ones replace some."""
        if not self.token_files and self.directory.is_dir():
            yield self.directory
            return
        with tempfile.TemporaryDirectory() as temporary:
            self.copy_kept_files(Path(temporary))
            yield Path(temporary)

    def copy_kept_files(self, directory: Path) -> None:
        """Copy tokenizer, generation config, chat templates and licences into a directory, new ones instead of old ones."""
        for name in self.kept_files:
            target = directory / name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(self.source.read(name, TOKENIZER_BYTES))
        for name, content in self.token_files.items():
            (directory / name).write_bytes(content)

    def fingerprint(self) -> dict[str, object]:
        """Hashes of the config and of the ends of every shard: quick to compute, and different for another checkpoint."""
        import hashlib

        shards = {path.name: {"bytes": self.source.stored(path).size, "sha256_of_ends": digest_of_ends(self.source, path)}
                  for path in sorted({record.path for record in self.records.values()})}
        config = hashlib.sha256(self.source.read(CONFIG)).hexdigest()
        facts: dict[str, object] = {"config_sha256": config, "shards": shards}
        if self.kept_tokens is not None:
            facts["tokens_sha256"] = hashlib.sha256(json.dumps(self.kept_tokens).encode()).hexdigest()
        return facts

    def _check(self) -> None:
        """Raise CheckpointError unless every tensor that the config calls for is there, with the right shape and type.

        Sizes in the config are compared with the files before anything is allocated by them.
        """
        from tsotsallm.checkpoint.shapes import layer_shapes, require_rotary

        spec = self.spec
        _refuse_other_packing(self.records, self.directory)
        self._require(EMBEDDING, (spec.vocabulary, spec.hidden))
        self._require(FINAL_NORM, (spec.hidden,))
        if not spec.tied:
            self._require(HEAD, (spec.vocabulary, spec.hidden))
        elif HEAD in self.records:
            self._require(HEAD, (spec.vocabulary, spec.hidden))
            self._require_same_head()
        stored = set(spec.layer_order)
        if missing := sorted(stored - self.names_by_layer.keys()):
            raise CheckpointError(f"{self.directory}: config.json needs tensors of layer {missing[0]}, which no shard "
                                  "holds; the checkpoint is incomplete or its config is of another model")
        if extra := sorted(self.names_by_layer.keys() - stored):
            raise CheckpointError(f"{self.directory}: shards hold layers {quoted(extra)} that config.json "
                                  f"({spec.stored_layers} layers) does not have; config and weights do not belong together")
        linears: dict[str, tuple[int, int]] = {}
        for index, layer in enumerate(spec.layer_order):
            prefix = layer_prefix(layer)
            try:
                shapes = layer_shapes(spec, index)
            except Exception as error:  # transformers raises many types for a config whose layer cannot be built
                raise CheckpointError(f"{self.directory}: config.json is not a valid {spec.family} config: no layer can be "
                                      f"built from it ({type(error).__name__}: {one_line(error)})") from None
            for name, shape in shapes.items():
                self._require(prefix + name, shape)
                if len(shape) == 2:
                    linears[(prefix + name).removesuffix(".weight")] = shape[0], shape[1]
            if unknown := [name for name in self.layer_names(layer) if name not in shapes]:
                raise CheckpointError(f"{self.directory}: tensor {quoted(prefix + unknown[0])} is not part of a "
                                      f"{spec.family} layer; the checkpoint was made for other software")
        adapter.require_fitting(self.records, linears, str(self.directory))
        try:
            require_rotary(spec)
        except Exception as error:  # as above
            raise CheckpointError(f"{self.directory}: config.json is not a valid {spec.family} config: "
                                  f"{one_line(error)}") from None

    def _require(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless a tensor is stored in this shape, in floating point or packed."""
        stored = self._stored_shape(name)
        if stored is None:
            random = "; transformers would fill it with random numbers" if name in (EMBEDDING, HEAD) else ""
            raise CheckpointError(f"{self.directory}: config.json needs tensor {name}, which no shard holds{random}; "
                                  "the checkpoint is incomplete or its config is of another model")
        if stored != shape:
            raise CheckpointError(f"{self.directory}: tensor {name} has shape {list(stored)}, config.json says "
                                  f"{list(shape)}; config and weights do not belong together")
        record = self.records.get(name)
        if record is not None and not record.dtype.is_floating_point:
            raise CheckpointError(f"{self.directory}: tensor {name} is stored in {DTYPE_NAMES[record.dtype]}, which is not "
                                  "a type of weights; start from a checkpoint in 16 or 32 bits (BF16, F16, F32)")

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, however it is stored; raises CheckpointError where it is missing."""
        found = self._stored_shape(name)
        if found is None:
            raise CheckpointError(f"{self.directory} has no tensor {name}; the checkpoint is incomplete")
        return found

    def _stored_shape(self, name: str) -> tuple[int, ...] | None:
        if name in self.records:
            return self.records[name].shape
        module = name.removesuffix(".weight")
        if f"{module}.weight_blocks" in self.records:
            return self._shape_of_blocks(module)
        stored = self.records.get(f"{module}.weight_shape")
        if stored is None:
            return None
        if stored.shape != (2,) or stored.dtype not in (torch.int64, torch.int32):
            raise CheckpointError(f"{self.directory}: {module}.weight_shape holds {list(stored.shape)} of "
                                  f"{DTYPE_NAMES[stored.dtype]}, not two numbers; the checkpoint is damaged")
        d_out, d_in = (int(size) for size in stored.read())
        grid = self.grid_of(module)
        packed, scale = self.record(f"{module}.weight_packed"), self.record(f"{module}.weight_scale")
        zeros = self.records.get(f"{module}.weight_zero_point")
        bits, group = (grid.bits, grid.group) if isinstance(grid, IntegerGrid) else (8, None)
        groups = 1 if group is None else d_in // group
        fits = (isinstance(grid, IntegerGrid) and d_out > 0 and groups > 0 and d_in % groups == 0
                and (packed.shape, packed.dtype) == ((d_out, -(-d_in * bits // 32)), torch.int32)
                and scale.shape == (d_out, groups) and scale.dtype.is_floating_point
                and (grid.symmetric or (zeros is not None and (zeros.shape, zeros.dtype) == (
                    (-(-d_out * bits // 32), groups), torch.int32))))
        if not fits:
            raise CheckpointError(f"{self.directory}: {module} is packed as {list(packed.shape)} with scales "
                                  f"{list(scale.shape)} for shape {[d_out, d_in]} at {bits} bits: not the layout of "
                                  "compressed-tensors 0.20 and later; start from the 16-bit checkpoint")
        if f"{module}.weight_g_idx" in self.records:
            raise CheckpointError(f"{self.directory}: {module} has its columns in another order (weight_g_idx), which is "
                                  "not read; start from the 16-bit checkpoint")
        return d_out, d_in

    def _shape_of_blocks(self, module: str) -> tuple[int, int]:
        blocks, grid = self.records[f"{module}.weight_blocks"], self.grid_of(module)
        if not isinstance(grid, GgmlGrid) or blocks.dtype != torch.uint8 or len(blocks.shape) != 2 or (
                blocks.shape[1] % grid.layout.bytes):
            raise CheckpointError(f"{self.directory}: {module}.weight_blocks holds {list(blocks.shape)} of {blocks.dtype}, "
                                  "which are not blocks of the grid in config.json; compress again")
        return blocks.shape[0], blocks.shape[1] // grid.layout.bytes * grid.layout.block

    def _require_same_head(self) -> None:
        """Raise CheckpointError where the config ties the head to the embeddings, but a stored head differs from them."""
        head, embeddings = self.records[HEAD], self.record(EMBEDDING)
        same = head.shape == embeddings.shape
        for first in range(0, head.shape[0] if same else 0, 4096):
            same = same and torch.equal(head.read(first, first + 4096), embeddings.read(first, first + 4096))
        if not same:
            raise CheckpointError(f"{self.directory}: config.json ties the head to the embeddings, but the stored "
                                  f"{HEAD} differs from them; set tie_word_embeddings to false in config.json")


def read_packed(records: dict[str, TensorRecord], module: str, grid: Grid) -> packing.Packed:
    """The stored tensors of a packed linear, by its full module name."""
    return packing.Packed({suffix: records[f"{module}.{suffix}"].read() for suffix in PACKED
                           if f"{module}.{suffix}" in records}, grid)


def _refuse_other_packing(records: Iterable[str], directory: Path) -> None:
    """Raise CheckpointError where another method packed the weights, whatever the config says."""
    for name in records:
        method = OTHER_PACKINGS.get(name.rpartition(".")[2])
        if method is not None:
            raise CheckpointError(f"{directory}: tensor {quoted(name)} is part of a weight that {method} packed, which is "
                                  "not read; start from a checkpoint in 16 or 32 bits (BF16, F16, F32)")


def source_at(path: Path) -> Source:
    """What a checkpoint at a path is read from: a directory, or a GGUF file."""
    if gguf_path(path) is None:
        return DirectorySource(path)
    from tsotsallm.checkpoint.gguf_source import GgufSource

    return GgufSource(path)


def locate(source: str | Path) -> Path:
    """The place of a checkpoint: a local directory, a GGUF file, the packaged `embedded` model, a download from the hub.

    Raises CheckpointError where there is none.
    """
    if (file := gguf_path(source)) is not None:
        return file
    path = Path(source)
    if path.is_dir():
        files = [] if (path / CONFIG).exists() else sorted(one.name for one in path.glob("*.gguf"))
        if files:
            raise CheckpointError(f"{source} holds GGUF files and no {CONFIG}; give one of the files, such as "
                                  f"{path / files[0]}")
        return path
    if str(source) == EMBEDDED:
        return embedded_directory()
    if path.exists():
        raise CheckpointError(f"{source} is a file; give the directory that holds config.json and the shards, or a GGUF "
                              "file")
    name = hub_name(str(source))
    if name is None:
        raise CheckpointError(f"{source} does not exist; give a checkpoint's directory, a hub id such as "
                              f"HuggingFaceTB/SmolLM2-135M, or {EMBEDDED!r} for the embedded model")
    return _download(name)


def embedded_directory() -> Path:
    """The directory of the embedded model in the installed package."""
    directory = Path(__file__).parents[1] / "lab" / "model"
    if not (directory / "config.json").exists():
        raise CheckpointError("the embedded model is missing from this installation; install the package again")
    return directory


def _download(name: HubName) -> Path:
    repository = name.repository
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if on_disk(name, CONFIG) is None:
        say_whole(name)
    patterns = [SINGLE, f"{adapter.FOLDER}/{adapter.WEIGHTS}", f"{MORE_TEMPLATES}/*.jinja", "*.json", "*.model", "*.jinja",
                "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*"]
    try:
        while True:                     # the config or an index names the files that are still missing
            directory = Path(snapshot_download(repository, allow_patterns=patterns,
                                               ignore_patterns=["consolidated*", "original/*"],
                                               **({"revision": name.revision} if name.revision else {})))
            wanted = [glob.escape(name) for name in files_to_fetch(directory)]
            if not set(wanted) - set(patterns):
                return directory
            patterns = wanted
    except CheckpointError:
        raise
    except GatedRepoError:
        raise CheckpointError(f"{repository} is gated: accept its licence on its hub page, then run `hf auth login`; "
                              "HuggingFaceTB/SmolLM2-1.7B-Instruct is open and similar in size") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{repository} is neither a local directory nor on the hub (or it is private: run "
                              "`hf auth login`)") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name} has no such revision; give a branch, a tag or a commit of it after @, or leave it "
                              "out") from None
    except LocalEntryNotFoundError:     # no connection, or none allowed, and nothing was downloaded before
        raise CheckpointError(f"{repository} is not a local directory and was not downloaded before, and the hub cannot be "
                              "reached; connect to the internet, or give a local directory, a GGUF file, or "
                              f"{EMBEDDED!r} for the embedded model") from None
    except Exception as error:  # the client's transport raises types of its own
        raise CheckpointError(f"{repository} is not a local directory and could not be downloaded "
                              f"({type(error).__name__}); with no connection give a local directory, or "
                              f"{EMBEDDED!r} for the embedded model") from None
