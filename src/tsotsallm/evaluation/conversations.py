"""Conversations that models are compared on: those of a file, or packaged requests with the answers that a model gives.

What a model of conversations is used for is its answers, and a grid that hurts prose little may hurt them much. Only the
tokens of answers are scored, each after the whole conversation before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tsotsallm.checkpoint.view import View
from tsotsallm.engine.generation import generate_resident
from tsotsallm.engine.selftext import as_messages, cleaned, keep_documents, kept_documents, requests
from tsotsallm.errors import CorpusError
from tsotsallm.evaluation.examinee import Examinee
from tsotsallm.evaluation.perplexity import Tail, kept_states, mean_over_windows, window_features
from tsotsallm.machine import cache_root
from tsotsallm.records import Record
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.generate import generate_by_sweeps
from tsotsallm.streaming.sweep import silent
from tsotsallm.training.samples import Conversation
from tsotsallm.version import __version__

ANSWERS = 24
"""Packaged requests that a model answers."""
ANSWER_TOKENS = 64
"""Tokens of an answer at most."""
SEED = 0
CONVERSATIONS_FILE = "conversations.jsonl"


@dataclass(frozen=True)
class Answered(Record):
    """How far a model is from the original where the original answers: nats a token of the answers, with the standard error
    over conversations, the share of equal top tokens, and the tail."""

    conversations: int
    tokens: int
    kl: float
    kl_standard_error: float
    same_top_token: float
    tail: Tail


def conversations_file(data: Path) -> Path | None:
    """The conversations that `--data` names: a file, or CONVERSATIONS_FILE in a folder of several tasks' data; None where
    the folder has none, whose models are then compared on answers of their own."""
    if not data.is_dir():
        return data
    return data / CONVERSATIONS_FILE if (data / CONVERSATIONS_FILE).exists() else None


def own_answers(author: Examinee) -> list[Conversation]:
    """Packaged requests with the likeliest answers of a model, in its chat template; written once and kept.

    The whole model is in memory while it writes, or a layer at a time where it does not fit. Raises CorpusError where it has
    no chat template, or answers nothing.
    """
    codec = author.codec
    asked = requests(codec, author.context - ANSWER_TOKENS, SEED, "compare")[:ANSWERS]
    if not asked:
        raise CorpusError(f"{author.name} has no chat template, so it answers no requests; give conversations with "
                          "--data FILE.jsonl")
    prompts = [codec.conversation(as_messages(request)) for request in asked]
    key = hashlib.sha256(json.dumps([author.checkpoint.fingerprint(), prompts, codec.ends, ANSWER_TOKENS, __version__],
                                    sort_keys=True).encode()).hexdigest()[:32]
    path = cache_root() / "answers" / f"{key}.json"
    answers = kept_documents(path)
    if answers is None:
        answers = _written(author, prompts)
        if not any(answers):
            raise CorpusError(f"{author.name} answers none of {len(asked)} requests; give conversations with "
                              "--data FILE.jsonl")
        keep_documents(path, answers)
    found = [(number, [dict(message) for message in as_messages(request, answer)])
             for number, (request, answer) in enumerate(zip(asked, answers, strict=True), 1) if answer]
    # as text an answer may have more tokens than the model wrote
    return [one for one in found if len(codec.conversation(one[1], answer=False)) <= author.context]


def answers_like(view: View, original: View, corpus: Corpus, kept: Path, scratch: Path, device: torch.device) -> Answered:
    """Compare a model with the original on the answers of conversations; the original's states stay in the folder `kept`."""
    states = kept_states(original, corpus, kept, device, silent)
    sums, tail = window_features(view, corpus, (original, states), device, scratch)
    assert tail is not None
    kl, error = mean_over_windows(sums, "kl")
    return Answered(len(corpus.windows), int(sums["tokens"].sum()), kl, error or 0.0,
                    mean_over_windows(sums, "same_top")[0], tail)


def _written(author: Examinee, prompts: Sequence[Sequence[int]]) -> list[str]:
    """The greedy answers to tokenised requests, cut at the end of a turn or at ANSWER_TOKENS."""
    codec, ends = author.codec, set(author.codec.ends)

    def done(new: Sequence[int]) -> bool:
        return new[-1] in ends

    if author.generates_by_sweeps:
        given = dict(generate_by_sweeps(author.view, prompts, ANSWER_TOKENS, done, author.scratch, author.device,
                                        author.tick))
    else:
        given = dict(generate_resident(author.model, prompts, ANSWER_TOKENS, done, author.tick))
        author.forget_model()
    return [cleaned(codec.continuation([token for token in given[place] if token not in ends]))
            for place in range(len(prompts))]
