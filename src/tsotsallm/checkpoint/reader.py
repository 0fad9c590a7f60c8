"""A checkpoint read lazily, from a directory or the hub: a layer, a tensor, some rows, never the model."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsotsallm.checkpoint import adapter, packing
from tsotsallm.checkpoint.shards import Piece, TensorRecord, read_header
from tsotsallm.checkpoint.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec
from tsotsallm.errors import CheckpointError
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.numerics.grids import Grid, IntegerGrid

EMBEDDED = "embedded"
PROVENANCE = "tsotsallm.json"
PACKED = packing.SUFFIXES
KEPT_FILES = re.compile(
    r"(tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"chat_template\.(json|jinja)|generation_config\.json|(LICENSE|LICENCE|NOTICE|USE_POLICY|USAGE).*)", re.IGNORECASE)
STALE = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
VOCABULARY = "vocabulary.json"
CHECKED_BYTES = 32 << 20
PACKED_NAME = re.compile(rf"\.({'|'.join(PACKED)})$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.(.+)$")


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}."


class Checkpoint:
    """Tensors of one checkpoint by name; values are effective weights, whatever form they are stored in."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.spec = ModelSpec.read(directory)
        self.records = _records(directory) | adapter.read_adapter(directory)
        self.kept_tokens: list[int] | None = None
        self.token_files: dict[str, bytes] = {}
        self._check()

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local directory, the name `embedded`, or a hub id (downloaded once)."""
        return cls(locate(source))

    def restricted(self, tokens: Sequence[int], config: dict[str, Any], files: dict[str, bytes]) -> Checkpoint:
        """The same model with only some tokens, by rising old number, under a new config and new tokenizer files."""
        other = copy.copy(self)
        other.spec = ModelSpec(config, self.spec.quantization, self.spec.layer_order)
        other.kept_tokens, other.token_files = list(tokens), files
        for name in ("names_by_layer", "provenance"):
            other.__dict__.pop(name, None)
        return other

    @cached_property
    def tokens_of_original(self) -> list[int] | None:
        """The numbers that this model's tokens had before its vocabulary was cut; None where it never was."""
        path = self.directory / VOCABULARY
        try:
            return [int(old) for old in json.loads(path.read_text("utf-8"))["kept"]] if path.exists() else None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); restore it") from None

    def with_tokens_of(self, other: Checkpoint) -> Checkpoint:
        """This model with only the tokens that another kept of its vocabulary; itself where the other kept all."""
        kept = other.tokens_of_original
        if kept is None or self.spec.vocabulary == other.spec.vocabulary or kept[-1] >= self.spec.vocabulary:
            return self
        return self.restricted(kept, self.spec.config | {"vocab_size": len(kept)}, {})

    # -- tensors ----------------------------------------------------------------------------------------------

    def record(self, name: str) -> TensorRecord:
        try:
            return self.records[name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name}; the checkpoint is incomplete") from None

    def grid_of(self, name: str) -> Grid:
        """The grid of a packed linear, by its full module name."""
        for group in (self.spec.quantization or {}).get("config_groups", {}).values():
            for target in group["targets"]:
                matches = re.match(target[3:], name) if target.startswith("re:") else target in (name, "Linear")
                if matches:
                    return packing.grid_of_scheme(group["weights"])
        raise CheckpointError(f"{self.directory}: {name} is packed but config.json has no scheme for it")

    def tensor(self, name: str) -> Tensor:
        """The effective values of a tensor in float32; NaN and infinity are refused."""
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
        """A linear as it lies packed in its file, by its full module name; None where it is dense."""
        if not self.is_packed(module):
            return None
        return read_packed(self.records, module, self.grid_of(module))

    def is_packed(self, module: str) -> bool:
        """Whether a matrix is stored as codes on a grid, by its full module name."""
        return f"{module}.weight_packed" in self.records or f"{module}.weight_blocks" in self.records

    def beside(self, module: str) -> adapter.LowRank | None:
        """The low-rank correction that lies beside a linear, if any."""
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
        """Rows [first, last) of embeddings or head in float32; NaN and infinity are refused."""
        module = name.removesuffix(".weight")
        stored = self.stored_rows(name, first, last)
        if self.is_packed(module):
            values = packing.unpack({"weight_blocks": stored}, self.grid_of(module)).dequantise()
        else:
            values = stored.float()
        self._require_finite(values, name)
        return values

    def stored_rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of embeddings or head as they are stored, by the numbers that tokens have here."""
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
        """Read a stored tensor piece by piece and raise CheckpointError if it holds NaN or infinity."""
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
            raise CheckpointError(f"{self.directory}: tensor {name} holds NaN or infinity; the checkpoint is damaged, "
                                  "download or convert it again")

    @cached_property
    def names_by_layer(self) -> dict[int, list[str]]:
        """Stored layer -> names of its tensors as stored, without the layer's prefix."""
        names: dict[int, list[str]] = {}
        for name in self.records:
            if match := _LAYER.match(name):
                names.setdefault(int(match[1]), []).append(match[2])
        return names

    def layer_names(self, stored: int) -> list[str]:
        """Names of a stored layer's tensors as a model knows them, without prefix; packed ones by their weight."""
        names = (PACKED_NAME.sub(".weight", name) for name in self.names_by_layer.get(stored, [])
                 if not adapter.is_adapter(name))
        return list(dict.fromkeys(names))

    def layer(self, stored: int) -> dict[str, Tensor]:
        """The effective float32 tensors of one stored layer, by name without prefix."""
        prefix = layer_prefix(stored)
        return {name: self.tensor(prefix + name) for name in self.layer_names(stored)}

    def layer_records(self, stored: int) -> dict[str, TensorRecord]:
        """One stored layer exactly as it lies on disk."""
        prefix = layer_prefix(stored)
        return {name: self.records[prefix + name] for name in self.names_by_layer.get(stored, [])}

    @property
    def head_name(self) -> str:
        return EMBEDDING if self.spec.tied else HEAD

    @property
    def storage(self) -> torch.dtype:
        """The floating-point type that new tensors are stored in: that of the config, or of dense embeddings."""
        if EMBEDDING in self.records:
            return self.records[EMBEDDING].dtype
        found = getattr(torch, str(self.spec.config.get("dtype") or self.spec.config.get("torch_dtype")), None)
        return found if isinstance(found, torch.dtype) else torch.float16

    def end_pieces(self) -> dict[str, Piece]:
        """Everything that is not part of a layer, to be written: as stored, of embeddings and head the kept tokens."""
        found: dict[str, Piece] = dict(self.end_records())
        if self.kept_tokens is not None:
            for name in (EMBEDDING, HEAD):
                for stored in (name, f"{name}_blocks"):
                    if stored in found:
                        found[stored] = self.stored_rows(name, 0, len(self.kept_tokens))
        return found

    def end_records(self) -> dict[str, TensorRecord]:
        """Everything that is not part of a layer, as stored; a tied head is left out."""
        skipped = {HEAD} if self.spec.tied else set()
        return {name: record for name, record in self.records.items()
                if not _LAYER.match(name) and name not in skipped}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(path.stat().st_size for path in {record.path for record in self.records.values()})

    # -- files ------------------------------------------------------------------------------------------------

    @property
    def kept_files(self) -> list[Path]:
        """Tokenizer, generation config, chat template and licence files; those that new ones stand for are left out."""
        stale = {*self.token_files, *(STALE if self.token_files else ())}
        return sorted(path for path in self.directory.iterdir() if path.is_file() and KEPT_FILES.fullmatch(path.name)
                      and path.name not in stale)

    @cached_property
    def provenance(self) -> dict[str, Any] | None:
        """tsotsallm.json of a result of ours, None otherwise."""
        path = self.directory / PROVENANCE
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text("utf-8"))
            if not isinstance(found["recipe"], list):
                raise ValueError("it holds no recipe")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); restore it, or delete it if "
                                  "the weights are not ours") from None
        return dict(found)

    @property
    def is_sparse(self) -> bool:
        """Whether its zeros were made on purpose, by us."""
        provenance = self.provenance
        while provenance is not None:
            if any("sparsity" in stage for stage in provenance["recipe"]):
                return True
            provenance = provenance.get("ancestry")
        return False

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer; CheckpointError when there is none that transformers can load."""
        from transformers import AutoTokenizer

        try:
            with self._token_directory() as directory:
                return AutoTokenizer.from_pretrained(directory, config=self.spec.hf_config, local_files_only=True,
                                                     trust_remote_code=False)
        except Exception as error:  # transformers raises many types here
            raise CheckpointError(f"{self.directory} has no usable tokenizer ({error}); copy tokenizer.json and "
                                  "tokenizer_config.json of the original model into it") from None

    @contextmanager
    def _token_directory(self) -> Iterator[Path]:
        """Where the tokenizer's files lie: in the checkpoint, or for a while with the new ones instead."""
        if not self.token_files:
            yield self.directory
            return
        with tempfile.TemporaryDirectory() as temporary:
            for path in self.kept_files:
                shutil.copyfile(path, Path(temporary) / path.name)
            for name, content in self.token_files.items():
                (Path(temporary) / name).write_bytes(content)
            yield Path(temporary)

    def fingerprint(self) -> dict[str, Any]:
        """Config, and name, length and header of every shard: changes when the checkpoint does, and is quick."""
        import hashlib

        shards = {}
        for path in sorted({record.path for record in self.records.values()}):
            with path.open("rb") as file:
                header = file.read(8 + int.from_bytes(file.read(8), "little"))
                file.seek(-min(65536, path.stat().st_size), 2)
                digest = hashlib.sha256(header + file.read())
            shards[path.name] = {"bytes": path.stat().st_size, "sha256_of_ends": digest.hexdigest()}
        config = hashlib.sha256((self.directory / "config.json").read_bytes()).hexdigest()
        found = {"config_sha256": config, "shards": shards}
        if self.kept_tokens is not None:
            found["tokens_sha256"] = hashlib.sha256(json.dumps(self.kept_tokens).encode()).hexdigest()
        return found

    def _check(self) -> None:
        """Config against tensors: every tensor that the architecture needs is there, in the right shape."""
        from tsotsallm.checkpoint.anatomy import layer_shapes

        spec = self.spec
        try:
            layer_shapes(spec, 0)
        except Exception as error:  # transformers raises many types for a config whose layer cannot be built
            raise CheckpointError(f"{self.directory}: config.json is not a valid {spec.family} config: no layer can be "
                                  f"built from it ({type(error).__name__}: {error})") from None
        wanted = {EMBEDDING: (spec.vocabulary, spec.hidden), FINAL_NORM: (spec.hidden,)}
        if not spec.tied:
            wanted[HEAD] = (spec.vocabulary, spec.hidden)
        for index, stored in enumerate(spec.layer_order):
            wanted |= {layer_prefix(stored) + name: shape for name, shape in layer_shapes(spec, index).items()}
        for name, shape in wanted.items():
            found = self._stored_shape(name)
            if found is None:
                raise CheckpointError(f"{self.directory}: config.json needs tensor {name}, which no shard holds; "
                                      "the checkpoint is incomplete or its config is of another model")
            if found != shape:
                raise CheckpointError(f"{self.directory}: tensor {name} has shape {list(found)}, config.json says "
                                      f"{list(shape)}; config and weights do not belong together")
        known = {layer_prefix(stored) + name for index, stored in enumerate(spec.layer_order)
                 for name in layer_shapes(spec, index)}
        for stored in self.names_by_layer:
            for name in self.layer_names(stored):
                if stored in spec.layer_order and layer_prefix(stored) + name not in known:
                    raise CheckpointError(f"{self.directory}: tensor {layer_prefix(stored)}{name} is not part of a "
                                          f"{spec.family} layer; the checkpoint was made for other software")
        if spec.tied and HEAD in self.records:
            self._require_same_head()
        extra = sorted(set(self.names_by_layer) - set(spec.layer_order))
        if extra:
            raise CheckpointError(f"{self.directory}: shards hold layers {extra} that config.json "
                                  f"({spec.stored_layers} layers) does not know; config and weights do not belong together")

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, however it is stored."""
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
        shape = tuple(int(size) for size in stored.read())
        grid = self.grid_of(module)
        assert isinstance(grid, IntegerGrid)
        packed, scale = self.record(f"{module}.weight_packed"), self.record(f"{module}.weight_scale")
        words = -(-shape[-1] * grid.bits // 32)
        groups = 1 if grid.group is None else shape[-1] // grid.group
        if len(shape) != 2 or packed.shape != (shape[0], words) or scale.shape != (shape[0], groups) or (
                shape[1] % groups) or (not grid.symmetric and f"{module}.weight_zero_point" not in self.records):
            raise CheckpointError(f"{self.directory}: {module} is packed as {list(packed.shape)} with scales "
                                  f"{list(scale.shape)} for shape {list(shape)} at {grid.bits} bits: not the layout of "
                                  "compressed-tensors 0.20 and later; start from the 16-bit checkpoint")
        if f"{module}.weight_g_idx" in self.records:
            raise CheckpointError(f"{self.directory}: {module} has its columns in another order (weight_g_idx), which is "
                                  "not read; start from the 16-bit checkpoint")
        return shape

    def _shape_of_blocks(self, module: str) -> tuple[int, int]:
        blocks, grid = self.records[f"{module}.weight_blocks"], self.grid_of(module)
        if not isinstance(grid, GgmlGrid) or blocks.dtype != torch.uint8 or len(blocks.shape) != 2 or (
                blocks.shape[1] % grid.layout.bytes):
            raise CheckpointError(f"{self.directory}: {module}.weight_blocks holds {list(blocks.shape)} of {blocks.dtype}, "
                                  "which are no blocks of the grid in config.json; compress again")
        return blocks.shape[0], blocks.shape[1] // grid.layout.bytes * grid.layout.block

    def _require_same_head(self) -> None:
        """A head that is stored although the config ties it to the embeddings must equal them."""
        head, embeddings = self.records[HEAD], self.record(EMBEDDING)
        same = head.shape == embeddings.shape
        for first in range(0, head.shape[0] if same else 0, 4096):
            same = same and torch.equal(head.read(first, first + 4096), embeddings.read(first, first + 4096))
        if not same:
            raise CheckpointError(f"{self.directory}: config.json ties the head to the embeddings, but the stored "
                                  f"{HEAD} differs from them; set tie_word_embeddings to false in config.json")


def read_packed(records: dict[str, TensorRecord], module: str, grid: Grid) -> packing.Packed:
    """A packed linear as it lies in its file."""
    return packing.Packed({suffix: records[f"{module}.{suffix}"].read() for suffix in PACKED
                           if f"{module}.{suffix}" in records}, grid)


def _records(directory: Path) -> dict[str, TensorRecord]:
    index_path, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index_path.exists():
        try:
            weight_map: dict[str, str] = json.loads(index_path.read_text("utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
            if not files or not all(isinstance(file, str) for file in files):
                raise ValueError("weight_map does not map names to files")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index_path} cannot be read ({type(error).__name__}: {error})") from None
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"{index_path} names {file!r}, which lies outside the checkpoint; refused")
        headers = {file: read_header(directory / file) for file in files}
        for name, file in weight_map.items():
            if name not in headers[file]:
                raise CheckpointError(f"{index_path} says that {name} is in {file}, but it is not; "
                                      "index and shards do not belong together")
        return _without_caches({name: headers[file][name] for name, file in weight_map.items()})
    if single.exists():
        return _without_caches(read_header(single))
    if not directory.is_dir():
        raise CheckpointError(f"{directory} does not exist")
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled:
        raise CheckpointError(f"{directory} holds pickled weights only ({pickled[0]}), and loading a pickle can run any "
                              "code; convert it to safetensors with transformers' save_pretrained, in a place you trust")
    raise CheckpointError(f"{directory} holds no model.safetensors and no model.safetensors.index.json")


def _without_caches(records: dict[str, TensorRecord]) -> dict[str, TensorRecord]:
    """Leave out the rotary frequencies that checkpoints of Llama 2's time store; they follow from the config."""
    return {name: record for name, record in records.items() if not name.endswith("rotary_emb.inv_freq")}


def locate(source: str | Path) -> Path:
    """The directory of a checkpoint: a local path, the packaged `embedded` model, or a hub id to download."""
    path = Path(source)
    if path.is_dir():
        return path
    if str(source) == EMBEDDED:
        return embedded_directory()
    if path.exists():
        raise CheckpointError(f"{source} is a file; give the directory that holds config.json and the shards")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise CheckpointError(f"{source} does not exist; give a checkpoint's directory, a hub id such as "
                              f"HuggingFaceTB/SmolLM2-135M, or {EMBEDDED!r} for the embedded model")
    return _download(str(source))


def embedded_directory() -> Path:
    """Where the embedded model lies in the installed package."""
    directory = Path(__file__).parents[1] / "lab" / "model"
    if not (directory / "config.json").exists():
        raise CheckpointError("the embedded model is missing from this installation; install the package again")
    return directory


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns,
                                      ignore_patterns=["consolidated*", "original/*"]))
    except GatedRepoError:
        raise CheckpointError(f"{repository} is gated: accept its licence on its hub page, then run `hf auth login`; "
                              "HuggingFaceTB/SmolLM2-1.7B-Instruct is open and similar in size") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{repository} is neither a local directory nor on the hub (or it is private: run "
                              "`hf auth login`)") from None
    except Exception as error:  # the client's transport raises types of its own
        raise CheckpointError(f"{repository} is not a local directory and could not be downloaded "
                              f"({type(error).__name__}); with no connection give a local directory, or "
                              f"{EMBEDDED!r} for the embedded model") from None
