"""A GGUF file in llama.cpp: its own server, in xllamacpp and called in this process, or llama-server from the PATH."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tsotsallm.engine.generation import Sampling
from tsotsallm.engine.server import HttpServer
from tsotsallm.errors import CheckpointError, MissingExtraError, TsotsallmError

CacheType = Literal["f32", "f16", "q8_0", "q4_0"]
CACHE_BITS = {"f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}
MOST_FORCED = 1e6


def installed() -> bool:
    """Whether llama.cpp can be asked here: in xllamacpp, or as llama-server."""
    return _in_process() or shutil.which("llama-server") is not None


def _in_process() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


class Llama:
    """One GGUF file, ready to run; `kv` is the type of its key-value cache, f32 for comparisons."""

    def __init__(self, path: Path, *, kv: CacheType = "f16", adapter: Path | None = None, context: int = 0,
                 threads: int | None = None) -> None:
        try:
            import gguf
        except ImportError as error:
            raise MissingExtraError(str(error.name), "llama", "running GGUF files") from None
        self._program = None if _in_process() else shutil.which("llama-server")
        if not installed():
            raise MissingExtraError("xllamacpp (or llama-server on the PATH)", "llama", "running GGUF files")
        if kv not in get_args(CacheType):
            raise TsotsallmError(f"the key-value cache cannot be {kv!r}; it can be {', '.join(get_args(CacheType))}")
        for file in (path, *([adapter] if adapter else [])):
            if not file.is_file():
                raise CheckpointError(f"{file} does not exist; give a GGUF file, such as `tsotsallm export` writes")
            with file.open("rb") as content:
                if content.read(4) != b"GGUF":
                    raise CheckpointError(f"{file} is not a GGUF file (it does not begin with GGUF); give one such as "
                                          "`tsotsallm export` writes")
        self.path, self.kv = path, kv
        try:
            fields = gguf.GGUFReader(path).fields
            arch = fields["general.architecture"].contents()
            self.tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
            heads, layers, width, known = (int(fields[f"{arch}.{key}"].contents()) for key in (
                "attention.head_count_kv", "block_count", "attention.key_length", "context_length"))
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is damaged, cut short, or no language model ({type(error).__name__}: {error}); "
                                  "export or copy it again") from None
        self.context = context or known
        self.has_template = "tokenizer.chat_template" in fields
        self.cache_bytes_per_token = 2 * layers * heads * width * CACHE_BITS[kv] / 8
        self._adapter, self._threads = adapter, threads

    @cached_property
    def _server(self) -> Any:
        """The running engine: started when it is first asked something, since one that was never asked cannot be stopped."""
        if self._program is not None:
            return HttpServer(self._program, self._options())
        import xllamacpp

        asked = xllamacpp.CommonParams()
        asked.model.path, asked.n_ctx, asked.n_parallel = str(self.path), self.context, 1
        asked.verbosity, asked.warmup, asked.fit_params = -1, False, False
        asked.cache_type_k = asked.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{self.kv.upper()}")
        attention = xllamacpp.llama_flash_attn_type
        asked.flash_attn_type = (attention.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.kv.startswith("q") else
                                 attention.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        if self._threads is not None:
            asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = self._threads
        if self._adapter is not None:
            asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(self._adapter), 1.0)]
        try:
            return xllamacpp.Server(asked)
        except RuntimeError as error:
            raise CheckpointError(f"llama.cpp cannot load {self.path} ({error}); is the file whole, its architecture known, "
                                  f"and {self.path.stat().st_size >> 20} MiB of memory free?") from None

    def _options(self) -> list[str]:
        """What llama-server is told: the same as xllamacpp."""
        options = ["--model", str(self.path), "--ctx-size", str(self.context), "--parallel", "1", "--no-warmup",
                   "--cache-type-k", self.kv, "--cache-type-v", self.kv, "--flash-attn",
                   "on" if self.kv.startswith("q") else "off"]
        options += ["--threads", str(self._threads)] if self._threads is not None else []
        return options + (["--lora", str(self._adapter)] if self._adapter is not None else [])

    def complete(self, prompt: str | Sequence[int], tokens: int, sampling: Sampling | None = None,
                 heard: Callable[[str], None] | None = None) -> str:
        """The continuation of a text or of token ids, at most so many tokens; `heard` gets its pieces as they come."""
        asked = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "max_tokens": tokens}
        return self._streamed(self._server.handle_completions, asked, sampling, heard, lambda choice: choice.get("text"))

    def chat(self, messages: Sequence[dict[str, str]], tokens: int, sampling: Sampling | None = None,
             heard: Callable[[str], None] | None = None) -> str:
        """The answer to a conversation, formatted by the file's chat template."""
        if not self.has_template:
            raise CheckpointError(f"{self.path} has no chat template: it completes text, but does not converse; use "
                                  "`tsotsallm generate`")
        return self._streamed(self._server.handle_chat_completions, {"messages": list(messages), "max_tokens": tokens},
                              sampling, heard, lambda choice: choice.get("delta", {}).get("content"))

    def _streamed(self, handler: Any, asked: dict[str, Any], sampling: Sampling | None,
                  heard: Callable[[str], None] | None, text_of: Callable[[Any], str | None]) -> str:
        chosen = sampling or Sampling()
        asked |= {"temperature": chosen.temperature, "top_p": chosen.top_p, "top_k": chosen.top_k, "seed": chosen.seed,
                  "min_p": 0.0, "stream": True}
        pieces: list[str] = []
        failed: list[str] = []

        def take(chunk: Any) -> None:
            if "error" in chunk:
                failed.append(chunk["error"]["message"])
            for choice in chunk.get("choices", []):
                if text := text_of(choice):
                    pieces.append(text)
                    if heard is not None:
                        heard(text)

        answer = handler(asked, take)
        if answer is not None:
            take(answer)
        if failed:
            raise TsotsallmError(f"llama.cpp could not answer: {failed[0]}")
        return "".join(pieces)

    def timed(self, prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        """Seconds that llama.cpp took for a prompt, and for so many tokens after it."""
        answer: Any = self._server.handle_completions({"prompt": list(prompt), "max_tokens": tokens, "temperature": 0,
                                                       "ignore_eos": True, "cache_prompt": False})
        if "error" in answer:
            raise TsotsallmError(f"llama.cpp could not answer: {answer['error']['message']}")
        found = answer["timings"]
        return found["prompt_ms"] / 1000, found["predicted_ms"] / 1000

    def log_likelihoods(self, ids: Sequence[int]) -> Iterator[float]:
        """log P of every token after the first, given those before it."""
        for place in range(1, len(ids)):
            answer: Any = self._server.handle_completions({
                "prompt": list(ids[:place]), "max_tokens": 1, "logprobs": 1, "temperature": 0,
                "logit_bias": [[int(ids[place]), MOST_FORCED]]})    # the probability told is that before the bias
            if "error" in answer:
                raise TsotsallmError(f"llama.cpp could not score the text: {answer['error']['message']}")
            found = answer["choices"][0]["logprobs"]
            if found is None:           # half a character has no text, and llama.cpp tells nothing of it
                yield float(self.next_log_probabilities(ids[:place])[ids[place]])
            else:
                yield float(found["content"][0]["logprob"])

    def next_log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """log P of every token of the vocabulary after the given ones, (vocabulary,)."""
        letter = next(place for place, token in enumerate(self.tokens) if token.isascii() and token.isalpha())
        answer: Any = self._server.handle_completions({
            "prompt": list(ids), "max_tokens": 1, "logprobs": len(self.tokens), "logit_bias": [[letter, MOST_FORCED]]})
        if "error" in answer:
            raise TsotsallmError(f"llama.cpp could not score the text: {answer['error']['message']}")
        found = torch.full((len(self.tokens),), float("-inf"))
        for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found
