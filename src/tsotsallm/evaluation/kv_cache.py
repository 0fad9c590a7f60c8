"""What a GGUF file loses with a smaller key-value cache: perplexity in llama.cpp, and the cache's bytes per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.llama import CacheType, Llama
from tsotsallm.errors import CorpusError, NumericsError
from tsotsallm.records import Record
from tsotsallm.streaming.corpus import evaluation_windows
from tsotsallm.streaming.score import MOST_NATS
from tsotsallm.streaming.sweep import Tick, silent


@dataclass(frozen=True)
class CachePerplexity(Record):
    """Perplexity of a text in llama.cpp with one type of cache; `late` covers only the second half of each window."""

    kv: str
    perplexity: float
    late: float
    tokens: int
    context: int
    bytes_per_token: float
    source: str


def cache_perplexities(path: Path, tokens_of: Checkpoint | None, text: str, source: str, kinds: Sequence[CacheType], *,
                       context: int, limit: int | None, tick: Tick = silent) -> list[CachePerplexity]:
    """Score windows of a text with each type of cache, token by token as a conversation grows, none scored twice.

    `tokens_of` is the checkpoint that the file was made from: its tokenizer splits the text. Without one, the file's own
    does. Raises CorpusError where `context` does not suit the model, NumericsError where a token costs absurdly many nats.
    """
    known = Llama(path).known if tokens_of is None else tokens_of.spec.context
    if context > known or context < 4:
        raise CorpusError(f"--context is {context}; it takes at least 4 tokens and at most the {known} that the model knows")
    corpus = evaluation_windows(text, Llama(path, context=context) if tokens_of is None else tokens_of.codec, context,
                                source).first(limit)
    measured = []
    for kind in kinds:
        engine = Llama(path, kv=kind, context=context + 8)
        losses: list[float] = []
        late: list[float] = []
        for number, window in enumerate(corpus.windows):
            scored = [-value for value in engine.log_likelihoods(window.tolist())]
            losses += scored
            late += scored[len(scored) // 2:]
            tick(f"scoring with {kind}", (number + 1) / len(corpus.windows))
        if (worst := max(sum(losses) / len(losses), sum(late) / len(late))) > MOST_NATS:
            raise NumericsError(f"{path}: a token costs {worst:.3g} nats on average; its weights are damaged or far out of "
                                "range")
        measured.append(CachePerplexity(kind, math.exp(sum(losses) / len(losses)), math.exp(sum(late) / len(late)),
                                        len(losses), context, engine.cache_bytes_per_token, source))
        del engine
    return measured
