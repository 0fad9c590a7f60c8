"""One model under examination: its text turned into tokens, scored by streaming, and continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import ResourceError, TaskError
from tsotsallm.evaluation.cost import parameters_of
from tsotsallm.machine import free_ram_bytes, release_memory
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.likelihood import Likelihood, Tree, log_likelihoods
from tsotsallm.streaming.score import final_states
from tsotsallm.streaming.sweep import Tick, silent
from tsotsallm.units import human_bytes

RESIDENT_ROOM = 1.2
"""Memory of a resident model relative to its float32 weights: cache and activations take up to a fifth more."""


@cache
def _file_sha256(path: Path, _size: int, _mtime_ns: int) -> bytes:
    """Computed once as long as a file does not change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


Pieces = tuple[int, ...]
MOST_BRANCH_TOKENS = 2048
"""Continuations of one prompt that run side by side; more of them take turns."""


class Examinee:
    """A checkpoint under evaluation: log-likelihoods stream layer by layer; generation is resident where the model fits."""

    def __init__(self, view: View, name: str, scratch: Path, *, device: str = "cpu", tick: Tick = silent,
                 by_sweeps: bool | None = None) -> None:
        self.view, self.name, self.scratch, self.tick = view, name, scratch, tick
        self.device = torch.device(device)
        self.by_sweeps = by_sweeps
        self.codec = view.checkpoint.codec
        self._kept: tuple[str, HiddenStates] | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the view reads."""
        return self.view.checkpoint

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all weights, their order, config and tokenizer: all that a score depends on besides the protocol."""
        paths = {record.path for record in self.checkpoint.records.values()} | self.checkpoint.source.files()
        digest = hashlib.sha256(repr(self.view.order).encode())
        for path in sorted(paths, key=lambda path: path.name):
            known = self.checkpoint.source.stored(path).known_sha256
            if known is None:
                status = path.stat()
                known = _file_sha256(path, status.st_size, status.st_mtime_ns).hex()
            digest.update(path.name.encode() + bytes.fromhex(known))
        return digest.hexdigest()

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Equal for tokenizers that have the same tokens and put the same ones before a text."""
        vocabulary = sorted(self.codec.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps([vocabulary, self.encode("a b")]).encode()).hexdigest()[:16]

    @property
    def context(self) -> int:
        """Positions that the model knows, in tokens."""
        return self.checkpoint.spec.context

    # -- text and tokens ------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with the BOS that the tokenizer adds, once."""
        return self.codec.encode_once(text)

    @property
    def start_token(self) -> int:
        """The token before a text that nothing precedes: BOS, else EOS; raises TaskError where there is neither."""
        token = self.codec.bos if self.codec.bos is not None else self.codec.eos
        if token is None:
            raise TaskError(f"{self.name}: the tokenizer has neither BOS nor EOS, so the first token of a text cannot be "
                            "scored")
        return token

    def pair(self, prompt: str, continuation: str) -> tuple[Pieces, Pieces]:
        """Tokens of a prompt and of its continuation, split as lm-evaluation-harness splits them.

        Spaces at the end of the prompt move to the continuation; both are encoded together, and the continuation begins
        after as many tokens as the prompt has by itself. Raises TaskError where the continuation adds no token.
        """
        if not prompt:
            tokens = self.codec.encode(continuation, prefix=False)
            return (self.start_token,), tuple(tokens if tokens[0] != self.start_token else tokens[1:])
        bare = prompt.rstrip()
        continuation, prompt = prompt[len(bare):] + continuation, bare
        before = self.encode(prompt)
        after = self.encode(prompt + continuation)[len(before):]
        if not after:
            raise TaskError(f"the continuation {continuation!r} adds no token to its prompt; a choice must have text of its "
                            "own")
        return tuple(before), tuple(after)

    def truncates(self, prompt: str, continuations: Sequence[str], new_tokens: int = 0) -> bool:
        """Whether a prompt loses its beginning because, with what follows it, it is longer than the model's context."""
        if len(prompt) + sum(map(len, continuations[:1])) + new_tokens < self.context // 4:
            return False        # a token has at least one byte, and few characters have four
        pairs = [self.pair(prompt, one) for one in continuations] or [(tuple(self.encode(prompt)), (0,) * new_tokens)]
        return any(len(before) + len(after) > self.context + (not new_tokens) for before, after in pairs)

    # -- scores ---------------------------------------------------------------------------------------------------

    def likelihoods(self, asked: Sequence[tuple[str, Sequence[str]]]) -> Iterator[tuple[int, list[Likelihood]]]:
        """Yield (index, one likelihood per continuation) for every (prompt, continuations), as each is finished."""
        owners = [(index, place) for index, (_, continuations) in enumerate(asked) for place in range(len(continuations))]
        pairs = [self.pair(asked[index][0], asked[index][1][place]) for index, place in owners]
        unfinished: dict[int, dict[int, Likelihood]] = {}
        for number, score in self.token_likelihoods(pairs):
            index, place = owners[number]
            done = unfinished.setdefault(index, {})
            done[place] = score
            if len(done) == len(asked[index][1]):
                yield index, [done[place] for place in range(len(done))]
                del unfinished[index]

    def token_likelihoods(self, pairs: Sequence[tuple[Pieces, Pieces]]) -> Iterator[tuple[int, Likelihood]]:
        """Yield (index, likelihood) of tokenised (prompt, continuation) pairs; equal prompts are computed once.

        A pair that is longer than the model's context loses the beginning of its prompt, as in lm-evaluation-harness.
        Raises TaskError where a continuation alone is longer.
        """
        branches: dict[Pieces, list[list[int]]] = {}
        for index, (prompt, continuation) in enumerate(pairs):
            room = self.context + 1 - len(continuation)
            if room < 1:
                raise TaskError(f"a continuation of {len(continuation)} tokens does not fit in the {self.context} positions "
                                f"that {self.name} knows")
            groups = branches.setdefault(prompt[-room:], [[]])
            if sum(len(pairs[other][1]) for other in groups[-1]) + len(continuation) > MOST_BRANCH_TOKENS and groups[-1]:
                groups.append([])
            groups[-1].append(index)
        owners = [(prompt, group) for prompt, groups in branches.items() for group in groups]
        trees = [Tree(prompt, tuple(pairs[index][1] for index in group)) for prompt, group in owners]
        for number, scores in log_likelihoods(self.view, trees, self.scratch, self.device, self.tick):
            yield from zip(owners[number][1], scores, strict=True)

    def rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """Yield (index, log p of the whole text in nats).

        A text is split into windows of the model's context, and every window predicts all of its tokens: the first one from
        the start token, the others from the tokens before them.
        """
        pairs: list[tuple[Pieces, Pieces]] = []
        owners: list[int] = []
        for index, text in enumerate(texts):
            tokens = tuple(self.encode(text))
            first = tokens[:self.context]
            windows: list[tuple[Pieces, Pieces]] = [((self.start_token,), first)] if first else []
            for start in range(len(first), len(tokens), self.context):
                part = tokens[start:start + self.context]
                windows.append((tokens[start - (self.context - len(part)) - 1:start], part))
            pairs += windows
            owners += [index] * len(windows)
        totals = dict.fromkeys(range(len(texts)), 0.0)
        for number, score in self.token_likelihoods(pairs):
            totals[owners[number]] += score.total
        yield from totals.items()

    def final_states(self, corpus: Corpus) -> HiddenStates:
        """Final hidden states of a corpus, kept for the next model that is compared with this one on the same corpus."""
        key = corpus.fingerprint()
        if self._kept is None or self._kept[0] != key:
            self._kept = key, final_states(self.view, corpus, self.scratch / "kept-states.f32", self.device, self.tick)
        return self._kept[1]

    # -- generation -----------------------------------------------------------------------------------------------

    @property
    def resident_bytes(self) -> int:
        """Memory that the whole model takes in float32, with its cache and activations."""
        return int(RESIDENT_ROOM * 4 * parameters_of(self.view))

    @property
    def generates_by_sweeps(self) -> bool:
        """Whether generation reads the weights again for every token, because the model does not fit in memory."""
        if self.by_sweeps is not None:
            return self.by_sweeps
        return "model" not in self.__dict__ and self.resident_bytes > self.free_bytes

    @property
    def free_bytes(self) -> int:
        """Free memory of the device that the model runs on."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        return free_ram_bytes()

    @cached_property
    def model(self) -> Any:
        """The whole model in memory, in float32; raises ResourceError where it does not fit."""
        from tsotsallm.engine.resident import resident

        if self.resident_bytes > self.free_bytes:
            raise ResourceError(f"{self.name} takes {human_bytes(self.resident_bytes)} of memory as a whole, but only "
                                f"{human_bytes(self.free_bytes)} are free; let it generate by sweeps, or evaluate tasks "
                                "with choices, which stream")
        return resident(self.view, torch.float32, str(self.device))

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str],
                 sink: Callable[[int, str], None]) -> None:
        """Continue every prompt greedily, to a stop text, an end token or `max_new_tokens`; `sink` receives (index, text).

        A prompt that leaves no room for the new tokens loses its beginning; TaskError where they alone do not fit.
        """
        room = self.context - max_new_tokens
        if room < 1:
            raise TaskError(f"{max_new_tokens} new tokens do not fit in the {self.context} positions that {self.name} knows")
        encoded = [(self.encode(prompt) or [self.start_token])[-room:] for prompt in prompts]
        for index, text, _ in self._continued(encoded, max_new_tokens, stop):
            sink(index, text)

    def request(self, text: str) -> list[int]:
        """Tokens of a request in the chat template; raises TaskError where the model has none."""
        if self.codec.chat is None:
            raise TaskError(f"{self.name} {self.codec.no_chat}, so it answers no instructions; evaluate it on other tasks")
        return self.codec.conversation([{"role": "user", "content": text}])

    def answer(self, requests: Sequence[str], max_new_tokens: int, sink: Callable[[int, str, bool], None]) -> None:
        """Answer every request greedily in the chat template; `sink` receives (index, text, whether the model ended it).

        Raises TaskError where the model has no chat template, or where a request leaves no room for the answer.
        """
        encoded = [self.request(text) for text in requests]
        longest = max(map(len, encoded), default=0) + max_new_tokens
        if longest > self.context:
            raise TaskError(f"an instruction and its answer take {longest} tokens, but {self.name} knows {self.context} "
                            "positions; give shorter ones")
        for found in self._continued(encoded, max_new_tokens, ()):
            sink(*found)

    def _continued(self, encoded: Sequence[Sequence[int]], max_new_tokens: int,
                   stop: Sequence[str]) -> Iterator[tuple[int, str, bool]]:
        """Yield (index, text before the first stop, whether there was one) for tokenised prompts, continued greedily."""
        ends = set(self.codec.ends)

        def text_of(tokens: Sequence[int]) -> tuple[str, bool]:
            kept = list(tokens)
            ended = next((place for place, token in enumerate(kept) if token in ends), None)
            text = self.codec.decode(kept[:ended], special=False)
            places = [place for word in stop if (place := text.find(word)) >= 0]
            return text[:min(places)] if places else text, bool(places) or ended is not None

        if self.generates_by_sweeps:
            from tsotsallm.streaming.generate import generate_by_sweeps

            results = generate_by_sweeps(self.view, encoded, max_new_tokens, lambda tokens: text_of(tokens)[1], self.scratch,
                                         self.device, self.tick)
        else:
            from tsotsallm.engine.generation import generate_resident

            results = generate_resident(self.model, encoded, max_new_tokens, lambda tokens: text_of(tokens)[1], self.tick)
        for index, tokens in results:
            yield index, *text_of(tokens)

    def forget_model(self) -> None:
        """Free the memory of a resident model."""
        self.__dict__.pop("model", None)
        release_memory()
