"""Our checkpoints as plain Hugging Face ones: every weight dense, repeated layers written out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tsotsallm.checkpoint.reader import Checkpoint, layer_prefix
from tsotsallm.checkpoint.shards import Piece
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import Writer, partial_path, publish
from tsotsallm.errors import ExportError
from tsotsallm.files import require_new
from tsotsallm.machine import not_written, require_disk
from tsotsallm.planning import enlarged, parameters_of
from tsotsallm.streaming.sweep import Tick, silent


def export_huggingface(checkpoint: Checkpoint, out: Path, tick: Tick = silent,
                       say: Callable[[str], None] = lambda _line: None) -> list[str]:
    """Write every weight dense, in the type of the embeddings; returns notes for the user.

    Values on a grid are rounded again where the type has fewer digits than they do; corrections beside linears are added.
    `say` is called before a checkpoint that is larger than this one is written. One layer at a time is in memory; the
    directory gets its name when it is complete. Raises ExportError where `out` or its unfinished form exists, ResourceError
    where it cannot be written.
    """
    partial = partial_path(out)
    for path in (out, partial):
        require_new(path, ExportError)
    view, storage = View.of(checkpoint), checkpoint.storage
    spec = view.spec
    size = storage.itemsize * parameters_of(spec, range(spec.layers))
    require_disk(out.name, 2 * size, out.parent)        # parts and shards are on disk together
    if (larger := enlarged(out.name, size, checkpoint.weight_bytes)) is not None:
        say(larger)
    try:
        writer = Writer(partial)
        for index in range(spec.layers):
            tick("writing", index / spec.layers)
            prefix = layer_prefix(view.stored(index))
            writer.write_layer(index, {name: checkpoint.tensor(prefix + name).to(storage)
                                       for name in checkpoint.layer_names(view.stored(index))})
        ends: dict[str, Piece] = dict(checkpoint.end_records())
        for name in (EMBEDDING, HEAD):
            if checkpoint.is_packed(name.removesuffix(".weight")):
                ends = {key: record for key, record in ends.items() if not key.startswith(name)}
                ends[name] = checkpoint.tensor(name).to(storage)
        writer.write_ends(ends, spec.layers)
        writer.finish(checkpoint, dict(spec.config), {}, None, list(range(spec.layers)), spec.layers)
        writer.remove_parts()
        publish(partial, out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise not_written(out.parent, size, error) from None
    notes = []
    if any(checkpoint.is_packed(layer_prefix(stored) + name.removesuffix(".weight"))
           for stored in set(spec.layer_order) for name in checkpoint.layer_names(stored)):
        notes.append(f"weights were on a low-bit grid and are now dense in {str(storage).removeprefix('torch.')}: the same "
                     "values to its rounding, but a large file; --gguf keeps it small")
    return notes
