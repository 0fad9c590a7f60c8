"""Log-likelihoods of continuations of prompts, layer by layer; continuations of one prompt share its computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.view import View
from tsotsallm.streaming.frame import Frame, load_final_norm
from tsotsallm.streaming.head import head_pieces
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.score import HEAD_TOKENS, HeadTally, require_finite
from tsotsallm.streaming.sweep import Tick, silent

CHUNK_BYTES = 512 << 20
"""Bytes of hidden states on disk at a time; trees beyond that take further passes over the weights."""
LENGTH_STEP = 16
PADDING = -1


@dataclass(frozen=True)
class Tree:
    """A prompt of one token or more, and the continuations of one token or more that branch from its end."""

    prompt: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Tokens that run through the model; the last of every branch is only predicted."""
        return len(self.prompt) + sum(len(branch) - 1 for branch in self.branches)


@dataclass(frozen=True)
class Likelihood:
    """log p of every token of a continuation in nats, and whether each was the most likely one."""

    tokens: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        """log p of the whole continuation in nats."""
        return sum(self.tokens)


@dataclass(frozen=True)
class _Packed:
    """A tree as one padded row of tokens: position and branch of each, and which states predict which targets."""

    ids: Tensor             # (length,)
    positions: Tensor       # (length,)
    branch: Tensor          # (length,) 0 for the prompt, 1 and up for branches, −1 for padding
    rows: Tensor            # the token whose state predicts, for all tokens of all branches in turn
    targets: Tensor


def _pack(tree: Tree, length: int) -> _Packed:
    ids, positions, branch = list(tree.prompt), list(range(len(tree.prompt))), [0] * len(tree.prompt)
    rows: list[int] = []
    targets: list[int] = []
    for number, tokens in enumerate(tree.branches, 1):
        rows += [len(tree.prompt) - 1, *range(len(ids), len(ids) + len(tokens) - 1)]
        targets += tokens
        positions += range(len(tree.prompt), len(tree.prompt) + len(tokens) - 1)
        branch += [number] * (len(tokens) - 1)
        ids += tokens[:-1]
    padding = length - len(ids)
    return _Packed(torch.tensor(ids + [0] * padding), torch.tensor(positions + [0] * padding),
                   torch.tensor(branch + [PADDING] * padding), torch.tensor(rows), torch.tensor(targets))


def allowed_attention(positions: Tensor, branch: Tensor, window: int | None, running: int | None = None) -> Tensor:
    """The attention mask of trees, (rows, 1, running tokens, tokens) bool.

    A token attends to the prompt and to its own branch up to itself, within `window` tokens where that is given. With
    `running` the mask is for the last `running` tokens only. positions and branch are (rows, tokens).
    """
    first = 0 if running is None else branch.shape[1] - running
    positions, branch = positions.to(torch.int32), branch.to(torch.int32)
    mine, theirs = branch[:, first:, None], branch[:, None, :]
    distance = positions[:, first:, None] - positions[:, None, :]
    allowed = ((theirs == 0) | (theirs == mine)) & (distance >= 0) & (mine != PADDING) & (theirs != PADDING)
    if window is not None:
        allowed &= distance < window
    return (allowed | torch.eye(branch.shape[1], dtype=torch.bool)[first:])[:, None]


def chunks(trees: Sequence[Tree], width: int) -> list[list[int]]:
    """Indices of the trees of each pass, long ones first, so that their hidden states take at most CHUNK_BYTES."""
    order = sorted(range(len(trees)), key=lambda index: -trees[index].tokens)
    passes: list[list[int]] = []
    room = 0
    for index in order:
        size = 4 * width * _padded(trees[index])
        if size > room:
            passes.append([])
            room = CHUNK_BYTES
        passes[-1].append(index)
        room -= size
    return passes


def _padded(tree: Tree) -> int:
    return -(-tree.tokens // LENGTH_STEP) * LENGTH_STEP


@torch.no_grad()
def log_likelihoods(view: View, trees: Sequence[Tree], scratch: Path, device: torch.device,
                    tick: Tick = silent) -> Iterator[tuple[int, list[Likelihood]]]:
    """Yield (index, likelihoods of its branches) for every tree, pass by pass, with one layer in memory.

    A pass runs all its trees through all layers. A tree is one row of tokens: first the prompt, then its branches, each of
    which starts at the position after the prompt and does not attend to its siblings, so a prompt is computed once. Raises
    NumericsError where losses are not finite.
    """
    parts = chunks(trees, view.spec.hidden)
    for number, part in enumerate(parts):
        def of_all(step: str, share: float, number: int = number) -> None:
            tick(step, (number + share) / len(parts))

        yield from zip(part, _one_pass(view, [trees[index] for index in part], scratch, device, of_all), strict=True)


def _predicting_states(view: View, states: HiddenStates, packed: Sequence[_Packed], scratch: Path,
                       device: torch.device) -> tuple[HiddenStates, Tensor]:
    """Write the final states that predict something, after the final norm, to a file of their own.

    Returns the file and the row of each prediction's state in it, (predictions,).
    """
    norm = load_final_norm(view, device)
    needed, places, start = [], [], 0
    for tree in packed:
        rows, inverse = torch.unique(tree.rows, return_inverse=True)
        needed.append(rows)
        places.append(inverse + start)
        start += len(rows)
    compact = HiddenStates(scratch / "predicting.f32", [len(rows) for rows in needed], view.spec.hidden)
    for batch in states.batches():
        for index, row in zip(batch, states.read(batch), strict=True):
            compact.write([index], norm(row[needed[index]].to(device))[None])
    return compact, torch.cat(places)


def _one_pass(view: View, trees: Sequence[Tree], scratch: Path, device: torch.device, tick: Tick) -> list[list[Likelihood]]:
    scratch.mkdir(parents=True, exist_ok=True)
    packed = [_pack(tree, _padded(tree)) for tree in trees]
    states = HiddenStates(scratch / "trees.f32", [len(row.ids) for row in packed], view.spec.hidden)
    branching = any(len(tree.branches) > 1 for tree in trees)
    for batch in states.batches():
        ids = torch.stack([packed[index].ids for index in batch])
        states.write(batch, view.embed(ids.flatten()).view(*ids.shape, -1))
    frame = Frame(view.spec, device)
    for layer in range(view.spec.layers):
        frame.load(layer, view.layer(layer))
        window = view.spec.attention_window(layer)
        for batch in states.batches():
            positions = allowed = None
            if branching:
                positions = torch.stack([packed[index].positions for index in batch])
                allowed = allowed_attention(positions, torch.stack([packed[index].branch for index in batch]), window)
            states.write(batch, frame(states.read(batch), positions=positions, allowed=allowed))
        tick("scoring", (layer + 1) / view.spec.layers)
    frame.clear()
    predicting, rows = _predicting_states(view, states, packed, scratch, device)
    tally = HeadTally(torch.cat([row.targets for row in packed]), top=True)
    for piece in head_pieces(view, device):
        for start in range(0, len(rows), HEAD_TOKENS):
            block = slice(start, min(start + HEAD_TOKENS, len(rows)))
            lowest, highest = int(rows[block].min()), int(rows[block].max()) + 1
            flat = predicting.like_lengths([lowest, highest - lowest] if lowest else [highest])
            near = flat.read([1 if lowest else 0])[0]
            tally.add(block, piece.logits(near[rows[block] - lowest].to(device)), piece.first)
    states.remove()
    predicting.remove()
    require_finite(tally.losses, view)
    losses, right = tally.losses, tally.top == tally.targets
    likelihoods: list[list[Likelihood]] = []
    place = 0
    for tree in trees:
        likelihoods.append([])
        for branch in tree.branches:
            block = slice(place, place + len(branch))
            likelihoods[-1].append(Likelihood(tuple((-losses[block]).tolist()), bool(right[block].all())))
            place += len(branch)
    return likelihoods
