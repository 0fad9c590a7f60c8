"""llama.cpp's own functions inside the wheel of xllamacpp: the log-probabilities of a whole window in one pass.

Its server answers one token at a time; the functions below it compute a window of 512 tokens at once. Parameters go in and
out as blocks of memory whose first numbers alone are known here, which the defaults must confirm.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from tsotsallm.errors import CheckpointError, MissingExtraError, TsotsallmError
from tsotsallm.machine import chosen_threads, idle_cores

DEFAULTS = (512, 2048, 512, 1)
"""The first parameters of a context, as llama.cpp sets them: tokens, tokens a batch, tokens at a time, conversations."""
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda _level, _text, _data: None)


class _Parameters(ctypes.Structure):
    """Parameters of a model or of a context: more memory than llama.cpp uses of it."""

    _fields_ = (("words", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    """`llama_batch`, with memory to spare."""

    _fields_ = (("n_tokens", ctypes.c_int32), ("token", ctypes.POINTER(ctypes.c_int32)), ("embd", ctypes.c_void_p),
                ("pos", ctypes.POINTER(ctypes.c_int32)), ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
                ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))), ("logits", ctypes.POINTER(ctypes.c_int8)),
                ("spare", ctypes.c_uint64 * 16))


def _library() -> Any:
    """The functions of llama.cpp; MissingExtraError without xllamacpp, TsotsallmError where its parameters have moved."""
    found = importlib.util.find_spec("xllamacpp")
    folder = Path(found.origin).parent if found is not None and found.origin is not None else None
    paths = sorted(path for path in folder.glob("xllamacpp*") if path.suffix in (".so", ".pyd")) if folder else []
    if not paths:
        raise MissingExtraError("xllamacpp", "llama", "log-probabilities of every token in llama.cpp")
    library = ctypes.CDLL(str(paths[0]))
    try:
        for name in ("llama_model_default_params", "llama_context_default_params"):
            getattr(library, name).restype = _Parameters
        for name in ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory", "llama_model_get_vocab"):
            getattr(library, name).restype = ctypes.c_void_p
        library.llama_get_logits_ith.restype = ctypes.POINTER(ctypes.c_float)
        library.llama_batch_init.restype = _Batch
        library.llama_n_ctx.restype = ctypes.c_uint32
    except AttributeError as error:
        raise _unknown(str(error)) from None
    first = tuple(library.llama_context_default_params().words[:len(DEFAULTS)])
    if first != DEFAULTS:
        raise _unknown(f"a context begins with {first}")
    library.llama_log_set(SILENT, None)
    library.llama_backend_init()
    return library


def _unknown(found: str) -> TsotsallmError:
    return TsotsallmError(f"this version of xllamacpp is not known here ({found}); install the one in constraints.txt")


class Forced:
    """A GGUF file in llama.cpp that computes given tokens, with a cache in 16 bits; close it, or use it as a context.

    Raises CheckpointError where llama.cpp cannot load the file, MissingExtraError without xllamacpp.
    """

    def __init__(self, path: Path, context: int) -> None:
        self._library = library = _library()
        self._model = self._context = None
        self._batch: _Batch | None = None
        self._model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self._model:
            raise CheckpointError(f"llama.cpp cannot load {path}; export or copy it again")
        asked = library.llama_context_default_params()
        asked.words[0] = asked.words[1] = asked.words[2] = context
        self._context = library.llama_init_from_model(ctypes.c_void_p(self._model), asked)
        if not self._context or library.llama_n_ctx(ctypes.c_void_p(self._context)) < context:
            self.close()
            raise CheckpointError(f"llama.cpp cannot run {path} with {context} tokens; choose a shorter --context")
        threads = chosen_threads() or idle_cores()
        library.llama_set_n_threads(ctypes.c_void_p(self._context), threads, threads)
        self.vocabulary = int(library.llama_vocab_n_tokens(
            ctypes.c_void_p(library.llama_model_get_vocab(ctypes.c_void_p(self._model)))))
        self._batch = library.llama_batch_init(context, 0, 1)

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """log P of every token of the vocabulary after each given token, (tokens, vocabulary) float32, in nats.

        Raises TsotsallmError where llama.cpp cannot compute them, CheckpointError where they are not numbers.
        """
        library, batch = self._library, self._batch
        assert batch is not None
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = int(token), place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        library.llama_memory_clear(ctypes.c_void_p(library.llama_get_memory(ctypes.c_void_p(self._context))), True)
        if library.llama_decode(ctypes.c_void_p(self._context), batch):
            raise TsotsallmError(f"llama.cpp could not score {len(ids)} tokens; choose a shorter --context")
        logits = torch.empty(len(ids), self.vocabulary)
        for place in range(len(ids)):
            row = library.llama_get_logits_ith(ctypes.c_void_p(self._context), place)
            ctypes.memmove(logits[place].data_ptr(), row, 4 * self.vocabulary)
        if not bool(torch.isfinite(logits).all()):
            raise CheckpointError("the probability of a token is not a number; the file's weights are damaged: export or "
                                  "copy it again")
        return logits.sub_(logits.logsumexp(-1, keepdim=True))

    def close(self) -> None:
        """Free the model and its memory."""
        library = self._library
        if self._batch is not None:
            library.llama_batch_free(self._batch)
        if self._context:
            library.llama_free(ctypes.c_void_p(self._context))
        if self._model:
            library.llama_model_free(ctypes.c_void_p(self._model))
        self._batch = self._context = self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None,
                 _trace: TracebackType | None) -> None:
        self.close()
