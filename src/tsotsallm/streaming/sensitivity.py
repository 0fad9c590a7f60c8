"""How much the loss depends on each linear's outputs: for each token, and for each pair of outputs."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tsotsallm.checkpoint.shapes import input_groups
from tsotsallm.checkpoint.view import View
from tsotsallm.numerics.rounding import OUTPUTS
from tsotsallm.streaming.backward import backward_sweep
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame
from tsotsallm.streaming.sweep import Tick, silent

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

MOST = 50.0


def token_weights(view: View, corpus: Corpus, kept: Path, scratch: Path, device: torch.device, tick: Tick = silent) -> None:
    """Write the weight of every token and the metric of the outputs of every linear to `kept`, one file for each layer.

    The weight of a token is √(g² / mean g²), at most √50, where g² is the mean square of the loss's gradient with respect
    to the linear's output for the token; linears that read the same input share the mean of their weights. g² itself would
    be the diagonal of the Fisher information averaged over outputs (as in arXiv:2505.07004); its root depends less on
    single tokens (docs/LOG.md). The metric of the outputs is Σ g·gᵀ over tokens, as diagonal blocks scaled to a mean
    diagonal of one; with the Gram of the inputs it is Kronecker's approximation of the Fisher information
    (arXiv:1503.05671, section 3). This is a backward sweep with one layer in memory; called again after a kill, it resumes.
    `weights_of` reads the files.
    """
    kept.mkdir(parents=True, exist_ok=True)
    squares: dict[str, list[Tensor]] = {}
    metrics: dict[str, Tensor] = {}
    hooks: list[RemovableHandle] = []

    def note(name: str, _module: object, _inputs: object, outputs: tuple[Tensor, ...]) -> None:
        gradient = outputs[0].detach().flatten(0, -2)               # (tokens, d_out)
        squares.setdefault(name, []).append(gradient.square().mean(-1).cpu())
        if name not in metrics:
            metrics[name] = gradient.new_zeros(gradient.shape[1], min(OUTPUTS, gradient.shape[1]))
        scaled = gradient * len(corpus.windows)                     # the mean loss's gradients are tiny
        for first in range(0, scaled.shape[1], OUTPUTS):
            block = scaled[:, first:first + OUTPUTS]
            metrics[name][first:first + OUTPUTS, :block.shape[1]].addmm_(block.mT, block)

    def load(frame: Frame, index: int) -> dict[str, Tensor]:
        while hooks:
            hooks.pop().remove()
        squares.clear()
        metrics.clear()
        frame.load(index, view.layer(index))
        for name in frame.linear_names():
            hooks.append(frame.linear(name).register_full_backward_hook(partial(note, name)))
        return {}

    for index, _ in backward_sweep(view, corpus, scratch, device, tick, load=load):
        powers = {name: torch.cat(parts) for name, parts in squares.items()}
        relative = {name: (power / power.mean().clamp(min=1e-38)).clamp(max=MOST).sqrt() for name, power in powers.items()}
        squared = {f"{name}.square": values.mean() for name, values in powers.items()}
        shared = {name: torch.stack([relative[other] for other in group]).mean(0).contiguous()
                  for group in input_groups(relative) for name in group}
        outputs = {f"{name}.outputs": _of_mean_one(metric).half().cpu() for name, metric in metrics.items()}
        draft = kept / "draft.safetensors"
        save_file(shared | squared | outputs, draft)
        draft.replace(_file(kept, index))
    shutil.rmtree(scratch, ignore_errors=True)


def weights_of(kept: Path, layer: int) -> dict[str, Tensor]:
    """NAME of a linear -> the weight of every token, (tokens,) float32, as written by `token_weights`.

    Also NAME.square -> mean g² over all tokens, and NAME.outputs -> the metric of its outputs, (d_out, at most OUTPUTS)
    float16.
    """
    return load_file(_file(kept, layer))


def _of_mean_one(metric: Tensor) -> Tensor:
    """A metric stored as blocks of OUTPUTS rows, divided by the mean of its diagonal."""
    rows = torch.arange(len(metric), device=metric.device)
    return metric / metric[rows, rows % OUTPUTS].mean().clamp(min=1e-38)


def _file(kept: Path, layer: int) -> Path:
    return kept / f"layer-{layer:04d}.safetensors"
