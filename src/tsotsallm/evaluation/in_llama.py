"""What a GGUF file predicts in llama.cpp, whose kernels round activations too, and how far that is from an original."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.gguf_place import open_parts
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.library import Forced
from tsotsallm.engine.llama import Llama
from tsotsallm.errors import CheckpointError, CorpusError
from tsotsallm.evaluation.cost import devices_with_room
from tsotsallm.evaluation.perplexity import Perplexity, Protocol, kept_states, summed_up
from tsotsallm.streaming.corpus import Corpus, evaluation_windows
from tsotsallm.streaming.head import head_pieces
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.score import Divergence
from tsotsallm.streaming.sweep import Tick, silent

ARITHMETIC = "llama.cpp, cache in f16"
ROWS = 128
CPU = torch.device("cpu")


def perplexity_in_llama(path: Path, text: str, source: str, *, context: int, limit: int | None = None,
                        reference: Checkpoint | None = None, reference_name: str = "", name: str = "",
                        tick: Tick = silent) -> Perplexity:
    """Score windows of a text in llama.cpp, each computed at once; against a reference, which is streamed, token by token.

    The reference's tokenizer splits the text, else the file's own. Raises CorpusError where `context` does not suit the
    model, CheckpointError where the two have other vocabularies, MissingExtraError without xllamacpp.
    """
    engine = Llama(path, context=context)
    if not 2 <= context <= (known := engine.file.context or context):
        raise CorpusError(f"--context is {context}; it takes at least 2 tokens and at most the {known} that the model knows")
    corpus = evaluation_windows(text, engine if reference is None else reference.codec, context, source).first(limit)
    beginning = engine.rules.bos if reference is None else reference.codec.bos
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, Forced(path, context) as forced:
        compared = None
        if reference is not None:
            if forced.vocabulary != reference.spec.vocabulary:
                raise CheckpointError(f"{path} has {forced.vocabulary} tokens and {reference_name or reference.directory} "
                                      f"has {reference.spec.vocabulary}, so they cannot be compared token by token; "
                                      "compare bits per byte of two evaluations")
            original = View.of(reference)
            compared = original, kept_states(original, corpus, Path(folder), CPU, tick)
        parts = [_of_window(forced, corpus, number, compared, tick) for number in range(len(corpus.windows))]
    divergence = Divergence(*(torch.cat(values) for values in zip(*parts, strict=True)))
    protocol = Protocol("windows", context, int(corpus.windows[0][0]) == beginning, source, corpus.fingerprint(),
                        len(divergence.losses), ARITHMETIC)
    return summed_up(name or str(path), corpus, protocol, divergence if reference is not None else divergence.losses,
                     reference_name or (str(reference.directory) if reference is not None else None),
                     devices_with_room(sum(part.path.stat().st_size for part in open_parts(path)),
                                       context * engine.cache_bytes_per_token), ())


def _of_window(forced: Forced, corpus: Corpus, number: int, compared: tuple[View, HiddenStates] | None,
               tick: Tick) -> tuple[Tensor, ...]:
    """The fields of a Divergence for one window; without a reference only the losses are filled."""
    window = corpus.windows[number]
    log_q = forced.log_probabilities(window.tolist())[:-1]
    targets = window[1:, None]
    losses = -log_q.gather(1, targets)[:, 0].double()
    tick("scoring in llama.cpp", (number + 1) / len(corpus.windows))
    if compared is None:
        empty = torch.zeros(len(losses), dtype=torch.float64)
        return losses, empty, empty, empty.bool(), empty
    view, states = compared
    final = states.read([number])[0][:-1]
    kept: list[tuple[Tensor, ...]] = []
    for first in range(0, len(final), ROWS):
        rows = slice(first, first + ROWS)
        logits = torch.cat([piece.logits(final[rows]) for piece in head_pieces(view, CPU)], -1)
        log_p, q = logits.log_softmax(-1), log_q[rows]
        kl = (log_p.exp() * (log_p - q)).sum(-1).double().clamp(min=0)
        top = log_p.argmax(-1, keepdim=True)
        difference = (log_p.gather(1, top).exp() - q.gather(1, top).exp())[:, 0].double()
        kept.append((-log_p.gather(1, targets[rows])[:, 0].double(), kl, top[:, 0] == q.argmax(-1), difference))
    return losses, *(torch.cat(values) for values in zip(*kept, strict=True))
