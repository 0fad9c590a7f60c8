"""A checkpoint that answers in transformers, token by token, with its own cache and its own random numbers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.interface import Alternative, Answer, Heard, Piece, Question, Sampling, Token, require_prompt
from tsotsallm.engine.resident import resident
from tsotsallm.errors import TsotsallmError

HALF = "�"
"""What a decoder returns for bytes that are not a whole character yet."""


class Transformer:
    """A checkpoint in memory, by default in float32 on the CPU; it answers one question at a time."""

    slots = 1

    def __init__(self, source: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.codec = source.codec           # faults of the tokenizer are reported before weights are read
        self.model = resident(source, dtype, device)
        self.context = source.spec.context
        self.converses = self.codec.chat is not None
        self.notes, self.no_chat = self.codec.notes, self.codec.no_chat

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the prefix that the tokenizer puts before it."""
        return self.codec.encode(text)

    def _ids(self, question: Question) -> list[int]:
        prompt = question.prompt
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        if question.converses:
            return self.codec.conversation([item for item in prompt if isinstance(item, dict)])
        ids = [item for item in prompt if isinstance(item, int)]
        if any(not 0 <= item < self.codec.size for item in ids):
            raise TsotsallmError(f"the prompt has a token that the model does not have; its tokens are 0 to "
                                 f"{self.codec.size - 1}")
        return ids

    @torch.inference_mode()
    def speak(self, question: Question, heard: Heard) -> Answer:
        """Answer one question, piece by piece."""
        ids = self._ids(question)
        require_prompt(ids, self.context)
        ends = set(self.codec.ends)
        most = min(question.tokens, self.context - len(ids))
        pieces = _Pieces(self.codec, question, heard)
        choose = _Choice(question.sampling, self.model.device, ids)
        began = time.perf_counter()
        out = self.model(torch.tensor([ids], device=self.model.device), use_cache=True, logits_to_keep=1)
        first = time.perf_counter()
        made, finish = 0, "length"
        while made < most:
            logits = out.logits[0, -1].float()
            token = choose(logits)
            made += 1
            if token in ends:
                finish = "stop"
                break
            if (ended := pieces.take(token, logits)) is not None:
                finish = ended
                break
            if made < most:
                out = self.model(torch.tensor([[token]], device=self.model.device), past_key_values=out.past_key_values,
                                 use_cache=True)
        pieces.close(cut=finish == "cancelled")
        return Answer(finish, len(ids), made, first - began, time.perf_counter() - first)

    @torch.inference_mode()
    def prompt_tokens(self, ids: Sequence[int], likeliest: int, stopped: Callable[[], bool]) -> Iterator[Token]:
        """Yield the tokens of a prompt with their log-probabilities, the first without."""
        if not ids or stopped():
            return
        logits = self.model(torch.tensor([list(ids)], device=self.model.device)).logits[0].float()
        yield Token(*_text_of(self.codec, ids[0]), None)
        for place in range(1, len(ids)):
            yield _token(self.codec, int(ids[place]), logits[place - 1], likeliest)


class _Choice:
    """Chooses the next token by a sampling; the same for the same seed, whatever else runs in the process."""

    def __init__(self, sampling: Sampling, device: torch.device, prompt: Sequence[int]) -> None:
        from transformers import (
            LogitsProcessorList,
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        if sampling.grammar is not None:
            raise TsotsallmError("grammars and JSON formats are for GGUF files, which llama.cpp runs; write one with "
                                 "`tsotsallm export MODEL --gguf OUT.gguf`")
        self.sampling = sampling
        self.greedy = sampling.temperature == 0
        self.device = device
        self.chance = torch.Generator("cpu").manual_seed(sampling.seed)
        self.seen = deque(prompt, maxlen=sampling.repeat_last_n)
        self.warp = LogitsProcessorList()
        if not self.greedy:
            self.warp.append(TemperatureLogitsWarper(float(max(sampling.temperature, 1e-4))))
            if sampling.top_k:
                self.warp.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self.warp.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p:
                self.warp.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, logits: Tensor) -> int:
        logits = self._changed(logits)
        if self.greedy:
            token = int(logits.argmax())
        else:
            left = self.warp(torch.empty(1, 0, dtype=torch.long, device=self.device), logits[None])[0]
            token = int(torch.multinomial(left.softmax(-1).cpu(), 1, generator=self.chance))
        self.seen.append(token)
        return token

    def _changed(self, logits: Tensor) -> Tensor:
        """Logits (vocabulary,) with bias and penalties as in llama.cpp; the given ones are not changed."""
        chosen = self.sampling
        if chosen.logit_bias:
            chosen.require_tokens(len(logits))
            tokens, added = zip(*chosen.logit_bias, strict=True)
            logits = logits.index_add(0, torch.tensor(tokens, device=logits.device),
                                      torch.tensor(added, dtype=logits.dtype, device=logits.device))
        if chosen.penalises and self.seen:
            seen, counts = torch.unique(torch.tensor(list(self.seen), device=logits.device), return_counts=True)
            repeated = logits[seen]
            repeated = torch.where(repeated > 0, repeated / chosen.repetition_penalty, repeated * chosen.repetition_penalty)
            repeated = repeated - (counts * chosen.frequency_penalty + chosen.presence_penalty)
            logits = logits.index_copy(0, seen, repeated)
        return logits


class _Pieces:
    """Turns tokens into pieces of text: whole characters, and nothing that may be the beginning of a stop text."""

    def __init__(self, codec: TextCodec, question: Question, heard: Heard) -> None:
        self.codec, self.question, self.heard = codec, question, heard
        self.ids: list[int] = []
        self.text, self.sent = "", 0
        self.waiting: list[Token] = []

    def take(self, token: int, logits: Tensor) -> str | None:
        """Add a token; returns why the answer ends with it, or None where it continues."""
        self.ids.append(token)
        if self.question.likeliest is not None:
            self.waiting.append(_token(self.codec, token, logits, self.question.likeliest))
        text = self.codec.continuation(self.ids)
        if text.endswith(HALF):
            return None
        self.text = text
        places = [place for stop in self.question.stop if (place := text.find(stop, max(0, self.sent - len(stop)))) >= 0]
        if places:
            self.text = text[:min(places)]
            return "stop"
        held = max((size for stop in self.question.stop for size in range(1, len(stop)) if text.endswith(stop[:size])),
                   default=0)
        return "cancelled" if self._send(len(text) - held) else None

    def _send(self, end: int) -> bool:
        piece, self.sent = self.text[self.sent:end], max(self.sent, end)
        if not piece and not self.waiting:
            return False
        tokens, self.waiting = tuple(self.waiting), []
        return bool(self.heard(Piece(piece, tokens)))

    def close(self, *, cut: bool) -> None:
        """Pass on the text that was held back, unless the answer was cut."""
        if not cut:
            self._send(len(self.text))


def _text_of(codec: TextCodec, token: int) -> tuple[str, bytes]:
    text = codec.continuation([token], special=True)
    return text, text.encode()


def _token(codec: TextCodec, token: int, logits: Tensor, likeliest: int) -> Token:
    shares = logits.log_softmax(-1)
    best = shares.topk(min(likeliest, len(shares)))
    return Token(*_text_of(codec, token), float(shares[token]), tuple(
        Alternative(*_text_of(codec, place), value)
        for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)))
