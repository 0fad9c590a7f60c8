"""Continuations by a model in memory: greedy ones of many prompts, or one as it comes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tsotsallm.errors import TsotsallmError

BATCH_TOKENS = 4096
BATCH_PROMPTS = 64


def batches_by_length(prompts: Sequence[Sequence[int]], most_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of prompts that run together: like lengths, long ones first, at most 64 prompts and so many tokens."""
    found: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: -len(prompts[index])):
        longest = len(prompts[found[-1][0]]) if found else 0
        if not found or len(found[-1]) == BATCH_PROMPTS or (len(found[-1]) + 1) * longest > most_tokens:
            found.append([])
        found[-1].append(index)
    return found


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (prompts, longest): prompts end together, and the mask is 0 before each begins."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@torch.inference_mode()
def generate_resident(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int,
                      done: Callable[[Sequence[int]], bool],
                      tick: Callable[[str, float], None] = lambda _step, _share: None) -> Iterator[tuple[int, list[int]]]:
    """Yield (index, new tokens) of every prompt, at most `max_new_tokens` each; `done` says when one has ended."""
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


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise TsotsallmError(f"sampling with temperature {self.temperature}, top-p {self.top_p} and top-k {self.top_k} "
                                 "is not possible; they take 0 or more, over 0 up to 1, and 0 (all) or more")


def turn_ends(tokenizer: Any) -> list[int]:
    """Special tokens that its chat template puts after an answer: a conversation's turn ends there."""
    def ids(answer: str) -> list[int]:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        return list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])

    first, second = ids("b"), ids("c")
    same = next((place for place in range(1, min(len(first), len(second))) if first[-place] != second[-place]), 1) - 1
    after = first[len(first) - same:]
    return [token for token in after if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder][:1]


def stream_resident(model: Any, tokenizer: Any, ids: Tensor, tokens: int, sampling: Sampling,
                    heard: Callable[[str], None], ends: Sequence[int] = ()) -> None:
    """Tell `heard` the continuation of one prompt, ids (1, tokens), piece by piece.

    The tokens in `ends` end it as well as the model's own.
    """
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                heard(text)

    torch.manual_seed(sampling.seed)
    chosen: dict[str, Any] = {"do_sample": False} if sampling.temperature == 0 else {
        "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    own = model.generation_config.eos_token_id
    stops = sorted({*ends, *(own if isinstance(own, list) else [own] if own is not None else [])})
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, pad_token_id=tokenizer.eos_token_id,
                   eos_token_id=stops or None, streamer=streamer, **chosen)


def pieces(speak: Callable[[Callable[[str], None]], Any]) -> Iterator[str]:
    """Yield what `speak` tells its listener, as it comes; errors are raised here."""
    heard: queue.Queue[str | BaseException | None] = queue.Queue()

    def work() -> None:
        try:
            speak(heard.put)
            heard.put(None)
        except BaseException as error:
            heard.put(error)

    threading.Thread(target=work, daemon=True).start()
    while (piece := heard.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        yield piece
