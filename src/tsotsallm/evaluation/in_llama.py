"""What a GGUF file predicts in llama.cpp, whose kernels round activations too, and how far that is from an original."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.gguf_place import open_parts
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import work_of
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.library import Forced
from tsotsallm.engine.llama import Llama
from tsotsallm.errors import CheckpointError, CorpusError
from tsotsallm.evaluation.cost import devices_with_room
from tsotsallm.evaluation.forecast import TaskForecast
from tsotsallm.evaluation.perplexity import Perplexity, Protocol, by_window, kept_states, summed_up
from tsotsallm.machine import gemm_flops_per_second
from tsotsallm.streaming.corpus import Corpus, evaluation_windows
from tsotsallm.streaming.head import HeadPiece, head_pieces
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.score import Divergence, Predictions, compared
from tsotsallm.streaming.sweep import Tick, silent

ARITHMETIC = "llama.cpp, cache in f16"
CPU = torch.device("cpu")


def perplexity_in_llama(path: Path, text: str, source: str, *, context: int, limit: int | None = None,
                        reference: Checkpoint | None = None, reference_name: str = "", name: str = "",
                        tick: Tick = silent) -> Perplexity:
    """Score windows of a text in llama.cpp, each computed at once; against a reference, which is streamed, token by token.

    The reference's tokenizer splits the text, else the file's own. Raises CorpusError where `context` does not suit the
    model, CheckpointError where the two have other vocabularies, MissingExtraError without xllamacpp.
    """
    engine, corpus = _windows_of(path, text, source, context, limit, reference)
    beginning = engine.rules.bos if reference is None else reference.codec.bos
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Forced(path, context) as forced:
        compared_with = None
        if reference is not None:
            _require_comparable(forced, path, reference, reference_name)
            original = View.of(reference)
            compared_with = original, kept_states(original, corpus, Path(folder), CPU, tick)
        parts = [_of_window(forced, corpus, number, compared_with, tick) for number in range(len(corpus.windows))]
    sums, tail = by_window(corpus, _joined(parts))
    protocol = Protocol("windows", context, int(corpus.windows[0][0]) == beginning, source, corpus.fingerprint(),
                        int(sums["tokens"].sum()), ARITHMETIC)
    fitting = devices_with_room(sum(part.path.stat().st_size for part in open_parts(path)),
                                context * engine.cache_bytes_per_token)
    against = None if reference is None else reference_name or str(reference.directory)
    return summed_up(name or str(path), corpus, protocol, sums, tail, against, fitting, ())


def forecast_in_llama(path: Path, text: str, source: str, *, context: int, limit: int | None = None,
                      reference: Checkpoint | None = None, reference_name: str = "", name: str = "") -> TaskForecast:
    """How long `perplexity_in_llama` takes, from the time of two of its windows and the operations of the reference.

    Raises as that does.
    """
    _, corpus = _windows_of(path, text, source, context, limit, reference)
    with Forced(path, context) as forced:
        if reference is not None:
            _require_comparable(forced, path, reference, reference_name)
        for window in corpus.windows[:2]:       # the first also reads the file
            began = time.perf_counter()
            forced.log_probabilities(window.tolist())
            seconds = time.perf_counter() - began
    floor = seconds * len(corpus.windows)
    if reference is not None:
        floor += 2 * work_of(reference.spec).linear * corpus.tokens / gemm_flops_per_second()
    return TaskForecast("perplexity", name or str(path), len(corpus.windows), "llama.cpp", corpus.tokens,
                        len(corpus.windows), seconds, floor)


def _windows_of(path: Path, text: str, source: str, context: int, limit: int | None,
                reference: Checkpoint | None) -> tuple[Llama, Corpus]:
    """A GGUF file, and the windows that it is scored on."""
    engine = Llama(path, context=context)
    if not 2 <= context <= engine.known:
        raise CorpusError(f"--context is {context}; it takes at least 2 tokens and at most the {engine.known} that the "
                          "model knows")
    return engine, evaluation_windows(text, engine if reference is None else reference.codec, context, source).first(limit)


def _require_comparable(forced: Forced, path: Path, reference: Checkpoint, reference_name: str) -> None:
    if forced.vocabulary != reference.spec.vocabulary:
        raise CheckpointError(f"{path} has {forced.vocabulary} tokens and {reference_name or reference.directory} "
                              f"has {reference.spec.vocabulary}, so they cannot be compared token by token; "
                              "compare bits per byte of two evaluations")


def _of_window(forced: Forced, corpus: Corpus, number: int, compared_with: tuple[View, HiddenStates] | None,
               tick: Tick) -> Tensor | Divergence:
    """The losses of one window, or its divergence from a reference, given with its final states of all windows."""
    window = corpus.take([number])
    predictions = Predictions(window)
    log_q = forced.log_probabilities(window.windows[0].tolist())
    tick("scoring in llama.cpp", (number + 1) / len(corpus.windows))
    if compared_with is None:
        return -log_q[predictions.rows].gather(1, predictions.targets[:, None])[:, 0].double()
    view, states = compared_with

    def of_model(piece: HeadPiece) -> Callable[[Tensor], Tensor]:
        return lambda rows: log_q[rows, piece.first:piece.first + len(piece)]

    pieces = ((piece, of_model(piece)) for piece in head_pieces(view, CPU))
    return compared(predictions, pieces, states.read([number])[0].__getitem__)


def _joined(parts: Sequence[Tensor | Divergence]) -> Tensor | Divergence:
    """The same of all windows, one after another."""
    losses = [one for one in parts if isinstance(one, Tensor)]
    if losses:
        return torch.cat(losses)
    found = [vars(one) for one in parts]
    return Divergence(**{name: torch.cat([one[name] for one in found]) for name in found[0]})
