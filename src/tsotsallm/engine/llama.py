"""A GGUF file in llama.cpp: its server, in this process by xllamacpp, or as the program llama-server from the PATH."""

from __future__ import annotations

import importlib.util
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.textrules import TextRules
from tsotsallm.engine.interface import Alternative, Answer, Heard, Piece, Question, Sampling, Token, require_prompt
from tsotsallm.engine.server import HttpServer, ask
from tsotsallm.errors import CheckpointError, ConversationError, MissingExtraError, ResourceError, TsotsallmError
from tsotsallm.files import Json, JsonObject
from tsotsallm.machine import chosen_threads, cores, free_ram_bytes, idle_cores
from tsotsallm.units import human_bytes

if TYPE_CHECKING:
    from torch import Tensor

CacheType = Literal["f32", "f16", "q8_0", "q4_0"]
CACHE_BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
MOST_FORCED = 1e6
USUAL_CONTEXT = 8192
"""Tokens of a conversation at most, unless more are asked for: llama.cpp takes the memory of the whole cache at once."""
LEAST_CONTEXT = 512
CACHE_SHARE = 0.25
"""Share of the memory that is free beside the weights; the caches of all conversations take no more, unless asked for."""


def installed() -> bool:
    """Whether llama.cpp is available, as xllamacpp or as llama-server."""
    return in_process() or shutil.which("llama-server") is not None


def in_process() -> bool:
    """Whether llama.cpp is available as xllamacpp, in this process."""
    return importlib.util.find_spec("xllamacpp") is not None


def most_context(known: int) -> int:
    """Tokens of a conversation at most where nobody asks for more, of those that a model knows."""
    return min(known, USUAL_CONTEXT)


def usual_context(known: int, slots: int, cache_bytes_per_token: float, free_bytes: int) -> int:
    """Tokens of each of `slots` conversations: at most 8192 of those that a model knows, and fewer where their caches would
    take more than a quarter of the free memory, but not fewer than 512."""
    most = most_context(known)
    if cache_bytes_per_token == 0:
        return most
    room = int(CACHE_SHARE * free_bytes / (slots * cache_bytes_per_token)) // 256 * 256      # llama.cpp pads to 256
    return min(most, max(LEAST_CONTEXT, room))


class Llama:
    """One GGUF file, ready to run; raises MissingExtraError without llama.cpp, CheckpointError for a file that cannot run.

    kv           type of the key-value cache, f32 for comparisons
    adapter      GGUF file of low-rank corrections to run with it
    context      tokens of each conversation (None: see `usual_context`)
    threads      threads of the engine (None: the number that the environment sets, else one for each idle core)
    slots        conversations at a time, batched together
    keep_prompt  whether a slot reuses the tokens that it has processed for the next question that begins alike
    """

    def __init__(self, path: Path, *, kv: CacheType = "f16", adapter: Path | None = None, context: int | None = None,
                 threads: int | None = None, slots: int = 1, keep_prompt: bool = True) -> None:
        self._program = None if in_process() else shutil.which("llama-server")
        if not installed():
            raise MissingExtraError("xllamacpp (or llama-server on the PATH)", "llama", "running GGUF files")
        if kv not in get_args(CacheType):
            raise TsotsallmError(f"the key-value cache cannot be {kv!r}; it can be {', '.join(get_args(CacheType))}")
        file = GgufFile.open(path)
        file.require_language_model()
        if adapter is not None:
            GgufFile.open(adapter).require_adapter_of(file)
        self.path, self.kv, self.slots, self.tokens = path, kv, slots, file.tokens
        self.rules = TextRules.read(file)
        self.chat = self.rules.chat
        self.converses = self.chat is not None
        self.no_chat = "has no chat template"
        self.file = file
        self.cache_bytes_per_token = (file.cache_elements_per_token or 0) * CACHE_BITS[kv] / 8
        self._adapter, self._keep_prompt = adapter, keep_prompt
        self.threads = threads or chosen_threads() or idle_cores()
        self.known = file.context or 0
        self.context = self._fitting(context)
        self.notes = self._notes(of_context=context is None, of_threads=not (threads or chosen_threads()))
        self._key = secrets.token_urlsafe(24)       # llama.cpp listens on a port, and answers only who has the key

    def _fitting(self, asked: int | None) -> int:
        """The tokens of a conversation, given how many are asked for; ResourceError where those do not fit in memory."""
        free = free_ram_bytes()
        if asked is None:
            return usual_context(self.known, self.slots, self.cache_bytes_per_token, max(free - self.file.size, 0))
        if (taken := self._cache_bytes(asked)) > free:
            raise ResourceError(f"the key-value cache of {asked} tokens{_each(self.slots)} takes {human_bytes(taken)}, but "
                                f"only {human_bytes(free)} of memory are free; choose fewer tokens with --context, or a "
                                "smaller type of cache with --kv q8_0")
        return asked

    def _cache_bytes(self, context: int) -> int:
        return int(self.slots * context * self.cache_bytes_per_token)

    def _notes(self, *, of_context: bool, of_threads: bool) -> tuple[str, ...]:
        """What was chosen for the user: a shorter context, fewer threads."""
        notes = []
        if of_context and self.context < self.known:
            taken = self._cache_bytes(self.context)
            notes.append(f"the context is {self.context} tokens{_each(self.slots)}, of {self.known} that the model knows"
                         f"{f' (cache: {human_bytes(taken)} of memory)' if taken else ''}; --context sets another number")
        if of_threads and self.threads < cores():
            notes.append(f"other programs are busy: llama.cpp computes with {self.threads} of {cores()} cores; --threads "
                         "sets another number")
        return tuple(notes)

    @cached_property
    def _server(self) -> Any:
        """The running engine, started with the first request.

        It has computed a token already: an engine whose loop has not begun cannot be stopped, and to split text it need not
        have begun.
        """
        if self._program is not None:
            return HttpServer(self._program, self._options(), self._key)
        import xllamacpp

        os.environ.setdefault("GGML_NO_BACKTRACE", "1")     # else it prints pages of text where it aborts
        asked = xllamacpp.CommonParams()
        asked.model.path, asked.n_ctx, asked.n_parallel = str(self.path), self.context * self.slots, self.slots
        asked.verbosity, asked.warmup, asked.fit_params, asked.api_keys = -1, False, False, [self._key]
        asked.cache_ram_mib = 0         # else processed prompts are kept beside the slots, up to 8 GB of them
        asked.cache_type_k = asked.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{self.kv.upper()}")
        attention = xllamacpp.llama_flash_attn_type
        asked.flash_attn_type = (attention.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.kv.startswith("q") else
                                 attention.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = self.threads
        if self._adapter is not None:
            asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(self._adapter), 1.0)]
        try:
            server = xllamacpp.Server(asked)
            server.handle_completions({"prompt": [self.first_letter], "max_tokens": 1, "cache_prompt": False})
            return server
        except RuntimeError as error:
            raise CheckpointError(f"llama.cpp cannot load {self.path} ({error}); is the file whole, its architecture known, "
                                  f"and {human_bytes(self.path.stat().st_size)} of memory free?") from None

    def _options(self) -> list[str]:
        """The command line of llama-server, with the same settings as for xllamacpp."""
        options = ["--model", str(self.path), "--ctx-size", str(self.context * self.slots), "--parallel", str(self.slots),
                   "--threads", str(self.threads), "--no-warmup", "--cache-ram", "0",
                   "--cache-type-k", self.kv, "--cache-type-v", self.kv, "--flash-attn",
                   "on" if self.kv.startswith("q") else "off"]
        return options + (["--lora", str(self._adapter)] if self._adapter is not None else [])

    def speak(self, question: Question, heard: Heard) -> Answer:
        """Answer one question; there are as many at a time as slots, and others wait for a free one."""
        asked: dict[str, object] = _sampling_fields(question.sampling, len(self.tokens)) | {
            "max_tokens": question.tokens, "stream": True, "stream_options": {"include_usage": True},
            "cache_prompt": self._keep_prompt} | ({"stop": list(question.stop)} if question.stop else {})
        ids = self._ids(question)
        require_prompt(ids, self.context, self.known)
        asked["prompt"] = ids
        if question.likeliest is not None:
            asked["logprobs"] = max(1, question.likeliest)      # with 0 no token would be reported
        hearing = _Hearing(heard, question.likeliest)
        began = time.perf_counter()
        try:
            answer = self._server.handle_completions(asked, hearing.take)
        except (ValueError, RuntimeError) as error:
            raise TsotsallmError(f"llama.cpp could not answer: {error}") from None
        if isinstance(answer, dict):
            hearing.take(answer)
        if hearing.failed is not None:
            raise TsotsallmError(f"llama.cpp could not answer: {hearing.failed}")
        return hearing.answer(time.perf_counter() - began)

    def _ids(self, question: Question) -> list[int]:
        """Tokens of a prompt; conversations are rendered by the same code as for checkpoints, and split by llama.cpp."""
        if isinstance(question.prompt, str):
            return self.tokenize(question.prompt)
        if not question.converses:
            return [item for item in question.prompt if isinstance(item, int)]
        if self.chat is None:
            raise ConversationError(f"{self.path} has no chat template: it completes text, but does not converse; use "
                                    "`tsotsallm generate`")
        ids = self._cut(self.rules.normal(self.chat.render([item for item in question.prompt if isinstance(item, dict)])))
        return [self.rules.bos, *ids] if self.rules.adds_bos and ids[:1] != [self.rules.bos] else ids

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text as the checkpoint's tokenizer splits it, with its prefix."""
        return [*self.prefix, *self.encode_with_ends(text)[0]]

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens that are put before a text."""
        return self.rules.prefix

    def encode_with_ends(self, text: str) -> tuple[list[int], None]:
        """Token ids of a text without prefix, and None: llama.cpp does not report where in the text they end."""
        return self._cut(self.rules.as_cut(text)), None

    def _cut(self, text: str) -> list[int]:
        return [int(one) for one in self._raw("/tokenize", {"content": text, "add_special": False,
                                                            "parse_special": True})["tokens"]]

    def prompt_tokens(self, ids: Sequence[int], likeliest: int, stopped: Callable[[], bool]) -> Iterator[Token]:
        """Yield a prompt's tokens with their log-probabilities, the first without; ends early once `stopped` is true."""
        for place in range(len(ids)):
            if stopped():
                return
            if place == 0:
                yield Token(*self._text_of(ids[0]), None)
                continue
            answer: Json = self._server.handle_completions({
                "prompt": list(ids[:place]), "max_tokens": 1, "logprobs": max(1, likeliest), "temperature": 0,
                "logit_bias": [[int(ids[place]), MOST_FORCED]]})    # the reported probability is that before the bias
            if "error" in answer:
                raise TsotsallmError(f"llama.cpp could not score the text: {answer['error']['message']}")
            content = (answer["choices"][0]["logprobs"] or {}).get("content")
            if content:
                yield _token(content[0], likeliest)
            else:                       # part of a character has no text, and llama.cpp reports nothing for it
                shares = self.next_log_probabilities(ids[:place])
                best = shares.topk(max(1, likeliest))
                yield Token(*self._text_of(ids[place]), float(shares[ids[place]]), tuple(
                    Alternative(*self._text_of(token), value)
                    for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True))[:likeliest])

    def _text_of(self, token: int) -> tuple[str, bytes]:
        text = str(self._raw("/detokenize", {"tokens": [int(token)]})["content"])
        return text, text.encode()

    def raw_tokens(self, text: str) -> list[int]:
        """Token ids of a text as llama.cpp by itself splits it, with the prefix that it adds."""
        return [int(one) for one in self._raw("/tokenize", {"content": text, "add_special": True,
                                                            "parse_special": True})["tokens"]]

    def raw_conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation as llama.cpp by itself renders and splits it; empty where it refuses to."""
        found = self._raw("/apply-template", {"messages": [dict(message) for message in messages]})
        return self.raw_tokens(str(found["prompt"])) if "prompt" in found else []

    def ends_at(self, token: int) -> bool:
        """Whether llama.cpp ends an answer at a token; TsotsallmError where it does not answer."""
        answer: Json = self._server.handle_completions({
            "prompt": [self.first_letter], "max_tokens": 2, "temperature": 0, "logit_bias": [[int(token), MOST_FORCED]]})
        if "error" in answer:
            raise TsotsallmError(f"llama.cpp could not answer: {answer['error']['message']}")
        return bool(answer["choices"][0]["finish_reason"] == "stop")

    @property
    def first_letter(self) -> int:
        """A token of one or more letters, which has a text of its own and does not end an answer."""
        return next((place for place, token in enumerate(self.tokens) if token.isascii() and token.isalpha()), 0)

    def _raw(self, place: str, asked: Mapping[str, object]) -> Json:
        """The answer of llama.cpp's own HTTP server on this machine."""
        address = self._server.address if isinstance(self._server, HttpServer) else self._server.listening_address
        return ask(address + place, asked, self._key)

    def timed(self, prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        """Seconds that llama.cpp takes for a prompt, and for `tokens` tokens after it."""
        answer: Json = self._server.handle_completions({"prompt": list(prompt), "max_tokens": tokens, "temperature": 0,
                                                       "ignore_eos": True, "cache_prompt": False})
        if "error" in answer:
            raise TsotsallmError(f"llama.cpp could not answer: {answer['error']['message']}")
        found = answer["timings"]
        return found["prompt_ms"] / 1000, found["predicted_ms"] / 1000

    def log_likelihoods(self, ids: Sequence[int]) -> Iterator[float]:
        """Yield log P of every token after the first in nats; raises CheckpointError where it is not a number."""
        for token in itertools.islice(self.prompt_tokens(ids, 1, lambda: False), 1, None):
            if token.logprob is None:
                raise CheckpointError(f"{self.path}: the probability of a token is not a number; its weights are damaged: "
                                      "export or copy it again")
            yield token.logprob

    def next_log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """log P in nats of every token of the vocabulary after the given ones, (vocabulary,) float32."""
        import torch

        answer: Json = self._server.handle_completions({
            "prompt": list(ids), "max_tokens": 1, "logprobs": len(self.tokens), "logit_bias": [[self.first_letter,
                                                                                                MOST_FORCED]]})
        if "error" in answer:
            raise TsotsallmError(f"llama.cpp could not score the text: {answer['error']['message']}")
        log_shares = torch.full((len(self.tokens),), float("-inf"))
        for candidate in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            log_shares[candidate["id"]] = candidate["logprob"]
        return log_shares


def _each(slots: int) -> str:
    return f" for each of {slots} conversations" if slots > 1 else ""


def _sampling_fields(sampling: Sampling, vocabulary: int) -> dict[str, object]:
    """A sampling as fields of llama.cpp's request; the order of the steps is that for checkpoints, not llama.cpp's own."""
    sampling.require_tokens(vocabulary)
    fields = {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p,
        "seed": sampling.seed, "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty, "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": sampling.repeat_last_n, "logit_bias": [list(one) for one in sampling.logit_bias],
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"]}
    return fields | ({} if sampling.grammar is None else {"grammar": sampling.grammar})


class _Hearing:
    """Turns the chunks of a stream into pieces, and remembers how it ended."""

    def __init__(self, heard: Heard, likeliest: int | None) -> None:
        self.heard, self.likeliest = heard, likeliest or 0
        self.failed: str | None = None
        self.finish = "cancelled"
        self.made = 0
        self.last: JsonObject = {}

    def take(self, chunk: Json) -> bool:
        """Pass on one chunk; returns whether the answer should end."""
        if "error" in chunk:
            self.failed = chunk["error"]["message"]
            return False
        if chunk.get("usage"):
            self.last = chunk
        ended = False
        for choice in chunk.get("choices", []):
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            content = (choice.get("logprobs") or {}).get("content") or []
            tokens = tuple(_token(reported, self.likeliest) for reported in content)
            self.made += bool(text or tokens)
            self.finish = choice.get("finish_reason") or self.finish
            if text or tokens:
                ended = self.heard(Piece(text, tokens)) or ended
        return ended

    def answer(self, seconds: float) -> Answer:
        """How the answer ended; `seconds` stand in where llama.cpp reports no timing."""
        usage, timings = self.last.get("usage", {}), self.last.get("timings", {})
        return Answer(self.finish, usage.get("prompt_tokens", 0), usage.get("completion_tokens", self.made),
                      timings.get("prompt_ms", 0.0) / 1000, timings.get("predicted_ms", 1000 * seconds) / 1000)


def _token(told: Json, likeliest: int) -> Token:
    return Token(told["token"], bytes(told["bytes"]), told["logprob"], tuple(
        Alternative(one["token"], bytes(one["bytes"]), one["logprob"]) for one in told["top_logprobs"][:likeliest]))
