"""A checkpoint as one GGUF file, written tensor by tensor; blocks of ggml's grids are copied unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from tsotsallm.checkpoint.adapter import LowRank, is_adapter
from tsotsallm.checkpoint.gguf_layout import (
    Dense,
    Entry,
    Labels,
    Layout,
    Slot,
    TensorInfo,
    aligned,
    exported_context,
    model_entries,
    rope_of,
    slots,
    vocabulary_entries,
)
from tsotsallm.checkpoint.gguf_terms import LONG_FACTORS, ROPE_FACTORS, rope_factors, row_order
from tsotsallm.checkpoint.gguf_vocabulary import read_vocabulary
from tsotsallm.checkpoint.packing import unpack_rows
from tsotsallm.checkpoint.reader import Checkpoint, layer_prefix
from tsotsallm.errors import ExportError
from tsotsallm.export.blocks import Packing, blocks_of, held, not_held, packing_of
from tsotsallm.files import quoted, require_new
from tsotsallm.machine import not_written, require_disk
from tsotsallm.numerics.ggml import Blocks, GgmlGrid, encode
from tsotsallm.numerics.grids import IntegerGrid, Quantised
from tsotsallm.planning import enlarged
from tsotsallm.units import human_bytes

OWN: dict[torch.dtype, Dense] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

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

    info: TensorInfo
    read: Callable[[], Array]
    packing: Packing | None = None


def export_gguf(checkpoint: Checkpoint, out: Path, *, dense: Dense | None = None, name: str = "",
                accept_differences: bool = True, check: Check | None = None,
                tick: Tick = lambda _what, _share: None, say: Callable[[str], None] = lambda _line: None) -> Exported:
    """Write a checkpoint, ours or another, as GGUF; low-rank corrections go into an adapter file beside it.

    Weights on ggml's grids are copied, those on integer grids packed where a type of GGUF can hold them. All others are
    written as `dense` (by default in the types of the GGUF file that is the source, else f32 where they are stored so, else
    f16); without `dense`, a file that would therefore be
    larger than the checkpoint is refused. One tensor at a time is in memory. The file gets its name once it is complete
    and `check`, which receives it under a temporary name in the same folder, has raised nothing. `say` is called before a
    file that is larger than the checkpoint is written.

    Where GGUF cannot express how the tokenizer treats some texts, a note says so, or without `accept_differences` the
    export is refused. Raises ExportError for a model that cannot be exported, ResourceError where the disk is full.
    """
    spec = checkpoint.spec
    require_new(out, ExportError)
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
    pieces = list(_pieces(checkpoint, kind, keep=dense is None and checkpoint.source.keeps_types))
    partial = out.with_name(out.name + ".partial")
    layout = Layout((*model_entries(spec, Labels.of(checkpoint, name or checkpoint.directory.name)),
                     *vocabulary_entries(vocabulary)), tuple(piece.info for piece in pieces))
    if (context := exported_context(spec)) < spec.context:
        notes.append(f"layers attend to {context} tokens only, which llama.cpp does not support for this architecture: the "
                     f"file's context is {context}, within which both are the same")
    notes += _packing_notes(checkpoint, pieces, out, kind, refuse=dense is None)
    if vocabulary.chat_template is None:
        notes.append("the tokenizer has no chat template: the file completes text, but `chat` needs one")
    by_type: dict[str, int] = {}
    for info in layout.tensors:
        by_type[info.type] = by_type.get(info.type, 0) + info.bytes
    final = out.with_name(f"{out.stem}-adapter.gguf")
    if _has_corrections(checkpoint):
        require_new(final, ExportError)
    if (larger := enlarged(out.name, sum(by_type.values()), checkpoint.weight_bytes)) is not None:
        say(larger)
        notes.append(larger)
    partial_adapter: Path | None = final.with_name(final.name + ".partial")
    try:
        write_layout(layout, partial, [piece.read for piece in pieces], tick)
        partial_adapter = _export_adapter(checkpoint, final.with_name(final.name + ".partial"), kind, tick)
        verified = None if check is None else check(Written(
            partial, partial_adapter, context, frozenset(info.type for info in layout.tensors if len(info.shape) > 1),
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


def _pieces(checkpoint: Checkpoint, dense: Dense, *, keep: bool) -> Iterator[_Piece]:
    """Yield all tensors of the file, repeated layers written out; with `keep`, dense ones in the types that they have."""
    spec = checkpoint.spec
    for slot in slots(spec, lambda index: checkpoint.layer_names(spec.layer_order[index])):
        if slot.source == ROPE_FACTORS or slot.source in LONG_FACTORS:
            factors = rope_factors(spec) if slot.source == ROPE_FACTORS else torch.tensor(
                rope_of(spec)[LONG_FACTORS[slot.source]], dtype=torch.float32)
            yield _Piece(TensorInfo(slot.name, tuple(factors.shape), "f32"), factors.numpy)
        else:
            yield _piece(checkpoint, slot, dense, keep=keep)


def _piece(checkpoint: Checkpoint, slot: Slot, dense: Dense, *, keep: bool) -> _Piece:
    spec, name, source, rows = checkpoint.spec, slot.name, slot.source, None
    if slot.layer is not None:
        source, rows = layer_prefix(spec.layer_order[slot.layer]) + source, row_order(spec, source.rpartition(".")[0])
    module = source.removesuffix(".weight")
    grid = checkpoint.grid_of(module) if source.endswith(".weight") and checkpoint.is_packed(module) else None
    shape = checkpoint.shape_of(source)
    if isinstance(grid, GgmlGrid):
        def blocks() -> Array:
            stored = checkpoint.record(f"{module}.weight_blocks").read()
            return (stored if rows is None else stored[rows]).numpy()
        return _Piece(TensorInfo(name, shape, grid.type), blocks)
    packing = None if grid is None else packing_of(grid, shape[1], *_scales(checkpoint, module, grid))
    if packing is not None and (target := packing.grid) is not None:
        def packed() -> Array:
            stored = blocks_of(_quantised(checkpoint, module), target)
            return encode(stored if rows is None else stored.rows_at(rows))
        return _Piece(TensorInfo(name, shape, target.type), packed, packing)
    own = OWN.get(checkpoint.record(source).dtype, dense) if keep and packing is None else dense
    kind: Dense = "f32" if len(shape) == 1 else own

    def values() -> Array:
        stored = checkpoint.without_beside([module]).tensor(source)
        if len(shape) == 1 and spec.traits.offset and source.endswith("norm.weight"):
            stored = stored + spec.traits.offset
        return as_dense(stored if rows is None else stored[rows], kind, name)
    return _Piece(TensorInfo(name, shape, kind), values, packing)


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
        size = sum(piece.info.bytes for piece in pieces)
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


def write_layout(layout: Layout, path: Path, reads: Sequence[Callable[[], Array]], tick: Tick = lambda _what, _share: None
                 ) -> None:
    """Write a file's header, then what `reads` give for its tensors, one after another.

    Its folder is made. Nothing is left behind where it fails; raises ResourceError where the disk has too little room.
    """
    require_disk(path.name.removesuffix(".partial"), layout.total_bytes, path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(layout.head)
            for number, (info, read) in enumerate(zip(layout.tensors, reads, strict=True)):
                tick(f"writing {info.name}", number / len(reads))
                read().tofile(file)
                file.write(bytes(aligned(info.bytes) - info.bytes))
        assert path.stat().st_size == layout.total_bytes, f"{path} is not as long as its description says"
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise not_written(path.parent, layout.total_bytes, error) from None
        raise


def _require_known(checkpoint: Checkpoint) -> None:
    """Raise ExportError for anything that the architecture does not have in llama.cpp."""
    spec, config, form = checkpoint.spec, checkpoint.spec.hf_config, checkpoint.spec.traits.gguf
    if spec.activation not in form.activation:
        raise ExportError(f"hidden_act is {quoted(spec.activation)}, but llama.cpp computes every {spec.family} with "
                          f"{form.activation[0]}; nothing is exported: run this model with transformers")
    if form.square and spec.heads * spec.head_dim != spec.hidden:
        raise ExportError(f"{spec.heads} heads of {spec.head_dim} are not as wide as the hidden states ({spec.hidden}), "
                          f"which llama.cpp requires of {spec.family}; nothing is exported: leave kv_groups out of neurons, "
                          "or run this model with transformers")
    if form.tied and not spec.tied:
        raise ExportError(f"the model has a head of its own, but llama.cpp's {form.architecture} uses the embeddings; "
                          "nothing is exported: run this model with transformers")
    partial = next((one for rope in spec.ropes.values() if (one := rope.get("partial_rotary_factor"))), None) or getattr(
        config, "partial_rotary_factor", None) or 1
    if partial != 1 and not form.partial:
        raise ExportError(f"partial_rotary_factor is {quoted(partial)}, which llama.cpp does not support for {spec.family}; "
                          "nothing is exported: run this model with transformers")
    if not 0 < spec.context < 1 << 31 or not 0 < spec.feed_forward < 1 << 31:
        raise ExportError(f"max_position_embeddings is {quoted(spec.context)}, which no engine supports; correct "
                          "config.json")
    strange = sorted({name for stored in set(spec.layer_order) for name in checkpoint.layer_names(stored)
                      if name.endswith(".bias") and name.removesuffix(".bias") not in form.biases})
    if strange:
        raise ExportError(f"the model has {strange[0]}, which llama.cpp's {form.architecture} does not load; "
                          "nothing is exported: run this model with transformers")


def _has_corrections(checkpoint: Checkpoint) -> bool:
    return any(is_adapter(name) for name in checkpoint.records)


def _export_adapter(checkpoint: Checkpoint, out: Path, dense: Dense, tick: Tick) -> Path | None:
    """Write the corrections beside the linears as a GGUF adapter, 8-bit ones in Q8_0; None where there are none."""
    spec = checkpoint.spec
    pieces: list[_Piece] = []
    for index, stored in enumerate(spec.layer_order):
        for name in checkpoint.layer_names(stored):
            module = name.rpartition(".")[0]
            correction = checkpoint.beside(layer_prefix(stored) + module) if name.endswith(".weight") else None
            if correction is not None:
                name = f"blk.{index}.{spec.traits.gguf.name_of(module)}.weight"
                pieces += _halves(name, correction, row_order(spec, module), dense)
    if not pieces:
        return None
    entries = (Entry("general.architecture", "string", spec.traits.gguf.architecture),
               Entry("general.type", "string", "adapter"), Entry("adapter.type", "string", "lora"),
               Entry("adapter.lora.alpha", "f32", 0.0))     # no scaling: the correction is B·A, whatever its rank
    partial = out.with_name(out.name + ".partial")
    write_layout(Layout(entries, tuple(piece.info for piece in pieces)), partial, [piece.read for piece in pieces], tick)
    partial.replace(out)
    return out


def _halves(name: str, correction: LowRank, rows: Tensor | None, dense: Dense) -> list[_Piece]:
    def order(left: Tensor) -> Tensor:
        return left if rows is None else left[rows]

    if correction.coded is None:
        left, right = order(correction.left.float()), correction.right.float()
        return [_Piece(TensorInfo(f"{name}.lora_a", tuple(right.shape), dense), lambda: as_dense(right, dense, name)),
                _Piece(TensorInfo(f"{name}.lora_b", tuple(left.shape), dense), lambda: as_dense(left, dense, name))]
    # the scales of B's columns move to A's rows, so that B is its codes
    left_codes, right_codes = (half.codes for half in correction.coded)
    scales = correction.coded[0].scales.float() * correction.coded[1].scales.float()
    ones = torch.ones(left_codes.shape[1], 1)
    return [_coded(f"{name}.lora_a", right_codes, scales), _coded(f"{name}.lora_b", order(left_codes.mT.contiguous()), ones)]


def _coded(name: str, codes: Tensor, scales: Tensor) -> _Piece:
    """8-bit codes with a scale for each row, as Q8_0 where blocks of 32 divide the row, else as f16."""
    rows, columns = codes.shape
    if columns % 32:
        return _Piece(TensorInfo(name, (rows, columns), "f16"), lambda: as_dense(codes.float() * scales, "f16", name))
    blocks = Blocks(codes, scales.to(torch.float16).float().expand(rows, columns // 32).contiguous(), None, None, None,
                    GgmlGrid("q8_0"))
    return _Piece(TensorInfo(name, (rows, columns), "q8_0"), lambda: encode(blocks))
