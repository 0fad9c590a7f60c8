"""Attention maps and hidden states of a text, layer by layer, and their spectra along the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsotsallm.checkpoint.view import View
from tsotsallm.streaming.frame import Frame


@dataclass(frozen=True)
class Inside:
    """For chosen layers: attention (heads, tokens, tokens) with a row for each query, and output states (tokens, width)."""

    attention: dict[int, Tensor]
    states: dict[int, Tensor]


@torch.no_grad()
def look_inside(view: View, ids: Sequence[int], layers: Sequence[int], device: torch.device) -> Inside:
    """Run one text through all layers, one in memory at a time, and keep attention and outputs of the chosen layers."""
    hidden = view.embed(torch.tensor(ids))[None]
    frame = Frame(view.spec, device)
    attention, states = {}, {}
    for index in range(view.spec.layers):
        frame.load(index, view.layer(index))
        if index in layers:
            attention[index] = frame.attention(hidden)[0].cpu()
        hidden = frame(hidden).cpu()
        if index in layers:
            states[index] = hidden[0]
    frame.clear()
    return Inside(attention, states)


def attention_spectrum(attention: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude of the Fourier transform of attention along the keys, mean over the queries of the second half.

    attention (..., queries, keys) -> (frequencies in cycles per token (bins,), magnitudes (..., bins)). A query attends
    only to keys up to itself: row q is transformed over its q + 1 keys, less its mean, which would dominate the lowest bin,
    at frequencies that all these rows have in common, (0, 1/2] in steps of 2 / keys.
    """
    keys = attention.shape[-1]
    first = keys // 2
    frequencies = torch.arange(1, keys // 4 + 1, dtype=torch.float64) * 2 / keys
    total = torch.zeros(*attention.shape[:-2], len(frequencies), dtype=torch.float64)
    for query in range(first, attention.shape[-2]):
        row = attention[..., query, :query + 1].double()
        row = row - row.mean(-1, keepdim=True)
        turns = -2j * torch.pi * frequencies[:, None] * torch.arange(query + 1, dtype=torch.float64)
        total += (row.to(torch.complex128) @ turns.exp().mT).abs()
    return frequencies, total / (attention.shape[-2] - first)


def state_spectrum(states: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude of the Fourier transform of hidden states along the tokens, mean over the width.

    states (tokens, width) -> (frequencies in cycles per token (bins,), magnitudes (bins,)), each channel less its mean.
    """
    centred = states.double() - states.double().mean(0)
    return torch.fft.rfftfreq(len(states), dtype=torch.float64)[1:], torch.fft.rfft(centred, dim=0).abs().mean(-1)[1:]
