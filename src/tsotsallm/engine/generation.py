"""Continuations of many prompts by a model in memory, in batches: greedy ones, or drawn by a seed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096
BATCH_PROMPTS = 64
LIKELIEST = 1024
"""Tokens that are sorted first; all are where these do not hold the share that is drawn from."""

Choose: TypeAlias = Callable[[Tensor, int], Tensor]
"""(logits (prompts, vocabulary), how many new tokens came before) -> the next token of every prompt, (prompts,) int64."""


def likeliest(logits: Tensor, _place: int) -> Tensor:
    """The likeliest token of every row."""
    return logits.argmax(-1)


class Drawn:
    """Draws tokens by a seed: the same for the same logits, whatever else runs in the process.

    temperature  0 always takes the likeliest token
    top_p        tokens are drawn among the likeliest that together have this share, at least one
    ends         tokens that no continuation begins with
    """

    def __init__(self, seed: int, temperature: float, top_p: float, ends: Sequence[int] = ()) -> None:
        self.temperature, self.top_p, self.ends = temperature, top_p, list(ends)
        self.chance = torch.Generator("cpu").manual_seed(seed % (1 << 63))

    def __call__(self, logits: Tensor, place: int) -> Tensor:
        """The next token of every row of logits (prompts, vocabulary), (prompts,) int64."""
        logits = logits.float()
        if place == 0 and self.ends:
            logits = logits.index_fill(-1, torch.tensor(self.ends, device=logits.device), -torch.inf)
        shares, tokens = nucleus(logits, self.temperature, self.top_p)
        reached = shares.cumsum(-1)
        drawn = torch.rand(len(logits), 1, generator=self.chance, dtype=reached.dtype).to(logits.device) * reached[:, -1:]
        last = (shares > 0).sum(-1, keepdim=True) - 1
        return tokens.gather(-1, (reached <= drawn).sum(-1, keepdim=True).minimum(last))[:, 0]


def nucleus(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """(shares, tokens), both (prompts, tokens): the likeliest tokens in falling order, the shares float64.

    The smallest set that has at least `top_p` of the probability keeps its shares, the others have 0 (nucleus sampling,
    arXiv:1904.09751). A temperature of 0 leaves the likeliest token alone.
    """
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
        return torch.ones(tokens.shape, dtype=torch.float64, device=logits.device), tokens
    shares = (logits.float() / temperature).softmax(-1)
    falling, tokens = shares.topk(min(LIKELIEST, shares.shape[-1]), -1)
    if falling.shape != shares.shape and bool((falling.sum(-1) < top_p + 1e-4).any()):
        falling, tokens = shares.sort(-1, descending=True)
    falling = falling.double()
    before = falling.cumsum(-1) - falling
    return falling.where(before < top_p, torch.zeros_like(falling)), tokens


def batches_by_length(prompts: Sequence[Sequence[int]], most_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of prompts to run together: similar lengths, long ones first, at most 64 prompts and `most_tokens` tokens."""
    found: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        longest = len(prompts[found[-1][0]]) if found else 0
        if not found or len(found[-1]) == BATCH_PROMPTS or (len(found[-1]) + 1) * longest > most_tokens:
            found.append([])
        found[-1].append(index)
    return found


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (prompts, longest) int64: prompts end together, and the mask is 0 before the start of each."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@torch.inference_mode()
def generate_resident(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                      done: Callable[[Sequence[int]], bool],
                      tick: Callable[[str, float], None] = lambda _step, _share: None,
                      choose: Choose = likeliest) -> Iterator[tuple[int, list[int]]]:
    """Yield (index, new tokens) for every prompt, at most `max_new_tokens` each; `done` says whether an answer has ended,
    `choose` how tokens follow from logits.
    """
    finished = 0
    for batch in batches_by_length(prompts):
        ids, mask = (tensor.to(model.device) for tensor in left_padded([prompts[index] for index in batch]))
        new: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)
        cache = None
        for count in itertools.count():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                        logits_to_keep=1)
            cache = out.past_key_values
            ids = choose(out.logits[:, -1], count)[:, None]
            for place, token in enumerate(ids[:, 0].tolist()):
                if not ended[place]:
                    new[place].append(token)
                    ended[place] = len(new[place]) == max_new_tokens or done(new[place])
            if all(ended):
                break
            mask = torch.cat([mask, mask.new_ones(len(batch), 1)], 1)
        yield from zip(batch, new, strict=True)
        finished += len(batch)
        tick("generating", finished / len(prompts))
