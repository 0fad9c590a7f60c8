"""The importance matrix of a model in llama.cpp's format, gathered one layer at a time."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tsotsallm.checkpoint.gguf_layout import Entry, Layout, TensorInfo, slots
from tsotsallm.checkpoint.shapes import layer_shapes
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import ExportError
from tsotsallm.export.gguf import write_layout
from tsotsallm.files import require_new
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import InputsSeen
from tsotsallm.streaming.sweep import Tick, TwoStates, Visit, embed_corpus, silent, sweep


@torch.no_grad()
def export_imatrix(view: View, corpus: Corpus, out: Path, scratch: Path, device: torch.device, tick: Tick = silent) -> int:
    """Write Σx² of every linear's inputs over the tokens of a corpus, which llama.cpp's quantiser weights errors by.

    Of a matrix named NAME the file holds `NAME.in_sum2`, (1, d_in) float32, and `NAME.counts`, the number of tokens, as
    llama.cpp's own `llama-imatrix` does. Returns the number of bytes. Raises ExportError where `out` exists or the model
    has no form in GGUF, ResourceError where the disk is full.
    """
    require_new(out, ExportError)
    spec = view.spec
    names = {(slot.layer, slot.source.removesuffix(".weight")): slot.name
             for slot in slots(spec, lambda index: layer_shapes(spec, index)) if slot.layer is not None}
    states = TwoStates(scratch, [len(window) for window in corpus.windows], spec.hidden)
    embed_corpus(view, corpus, states.inputs_of(0))
    sums: dict[str, Tensor] = {}
    for visit in sweep(view, states, observe=False, device=device):
        tick("observing", visit.index / spec.layers)
        sums |= {names[visit.index, name]: total for name, total in _squares(visit).items()}
    states.remove()
    infos, contents = [], []
    for name in sorted(sums):
        for suffix, values in (("in_sum2", sums[name].float().cpu()), ("counts", torch.tensor([float(corpus.tokens)]))):
            infos.append(TensorInfo(f"{name}.{suffix}", (1, len(values)), "f32"))
            contents.append(values.numpy())
    length = max(len(window) for window in corpus.windows)
    layout = Layout((Entry("general.type", "string", "imatrix"), Entry("imatrix.datasets", "string", [corpus.source]),
                     Entry("imatrix.chunk_count", "u32", corpus.tokens // length),
                     Entry("imatrix.chunk_size", "u32", length)), tuple(infos))
    unfinished = out.with_name(out.name + ".partial")
    write_layout(layout, unfinished, [partial(np.ascontiguousarray, values) for values in contents])
    unfinished.replace(out)
    return layout.total_bytes


def _squares(visit: Visit) -> dict[str, Tensor]:
    """Linear -> Σx² of each of its inputs over all tokens, (d_in,) float64."""
    assert visit.inputs is not None
    sums: dict[str, Tensor] = {}
    for batch in visit.inputs.batches():
        seen: list[tuple[Tensor, Tensor]] = []          # linears that share an input share its squares

        def add(name: str, inputs: Tensor, seen: list[tuple[Tensor, Tensor]] = seen) -> None:
            if not seen or inputs is not seen[0][0]:
                seen[:] = [(inputs, inputs.reshape(-1, inputs.shape[-1]).double().square().sum(0))]
            sums[name] = sums.get(name, 0.0) + seen[0][1]

        with suppress(InputsSeen), visit.frame.watching(visit.names, add, to_the_end=False):
            visit.frame(visit.inputs.read(batch))
    return sums
