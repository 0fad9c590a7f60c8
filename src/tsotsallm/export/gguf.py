"""A checkpoint as one GGUF file, written tensor by tensor; blocks of ggml's grids are copied unchanged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tsotsallm.checkpoint.adapter import LowRank, is_adapter
from tsotsallm.checkpoint.codec import INFILL_ENDS, NAMED_ENDS
from tsotsallm.checkpoint.packing import unpack_rows
from tsotsallm.checkpoint.reader import Checkpoint, layer_prefix
from tsotsallm.checkpoint.spec import EMBEDDING, FINAL_NORM, HEAD, ModelSpec
from tsotsallm.checkpoint.textrules import COMPOSED, LEADING_SPACE, PREFIX
from tsotsallm.errors import ExportError, MissingExtraError, ResourceError
from tsotsallm.export.blocks import Packing, blocks_of, held, not_held, packing_of
from tsotsallm.export.vocabulary import Vocabulary, read_vocabulary
from tsotsallm.files import quoted
from tsotsallm.numerics.ggml import Blocks, GgmlGrid, encode
from tsotsallm.numerics.grids import IntegerGrid, Quantised
from tsotsallm.units import human_bytes
from tsotsallm.version import __version__

if TYPE_CHECKING:
    from types import ModuleType

    from gguf import GGUFWriter

Dense = Literal["f32", "f16", "bf16"]
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "smollm3": "smollm3"}
PAIRED_HALVES = ("llama", "smollm3")
"""Architectures whose engine applies RoPE to neighbouring numbers, not to the two halves of a head."""

_ATTENTION = frozenset(f"self_attn.{one}_proj" for one in "qkvo")
_INPUTS = _ATTENTION - {"self_attn.o_proj"}
BIASES = {"llama": _ATTENTION | {f"mlp.{one}_proj" for one in ("gate", "up", "down")}, "qwen2": _INPUTS,
          "qwen3": frozenset[str](),
          "smollm3": frozenset[str]()}
"""Architecture -> linears whose biases llama.cpp loads."""

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}

Array = npt.NDArray[Any]
Tick = Callable[[str, float], None]


@dataclass(frozen=True)
class Exported:
    """A written file, and notes for the user.

    bytes_by_type  type of GGUF -> bytes of its tensors
    adapter        the file with the low-rank corrections, if any
    verified       the result of `check`
    """

    path: Path
    bytes: int
    bytes_by_type: dict[str, int]
    notes: tuple[str, ...]
    adapter: Path | None = None
    verified: Any = None

    def plain(self) -> dict[str, object]:
        """The fields as JSON, without the result of the check."""
        return {"path": str(self.path), "bytes": self.bytes, "bytes_by_type": self.bytes_by_type, "notes": list(self.notes),
                "adapter": None if self.adapter is None else str(self.adapter)}


@dataclass(frozen=True)
class Written:
    """A complete file under its temporary name, for a check.

    adapter      the file with the low-rank corrections, if any
    context      positions that the file states
    types        types of GGUF of its matrices
    differences  texts that are known to be split differently
    """

    path: Path
    adapter: Path | None
    context: int
    types: frozenset[str]
    differences: tuple[str, ...]


Check = Callable[[Written], object]


@dataclass(frozen=True)
class _Piece:
    """One tensor of the file, described before it is read; `packing` says how GGUF holds a matrix on an integer grid."""

    name: str
    shape: tuple[int, ...]
    type: str
    read: Callable[[], Array]
    packing: Packing | None = None

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        if self.type in ("f32", "f16", "bf16"):
            return math.prod(self.shape) * (4 if self.type == "f32" else 2)
        return GgmlGrid(self.type).stored_bytes(self.shape[0], self.shape[1])


def export_gguf(checkpoint: Checkpoint, out: Path, *, dense: Dense | None = None, name: str = "",
                accept_differences: bool = True, check: Check | None = None,
                tick: Tick = lambda _what, _share: None) -> Exported:
    """Write a checkpoint, ours or another, as GGUF; low-rank corrections go into an adapter file beside it.

    Weights on ggml's grids are copied, those on integer grids packed where a type of GGUF can hold them. All others are
    written as `dense` (by default f32 where they are stored so, else f16); without `dense`, a file that would therefore be
    larger than the checkpoint is refused. One tensor at a time is in memory. The file gets its name once it is complete
    and `check`, which receives it under a temporary name in the same folder, has raised nothing.

    Where GGUF cannot express how the tokenizer treats some texts, a note says so, or without `accept_differences` the
    export is refused. Raises ExportError for a model that cannot be exported, ResourceError where the disk is full.
    """
    gguf = require_gguf()
    spec = checkpoint.spec
    if out.exists():
        raise ExportError(f"{out} exists already; choose another name, or delete it first")
    kind: Dense = dense or ("f32" if checkpoint.storage == torch.float32 else "f16")
    notes: list[str] = []
    _require_known(checkpoint)
    vocabulary = read_vocabulary(checkpoint.codec)
    if vocabulary.differences:
        listed = "; ".join(vocabulary.differences)
        if not accept_differences:
            raise ExportError(f"GGUF cannot express how this tokenizer treats {listed}; engines would split such text "
                              "differently: export with --accept-differences if that does not matter (`tsotsallm` itself "
                              "treats beginnings of texts correctly)")
        notes.append(f"other engines split some text differently from the checkpoint's tokenizer: {listed}")
    notes += vocabulary.notes
    pieces = list(_pieces(checkpoint, kind))
    partial = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(None, ARCHITECTURES[spec.family])
    _describe(writer, checkpoint, name or checkpoint.directory.name, notes)
    _write_vocabulary(writer, vocabulary)
    notes += _packing_notes(checkpoint, pieces, out, kind, refuse=dense is None)
    if vocabulary.chat_template is None:
        notes.append("the tokenizer has no chat template: the file completes text, but `chat` needs one")
    by_type: dict[str, int] = {}
    for piece in pieces:
        by_type[piece.type] = by_type.get(piece.type, 0) + piece.bytes
    final = out.with_name(f"{out.stem}-adapter.gguf")
    if final.exists() and _has_corrections(checkpoint):
        raise ExportError(f"{final} exists already; choose another name, or delete it first")
    partial_adapter: Path | None = final.with_name(final.name + ".partial")
    try:
        _write(writer, gguf, partial, pieces, tick)
        partial_adapter = _export_adapter(checkpoint, final.with_name(final.name + ".partial"), gguf, kind, tick)
        verified = None if check is None else check(Written(
            partial, partial_adapter, exported_context(spec), frozenset(piece.type for piece in pieces
                                                                        if len(piece.shape) > 1),
            vocabulary.differences))
        if partial_adapter is not None:
            partial_adapter.replace(final)
        partial.replace(out)
    except BaseException:                   # Ctrl-C included: no half-written file stays
        for path in (partial, final.with_name(final.name + ".partial")):
            path.unlink(missing_ok=True)
        raise
    if partial_adapter is not None:
        notes.append(f"the corrections beside the linears are in {final.name}: run both together (llama.cpp: --lora)")
    return Exported(out, out.stat().st_size, by_type, tuple(notes), None if partial_adapter is None else final, verified)


def require_gguf() -> ModuleType:
    """The module gguf; raises MissingExtraError without it."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "gguf", "writing GGUF files") from None
    module: ModuleType = gguf
    return module


def _pieces(checkpoint: Checkpoint, dense: Dense) -> Iterator[_Piece]:
    """Yield all tensors of the file, repeated layers written out."""
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
    """The order in which the engine expects the rows of queries and keys, halves of a head interleaved; None: as stored."""
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
            stored = checkpoint.record(f"{module}.weight_blocks").read()
            return (stored if rows is None else stored[rows]).numpy()
        return _Piece(name, shape, grid.type, blocks)
    packing = None if grid is None else packing_of(grid, shape[1], *_scales(checkpoint, module, grid))
    if packing is not None and (target := packing.grid) is not None:
        def packed() -> Array:
            stored = blocks_of(_quantised(checkpoint, module), target)
            return encode(stored if rows is None else stored.rows_at(rows))
        return _Piece(name, shape, target.type, packed, packing)
    kind: Dense = "f32" if len(shape) == 1 else dense

    def values() -> Array:
        stored = checkpoint.without_beside([module]).tensor(source)
        return as_dense(stored if rows is None else stored[rows], kind, name)
    return _Piece(name, shape, kind, values, packing)


def _scales(checkpoint: Checkpoint, module: str, grid: IntegerGrid) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of a packed linear, (d_out, groups)."""
    scales = checkpoint.record(f"{module}.weight_scale").read()
    if grid.symmetric:
        return scales, None
    return scales, unpack_rows(checkpoint.record(f"{module}.weight_zero_point").read().mT, grid.bits, len(scales)).mT


def _quantised(checkpoint: Checkpoint, module: str) -> Quantised:
    packed = checkpoint.packed(module)
    assert packed is not None
    found = packed.unpack()
    assert isinstance(found, Quantised)
    return found


def _packing_notes(checkpoint: Checkpoint, pieces: list[_Piece], out: Path, dense: Dense, *, refuse: bool) -> list[str]:
    """Notes on linears on integer grids; raises ExportError where the file would be larger than the checkpoint."""
    packings = [piece.packing for piece in pieces if piece.packing is not None]
    notes = held(packings, checkpoint.storage)
    if why := not_held(packings):
        size = sum(piece.bytes for piece in pieces)
        stored = sum(record.size for name, record in checkpoint.records.items() if not is_adapter(name))
        if refuse and size > stored:
            raise ExportError(f"{why}: written as {dense} they make {out.name} {human_bytes(size)} large, beside "
                              f"{human_bytes(stored)} of the checkpoint; quantise on a grid of GGUF, such as gptq:q4_k, or "
                              f"accept the larger file with `tsotsallm export --dense {dense}`")
        notes.append(f"{why}: they are written as {dense}; quantise on a grid of GGUF, such as gptq:q4_k, for a small file")
    return notes


def as_dense(values: Tensor, kind: Dense, name: str) -> Array:
    """Values as a dense type of GGUF; raises ExportError where they exceed the range of f16."""
    if kind == "bf16":
        return values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    found = values.to(torch.float32 if kind == "f32" else torch.float16)
    if not bool(torch.isfinite(found).all()):
        raise ExportError(f"{name} holds {float(values.abs().max()):.3g}, more than f16 can; export with --dense bf16")
    return found.contiguous().numpy()


def _write(writer: GGUFWriter, gguf: ModuleType, path: Path, pieces: list[_Piece], tick: Tick) -> None:
    """Write the header, then one tensor after another; nothing is left behind where the disk is full."""
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


def _describe(writer: GGUFWriter, checkpoint: Checkpoint, name: str, notes: list[str]) -> None:
    """Write what llama.cpp must know about the model besides its tensors."""
    spec, config = checkpoint.spec, checkpoint.spec.hf_config
    context = exported_context(spec)
    if context < spec.context:
        notes.append(f"layers attend to {context} tokens only, which llama.cpp does not support for this architecture: the "
                     f"file's context is {context}, within which both are the same")
    writer.add_name(name)
    writer.add_string("tsotsallm.version", __version__)
    if checkpoint.provenance is not None:
        writer.add_string("tsotsallm.recipe", json.dumps(checkpoint.provenance.recipe, ensure_ascii=False))
        source = checkpoint.provenance.source
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
            raise ExportError("llama.cpp leaves RoPE out of every fourth layer of smollm3, but this model's layers are in "
                              "another order; remove layers in groups of four, or run it with transformers")


def exported_context(spec: ModelSpec) -> int:
    """Positions that a file may state: within these, layers with an attention window attend to everything."""
    windows = [window for index in range(spec.layers) if (window := spec.attention_window(index)) is not None]
    return min([spec.context, *windows])


def _require_known(checkpoint: Checkpoint) -> None:
    """Raise ExportError for anything that the architecture does not have in llama.cpp."""
    spec, config = checkpoint.spec, checkpoint.spec.hf_config
    if config.hidden_act not in ("silu", "swish"):
        raise ExportError(f"hidden_act is {quoted(config.hidden_act)}, but llama.cpp computes every {spec.family} with "
                          "silu; nothing is exported: run this model with transformers")
    partial = (config.rope_parameters or {}).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor",
                                                                                     None) or 1
    if partial != 1:
        raise ExportError(f"partial_rotary_factor is {quoted(partial)}, which llama.cpp does not support for {spec.family}; "
                          "nothing is exported: run this model with transformers")
    if not 0 < spec.context < 1 << 31 or not 0 < spec.feed_forward < 1 << 31:
        raise ExportError(f"max_position_embeddings is {quoted(spec.context)}, which no engine supports; correct "
                          "config.json")
    allowed = BIASES[ARCHITECTURES[spec.family]]
    strange = sorted({name for stored in set(spec.layer_order) for name in checkpoint.layer_names(stored)
                      if name.endswith(".bias") and name.removesuffix(".bias") not in allowed})
    if strange:
        raise ExportError(f"the model has {strange[0]}, which llama.cpp's {ARCHITECTURES[spec.family]} does not load; "
                          "nothing is exported: run this model with transformers")


def _has_corrections(checkpoint: Checkpoint) -> bool:
    return any(is_adapter(name) for name in checkpoint.records)


def _rope(spec: ModelSpec) -> dict[str, Any]:
    rope = {"rope_type": "default", **(spec.hf_config.rope_parameters or {})}
    if rope["rope_type"] not in ("default", "llama3", "linear"):
        raise ExportError(f"the model scales its positions by {rope['rope_type']}, which is not exported; supported are "
                          "no scaling, linear, and Llama 3's")
    return rope


def _rope_factors(spec: ModelSpec) -> Tensor | None:
    """The factors by which Llama 3's scaling divides each frequency, from the transformers library, (head_dim / 2,)."""
    if _rope(spec)["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(spec)
    plain = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, spec.head_dim, 2).float() / spec.head_dim)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](spec.hf_config, torch.device("cpu"))
    factors: Tensor = plain / scaled
    return factors.float()


def _write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for add, token in ((writer.add_bos_token_id, vocabulary.bos), (writer.add_unk_token_id, vocabulary.unknown),
                       (writer.add_pad_token_id, vocabulary.padding)):
        if token is not None:
            add(token)
    for key, token in _end_keys(vocabulary).items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    if vocabulary.model == "llama":
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.prefix is not None:
        writer.add_array(PREFIX, list(vocabulary.prefix))
    if vocabulary.leading_space:
        writer.add_string(LEADING_SPACE, vocabulary.leading_space)
    if vocabulary.composed:
        writer.add_bool(COMPOSED, True)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


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


def _export_adapter(checkpoint: Checkpoint, out: Path, gguf: ModuleType, dense: Dense, tick: Tick) -> Path | None:
    """Write the corrections beside the linears as a GGUF adapter, 8-bit ones in Q8_0; None where there are none."""
    spec = checkpoint.spec
    pieces: list[_Piece] = []
    for index, stored in enumerate(spec.layer_order):
        for name in checkpoint.layer_names(stored):
            module = name.rpartition(".")[0]
            correction = checkpoint.beside(layer_prefix(stored) + module) if name.endswith(".weight") else None
            if correction is not None:
                pieces += _halves(f"blk.{index}.{NAMES[module]}.weight", correction, _row_order(spec, module), dense)
    if not pieces:
        return None
    writer = gguf.GGUFWriter(None, ARCHITECTURES[spec.family])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)       # no scaling: the correction is B·A, whatever its rank
    partial = out.with_name(out.name + ".partial")
    _write(writer, gguf, partial, pieces, tick)
    partial.replace(out)
    return out


def _halves(name: str, correction: LowRank, rows: Tensor | None, dense: Dense) -> list[_Piece]:
    def order(left: Tensor) -> Tensor:
        return left if rows is None else left[rows]

    if correction.coded is None:
        left, right = order(correction.left.float()), correction.right.float()
        return [_Piece(f"{name}.lora_a", tuple(right.shape), dense, lambda: as_dense(right, dense, name)),
                _Piece(f"{name}.lora_b", tuple(left.shape), dense, lambda: as_dense(left, dense, name))]
    # the scales of B's columns move to A's rows, so that B is its codes
    left_codes, right_codes = (half.codes for half in correction.coded)
    scales = correction.coded[0].scales.float() * correction.coded[1].scales.float()
    ones = torch.ones(left_codes.shape[1], 1)
    return [_coded(f"{name}.lora_a", right_codes, scales), _coded(f"{name}.lora_b", order(left_codes.mT.contiguous()), ones)]


def _coded(name: str, codes: Tensor, scales: Tensor) -> _Piece:
    """8-bit codes with a scale for each row, as Q8_0 where blocks of 32 divide the row, else as f16."""
    rows, columns = codes.shape
    if columns % 32:
        return _Piece(name, (rows, columns), "f16", lambda: as_dense(codes.float() * scales, "f16", name))
    blocks = Blocks(codes, scales.to(torch.float16).float().expand(rows, columns // 32).contiguous(), None, None, None,
                    GgmlGrid("q8_0"))
    return _Piece(name, (rows, columns), "q8_0", lambda: encode(blocks))
