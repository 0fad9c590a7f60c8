"""llama.cpp as an oracle: its own codecs through the C interface, its own arithmetic through its server."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

TYPES = {"q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "q2_k": 10, "q3_k": 11, "q4_k": 12, "q5_k": 13, "q6_k": 14,
         "iq4_nl": 20, "iq3_s": 21, "iq2_s": 22, "iq4_xs": 23, "tq2_0": 35}


def library() -> ctypes.CDLL:
    """ggml as it lies in the installed wheel."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("xllamacpp is not installed")
    [path] = Path(found.origin).parent.glob("xllamacpp*.so")
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_quantize_chunk.restype = ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
                                         ctypes.c_int64, ctypes.c_void_p]
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    return ggml


def quantise(name: str, weight: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None = None) -> Any:
    """Blocks of a weight as ggml itself rounds it, (rows, bytes)."""
    ggml, (rows, columns) = library(), weight.shape
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    out = np.zeros((rows, ggml.ggml_row_size(TYPES[name], columns)), dtype=np.uint8)
    ggml.ggml_quantize_init(TYPES[name])
    pointer = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    written = ggml.ggml_quantize_chunk(TYPES[name], weight.ctypes.data, out.ctypes.data, 0, rows, columns,
                                       None if pointer is None else pointer.ctypes.data)
    assert written == out.size
    return out


def dequantise(name: str, blocks: Any, columns: int) -> Any:
    """What ggml's own code makes of blocks, (rows, columns) float32."""
    function = getattr(library(), "dequantize_row_" + name.replace("_k", "_K"))
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    out = np.empty((len(blocks), columns), dtype=np.float32)
    for row, place in zip(np.ascontiguousarray(blocks), out, strict=True):
        function(row.ctypes.data, place.ctypes.data, columns)
    return out


class Llama:
    """A GGUF file in llama.cpp, with float32 caches."""

    def __init__(self, path: Path, vocabulary: int, *, adapter: Path | None = None, context: int = 256) -> None:
        import gguf
        import xllamacpp as llama

        tokens = gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].contents()
        self.letter = tokens.index("a")
        self.vocabulary = vocabulary
        asked = llama.CommonParams()
        asked.model.path, asked.n_ctx, asked.n_parallel, asked.verbosity, asked.warmup = str(path), context, 1, -1, False
        asked.cpuparams.n_threads = 1
        asked.cache_type_k = asked.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        asked.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if adapter is not None:
            asked.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = llama.Server(asked)

    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        """log P(next token) after every token, (tokens, vocabulary)."""
        found = torch.full((len(ids), self.vocabulary), float("nan"))
        for place in range(len(ids)):
            answer: Any = self.server.handle_completions({
                "prompt": ids[:place + 1], "max_tokens": 1, "logprobs": self.vocabulary, "cache_prompt": False,
                "logit_bias": [[self.letter, 100.0]]})      # what it says must be text; the probabilities are those before
            for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                found[place, one["id"]] = one["logprob"]
        return found

    def greedy(self, prompt: Any, tokens: int) -> str:
        answer: Any = self.server.handle_completions({"prompt": prompt, "max_tokens": tokens, "temperature": 0})
        return str(answer["choices"][0]["text"])

    def tokens_of(self, text: str) -> int:
        answer: Any = self.server.handle_completions({"prompt": text, "max_tokens": 1})
        return int(answer["usage"]["prompt_tokens"])
