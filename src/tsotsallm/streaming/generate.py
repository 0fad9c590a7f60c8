"""Greedy continuation of many prompts by a model larger than memory: one pass over the layers for each token.

All prompts advance together, so that a pass reads the weights once for all of them. The KV cache of a layer is on disk,
token by token; a pass reads it whole and appends one token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tsotsallm.checkpoint.shards import byte_view
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.generation import batches_by_length, left_padded
from tsotsallm.streaming.frame import Frame, load_final_norm
from tsotsallm.streaming.head import head_pieces
from tsotsallm.streaming.likelihood import PADDING, allowed_attention
from tsotsallm.streaming.sweep import Tick, silent

if TYPE_CHECKING:
    from transformers import Cache

CACHE_BYTES = 4 << 30
"""Bytes of KV cache on disk at a time; prompts beyond that take turns."""
BATCH_TOKENS = 1024


class _Batch:
    """Prompts of similar length while they are continued: their tokens so far, and their caches on disk."""

    def __init__(self, indices: list[int], prompts: Sequence[Sequence[int]], folder: Path) -> None:
        self.indices, self.folder = indices, folder
        self.ids, self.mask = left_padded([prompts[index] for index in indices])
        self.new: list[list[int]] = [[] for _ in indices]
        self.ended = [False] * len(indices)
        self.hidden = torch.empty(0)

    @property
    def positions(self) -> Tensor:
        """Positions of all tokens so far, (prompts, tokens)."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def allowed(self, window: int | None) -> Tensor:
        """What the running tokens may attend to, (prompts, 1, running, tokens) bool."""
        branch = torch.where(self.mask.bool(), 0, PADDING)
        return allowed_attention(self.positions, branch, window, self.ids.shape[1])

    def append(self, tokens: Tensor, max_new_tokens: int, done: Callable[[Sequence[int]], bool]) -> None:
        """Add the next token of every prompt, (prompts,), and note which prompts have ended."""
        for place, token in enumerate(tokens.tolist()):
            if not self.ended[place]:
                self.new[place].append(token)
                self.ended[place] = len(self.new[place]) == max_new_tokens or done(self.new[place])
        self.ids = tokens[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.indices), 1)], 1)

    def path(self, layer: int) -> Path:
        """The file of a layer's cache."""
        return self.folder / f"kv-{self.indices[0]:06d}-{layer:04d}.f32"

    def read_cache(self, layer: int, shape: tuple[int, int], device: torch.device) -> Cache:
        """A transformers cache with the tokens that a layer has processed; `shape` is (KV heads, head width)."""
        from transformers import DynamicCache

        cache = DynamicCache()
        past = self.mask.shape[1] - self.ids.shape[1]
        if past:
            stored = torch.empty(past, 2, len(self.indices), *shape)      # (tokens, key and value, prompts, heads, width)
            with self.path(layer).open("rb") as file:
                if file.readinto(byte_view(stored)) != stored.nbytes:
                    raise OSError(f"{self.path(layer)} is too short")
            keys, values = stored.to(device).permute(1, 2, 3, 0, 4)
            cache.update(keys.contiguous(), values.contiguous(), 0)
        return cache

    def write_cache(self, layer: int, cache: Cache) -> None:
        """Append the keys and values of the running tokens."""
        running = self.ids.shape[1]
        added = torch.stack([part[:, :, -running:] for part in (cache.layers[0].keys, cache.layers[0].values)])
        with self.path(layer).open("ab") as file:
            file.write(byte_view(added.permute(3, 0, 1, 2, 4).contiguous().float().cpu()))

    def remove(self) -> None:
        """Delete the caches."""
        for path in self.folder.glob(f"kv-{self.indices[0]:06d}-*.f32"):
            path.unlink()


def turns(view: View, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """Indices of the prompts that are continued together, grouped so that their caches take at most CACHE_BYTES."""
    spec = view.spec
    token_bytes = spec.kv_bytes_per_token(4)
    groups: list[list[int]] = []
    room = 0
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        size = token_bytes * (len(prompts[index]) + max_new_tokens)
        if size > room:
            groups.append([])
            room = CACHE_BYTES
        groups[-1].append(index)
        room -= size
    return groups


@torch.no_grad()
def generate_by_sweeps(view: View, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                       done: Callable[[Sequence[int]], bool], scratch: Path, device: torch.device,
                       tick: Tick = silent) -> Iterator[tuple[int, list[int]]]:
    """Yield (index, new tokens) for every prompt, at most `max_new_tokens` each; `done` says whether an answer has ended."""
    scratch.mkdir(parents=True, exist_ok=True)
    frame = Frame(view.spec, device)
    norm = load_final_norm(view, device)
    groups = turns(view, prompts, max_new_tokens)
    for number, group in enumerate(groups):
        own = [prompts[index] for index in group]
        running = [_Batch([group[place] for place in batch], prompts, scratch)
                   for batch in batches_by_length(own, BATCH_TOKENS)]
        for token in range(max_new_tokens):
            for batch in running:
                batch.hidden = view.embed(batch.ids.flatten()).view(*batch.ids.shape, -1)
            _through_layers(view, frame, running)
            for batch, tokens in zip(running, _likeliest(view, norm, running, device), strict=True):
                batch.append(tokens, max_new_tokens, done)
            for batch in [batch for batch in running if all(batch.ended)]:
                running.remove(batch)
                batch.remove()
                yield from zip(batch.indices, batch.new, strict=True)
            tick("generating", (number + (token + 1) / max_new_tokens) / len(groups))
            if not running:
                break
    frame.clear()


def _through_layers(view: View, frame: Frame, running: Sequence[_Batch]) -> None:
    spec = view.spec
    for layer in range(spec.layers):
        frame.load(layer, view.layer(layer))
        window = spec.attention_window(layer)
        for batch in running:
            cache = batch.read_cache(layer, (spec.kv_heads, spec.head_dim), frame.device)
            batch.hidden = frame(batch.hidden, positions=batch.positions[:, -batch.ids.shape[1]:],
                                 allowed=batch.allowed(window), cache=cache).cpu()
            batch.write_cache(layer, cache)


def _likeliest(view: View, norm: torch.nn.Module, running: Sequence[_Batch], device: torch.device) -> list[Tensor]:
    """The most likely next token of every prompt, (prompts,) for each batch."""
    last = norm(torch.cat([batch.hidden[:, -1:] for batch in running]).to(device))[:, 0]
    best = torch.full((len(last),), -torch.inf, device=device)
    token = torch.zeros(len(last), dtype=torch.int64, device=device)
    for piece in head_pieces(view, device):
        value, place = piece.logits(last).max(-1)
        token = torch.where(value > best, place + piece.first, token)
        best = torch.maximum(best, value)
    return list(torch.split(token.cpu(), [len(batch.indices) for batch in running]))
