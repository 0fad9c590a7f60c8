"""Greedy continuations of many prompts by a model in memory, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096
BATCH_PROMPTS = 64


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
                      tick: Callable[[str, float], None] = lambda _step, _share: None) -> Iterator[tuple[int, list[int]]]:
    """Yield (index, new tokens) for every prompt, at most `max_new_tokens` each; `done` says whether an answer has ended."""
    finished = 0
    for batch in batches_by_length(prompts):
        ids, mask = (tensor.to(model.device) for tensor in left_padded([prompts[index] for index in batch]))
        new: list[list[int]] = [[] for _ in batch]
        ended = [False] * len(batch)
        cache = None
        while True:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]
            out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                        logits_to_keep=1)
            cache = out.past_key_values
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
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
