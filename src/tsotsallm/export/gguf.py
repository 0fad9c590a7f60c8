"""A checkpoint as one GGUF file: layer by layer, blocks of ggml's grids copied as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tsotsallm import __version__
from tsotsallm.checkpoint.adapter import LowRank
from tsotsallm.checkpoint.reader import Checkpoint, layer_prefix
from tsotsallm.checkpoint.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec
from tsotsallm.errors import ExportError, MissingExtraError, ResourceError
from tsotsallm.export.vocabulary import Vocabulary, read_vocabulary
from tsotsallm.numerics.ggml import GgmlGrid

Dense = Literal["f32", "f16", "bf16"]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
PAIRED_HALVES = ("llama", "smollm3")
"""Architectures whose engine turns neighbouring numbers by RoPE, not the two halves of a head."""

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}

Array = npt.NDArray[Any]
Tick = Callable[[str, float], None]


@dataclass(frozen=True)
class Exported:
    """A written file, and what its reader should know."""

    path: Path
    bytes: int
    bytes_by_type: dict[str, int]
    notes: tuple[str, ...]
    adapter: Path | None = None

    def plain(self) -> dict[str, Any]:
        return {"path": str(self.path), "bytes": self.bytes, "bytes_by_type": self.bytes_by_type, "notes": list(self.notes),
                "adapter": None if self.adapter is None else str(self.adapter)}


@dataclass(frozen=True)
class _Piece:
    """One tensor of the file: known before it is read."""

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Array]

    @property
    def bytes(self) -> int:
        if self.type in ("f32", "f16", "bf16"):
            return math.prod(self.shape) * (4 if self.type == "f32" else 2)
        return GgmlGrid(self.type).stored_bytes(self.shape[0], self.shape[1])


def export_gguf(checkpoint: Checkpoint, out: Path, *, dense: Dense | None = None, name: str = "",
                tick: Tick = lambda _what, _share: None) -> Exported:
    """Write a checkpoint, ours or another, as GGUF; low-rank corrections go into an adapter file beside it.

    Weights on ggml's grids are copied. All others are written as `dense` (by default f32 where they are stored so,
    else f16); one tensor at a time is in memory. The file gets its name when it is complete.
    """
    gguf = require_gguf()
    spec = checkpoint.spec
    if out.exists():
        raise ExportError(f"{out} exists already; choose another name, or delete it first")
    kind: Dense = dense or ("f32" if checkpoint.storage == torch.float32 else "f16")
    notes: list[str] = []
    vocabulary = read_vocabulary(checkpoint.directory, checkpoint.tokenizer(), spec.vocabulary)
    pieces = list(_pieces(checkpoint, kind))
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(None, ARCHITECTURES[spec.family])
    _describe(writer, checkpoint, name or checkpoint.directory.name, notes)
    _write_vocabulary(writer, vocabulary, checkpoint)
    packed = {module for module in _modules(checkpoint) if checkpoint.is_packed(module)
              and not isinstance(checkpoint.grid_of(module), GgmlGrid)}
    if packed:
        notes.append(f"{len(packed)} linears lie on integer or normal-float grids, which GGUF has no place for: they are "
                     f"written as {kind}; quantize on a grid of ggml, such as gptq:q4_k, for a small file")
    if vocabulary.chat_template is None:
        notes.append("the tokenizer has no chat template: the file completes text, but `chat` needs one")
    _write(writer, gguf, partial, pieces, tick)
    by_type: dict[str, int] = {}
    for piece in pieces:
        by_type[piece.type] = by_type.get(piece.type, 0) + piece.bytes
    try:
        adapter = _export_adapter(checkpoint, out.with_name(f"{out.stem}-adapter.gguf"), gguf, kind, tick)
    except BaseException:
        partial.unlink()                    # without its corrections it is another model
        raise
    partial.replace(out)
    if adapter is not None:
        notes.append(f"the corrections beside the linears are in {adapter.name}: run both together (llama.cpp: --lora)")
    return Exported(out, out.stat().st_size, by_type, tuple(notes), adapter)


def require_gguf() -> Any:
    """The gguf library; MissingExtraError without it."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "writing GGUF files") from None
    return gguf


def _modules(checkpoint: Checkpoint) -> Iterator[str]:
    for stored in sorted(set(checkpoint.spec.layer_order)):
        for name in checkpoint.layer_names(stored):
            yield layer_prefix(stored) + name.removesuffix(".weight")


def _pieces(checkpoint: Checkpoint, dense: Dense) -> Iterator[_Piece]:
    """All tensors of the file, repeated layers written out."""
    spec = checkpoint.spec
    yield _piece(checkpoint, "token_embd.weight", EMBEDDING, dense)
    if (factors := _rope_factors(spec)) is not None:
        yield _Piece("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors.numpy())
    for index, stored in enumerate(spec.layer_order):
        for name in checkpoint.layer_names(stored):
            module, _, leaf = name.rpartition(".")
            yield _piece(checkpoint, f"blk.{index}.{NAMES[module]}.{leaf}", layer_prefix(stored) + name, dense,
                         _row_order(spec, module))
    yield _piece(checkpoint, "output_norm.weight", FINAL_NORM, dense)
    if not spec.tied:
        yield _piece(checkpoint, "output.weight", HEAD, dense)


def _row_order(spec: ModelSpec, module: str) -> Tensor | None:
    """In which order the engine wants the rows of queries and keys: halves of a head interleaved."""
    heads = {"self_attn.q_proj": spec.heads, "self_attn.k_proj": spec.kv_heads}.get(module)
    if heads is None or ARCHITECTURES[spec.family] not in PAIRED_HALVES:
        return None
    return torch.arange(heads * spec.head_dim).view(heads, 2, spec.head_dim // 2).transpose(1, 2).flatten()


def _piece(checkpoint: Checkpoint, name: str, source: str, dense: Dense, rows: Tensor | None = None) -> _Piece:
    module = source.removesuffix(".weight")
    grid = checkpoint.grid_of(module) if source.endswith(".weight") and checkpoint.is_packed(module) else None
    shape = checkpoint.shape_of(source)
    if isinstance(grid, GgmlGrid):
        def blocks() -> Array:
            found = checkpoint.record(f"{module}.weight_blocks").read()
            return (found if rows is None else found[rows]).numpy()
        return _Piece(name, shape, grid.type, blocks)
    kind: Dense = "f32" if len(shape) == 1 else dense

    def values() -> Array:
        found = checkpoint.without_beside([module]).tensor(source)
        return as_dense(found if rows is None else found[rows], kind, name)
    return _Piece(name, shape, kind, values)


def as_dense(values: Tensor, kind: Dense, name: str) -> Array:
    """Values in a type of GGUF; ExportError where 16 bits do not reach."""
    if kind == "bf16":
        return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    found = values.to(torch.float32 if kind == "f32" else torch.float16)
    if not bool(torch.isfinite(found).all()):
        raise ExportError(f"{name} holds {float(values.abs().max()):.3g}, more than f16 can; export with --dense bf16")
    return found.contiguous().numpy()


def _write(writer: Any, gguf: Any, path: Path, pieces: list[_Piece], tick: Tick) -> None:
    """Header, then one tensor after another; nothing is left behind where the disk is too small."""
    for piece in pieces:
        kind = getattr(gguf.GGMLQuantizationType, piece.type.upper())
        writer.add_tensor_info(piece.name, piece.shape, np.dtype(np.float32), piece.bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for number, piece in enumerate(pieces):
            tick(f"writing {piece.name}", number / len(pieces))
            writer.write_tensor_data(piece.read())
        writer.flush()
        writer.close()
    except BaseException as error:
        writer.close()
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ResourceError(f"{path.parent} could not take the file ({error.strerror or error}); it needs "
                                f"{sum(piece.bytes for piece in pieces) >> 20} MiB; free some space, or choose another "
                                "place: nothing half-written is left") from None
        raise


def _describe(writer: Any, checkpoint: Checkpoint, name: str, notes: list[str]) -> None:
    """What llama.cpp must know of the model besides its tensors."""
    spec, config = checkpoint.spec, checkpoint.spec.hf_config
    windows = [window for index in range(spec.layers) if (window := spec.attention_window(index)) is not None]
    context = min([spec.context, *windows])
    if context < spec.context:
        notes.append(f"layers look back over {context} tokens only, which llama.cpp does not know of this architecture: the "
                     f"file's context is {context}, within which both are the same")
    writer.add_name(name)
    writer.add_string("tsotsallm.version", __version__)
    if checkpoint.provenance is not None:
        writer.add_string("tsotsallm.recipe", json.dumps(checkpoint.provenance["recipe"], ensure_ascii=False))
        source = str(checkpoint.provenance["source"])
        writer.add_string("tsotsallm.source", Path(source).name if Path(source).exists() else source)
    writer.add_context_length(context)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.feed_forward)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(spec.vocabulary)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_quantization_version(2)
    rope = _rope(spec)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if spec.family == "smollm3":
        wanted = [int((index + 1) % 4 != 0) for index in range(spec.layers)]
        if list(config.no_rope_layers) != wanted:
            raise ExportError("llama.cpp leaves RoPE out of every fourth layer of smollm3, but this model's layers stand in "
                              "another order; remove layers in groups of four, or run it with transformers")


def _rope(spec: ModelSpec) -> dict[str, Any]:
    rope = {"rope_type": "default", **(spec.hf_config.rope_parameters or {})}
    if rope["rope_type"] not in ("default", "llama3", "linear"):
        raise ExportError(f"the model scales its positions by {rope['rope_type']}, which is not exported; what is: no "
                          "scaling, linear, and Llama 3's")
    return rope


def _rope_factors(spec: ModelSpec) -> Tensor | None:
    """By what Llama 3's scaling divides each frequency, told by the transformers library, (head_dim / 2,)."""
    if _rope(spec)["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(spec)
    plain = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, spec.head_dim, 2).float() / spec.head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](spec.hf_config, torch.device("cpu"))
    factors: Tensor = plain / scaled
    return factors.float()


def _write_vocabulary(writer: Any, vocabulary: Vocabulary, checkpoint: Checkpoint) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for add, token in ((writer.add_bos_token_id, vocabulary.bos), (writer.add_eos_token_id, vocabulary.eos),
                       (writer.add_unk_token_id, vocabulary.unknown), (writer.add_pad_token_id, vocabulary.padding)):
        if token is not None:
            add(token)
    for token in _more_ends(checkpoint, vocabulary):
        writer.add_eot_token_id(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _more_ends(checkpoint: Checkpoint, vocabulary: Vocabulary) -> list[int]:
    """One more token that ends an answer, where the generation config names several."""
    path = checkpoint.directory / "generation_config.json"
    try:
        found = json.loads(path.read_text("utf-8")).get("eos_token_id") if path.exists() else None
    except ValueError:
        return []
    ends = found if isinstance(found, list) else [found]
    return [token for token in ends if isinstance(token, int) and token != vocabulary.eos][:1]


def _export_adapter(checkpoint: Checkpoint, out: Path, gguf: Any, dense: Dense, tick: Tick) -> Path | None:
    """The corrections beside the linears as a GGUF adapter, 8-bit ones in Q8_0; None where there are none."""
    spec = checkpoint.spec
    pieces: list[_Piece] = []
    for index, stored in enumerate(spec.layer_order):
        for name in checkpoint.layer_names(stored):
            module = name.rpartition(".")[0]
            found = checkpoint.beside(layer_prefix(stored) + module) if name.endswith(".weight") else None
            if found is not None:
                pieces += _halves(f"blk.{index}.{NAMES[module]}.weight", found, _row_order(spec, module), dense)
    if not pieces:
        return None
    writer = gguf.GGUFWriter(None, ARCHITECTURES[spec.family])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)       # nothing to scale: the correction is B·A, whatever its rank
    partial = out.with_name(out.name + ".partial")
    _write(writer, gguf, partial, pieces, tick)
    partial.replace(out)
    return out


def _halves(name: str, found: LowRank, rows: Tensor | None, dense: Dense) -> list[_Piece]:
    def order(left: Tensor) -> Tensor:
        return left if rows is None else left[rows]

    if found.coded is None:
        left, right = order(found.left.float()), found.right.float()
        return [_Piece(f"{name}.lora_a", tuple(right.shape), dense, lambda: as_dense(right, dense, name)),
                _Piece(f"{name}.lora_b", tuple(left.shape), dense, lambda: as_dense(left, dense, name))]
    # the scales of B's columns move to A's rows, so that B is its codes
    left_codes, right_codes = (half.codes for half in found.coded)
    scales = found.coded[0].scales.float() * found.coded[1].scales.float()
    ones = torch.ones(left_codes.shape[1], 1)
    return [_coded(f"{name}.lora_a", right_codes, scales), _coded(f"{name}.lora_b", order(left_codes.mT.contiguous()), ones)]


def _coded(name: str, codes: Tensor, scales: Tensor) -> _Piece:
    """8-bit codes with a scale for each row, as Q8_0 where blocks of 32 divide the row, else in f16."""
    from tsotsallm.numerics.ggml import Blocks, encode

    rows, columns = codes.shape
    if columns % 32:
        return _Piece(name, (rows, columns), "f16", lambda: as_dense(codes.float() * scales, "f16", name))
    blocks = Blocks(codes, scales.to(torch.float16).float().expand(rows, columns // 32).contiguous(), None, None, None,
                    GgmlGrid("q8_0"))
    return _Piece(name, (rows, columns), "q8_0", lambda: encode(blocks))
