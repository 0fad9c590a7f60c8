"""Perplexity, bits per byte and the divergence from an original, by streaming, for any size of model."""

from __future__ import annotations

import hashlib
import math
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CheckpointError, CorpusError, TsotsallmError
from tsotsallm.evaluation.cost import fits
from tsotsallm.evaluation.options import RunKeywords, RunOptions
from tsotsallm.evaluation.significance import Measure, ratio, standard_error
from tsotsallm.files import JsonObject
from tsotsallm.records import Record, amended
from tsotsallm.streaming.corpus import Corpus, evaluation_rows, evaluation_windows
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.score import Divergence, divergence, final_states, token_losses
from tsotsallm.streaming.sweep import Tick, silent

Kind = Literal["windows", "rows"]


@dataclass(frozen=True)
class Protocol:
    """Everything that a perplexity depends on besides the weights; `context` in tokens."""

    kind: Kind
    context: int
    bos: bool
    text: str
    tokens_sha256: str
    predicted_tokens: int
    arithmetic: str = "float32"

    def compare(self, other: Protocol) -> None:
        """Raise TsotsallmError unless both numbers were taken under the same protocol."""
        differing = [key for key, value in asdict(self).items() if value != asdict(other)[key]]
        if differing:
            raise TsotsallmError(f"these numbers were taken with different {', '.join(differing)}; numbers compare only "
                                 "under one protocol: evaluate both with the same options")


@dataclass(frozen=True)
class Tail(Record):
    """How the losses against a reference spread over tokens: quantiles of the KL divergence in nats, and the root of the
    mean square by which the probability of the reference's most likely token differs (0 to 1)."""

    kl_median: float
    kl_99: float
    kl_999: float
    top_probability_rms: float

    @classmethod
    def of(cls, kl: Tensor, top_difference: Tensor) -> Tail:
        """The tail of a divergence, both (tokens,) float64."""
        median, high, highest = np.quantile(kl.numpy(), (0.5, 0.99, 0.999)).tolist()
        return cls(median, high, highest, math.sqrt(float(top_difference.square().mean())))


@dataclass(frozen=True)
class Perplexity(Record):
    """Perplexity of one model on one text.

    `loss` is in nats per token, with its standard error over windows; KL divergence (nats per token), its tail and the share
    of equal top tokens are measured against the reference.
    """

    model: str
    protocol: Protocol
    windows: int
    perplexity: float
    loss: float
    loss_standard_error: float | None
    bits_per_byte: float | None
    reference: str | None = None
    reference_perplexity: float | None = None
    kl: float | None = None
    kl_standard_error: float | None = None
    same_top_token: float | None = None
    tail: Tail | None = None
    fits: dict[str, bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


MEASURES = (Measure("perplexity", ("loss", "tokens"), lambda sums: np.exp(ratio(sums)), higher_is_better=False),
            Measure("bits per byte", ("loss", "bytes"), lambda sums: ratio(sums) / math.log(2), higher_is_better=False),
            Measure("KL from reference", ("kl", "tokens"), ratio, higher_is_better=False),
            Measure("same top token", ("same_top", "tokens"), ratio, share=True))


def evaluation_corpus(text: str, codec: TextCodec, context: int, kind: Kind, source: str) -> Corpus:
    """A text as windows of `context` tokens, or as rows: one window per non-empty line, cut at `context` tokens."""
    return (evaluation_rows if kind == "rows" else evaluation_windows)(text, codec, context, source)


def check_context(checkpoint: Checkpoint, context: int) -> None:
    """Raise CorpusError or CheckpointError unless windows of `context` tokens fit the model."""
    if context < 2:
        raise CorpusError(f"--context is {context}; it takes 2 tokens or more")
    if context > checkpoint.spec.context:
        raise CheckpointError(f"context {context} is longer than the {checkpoint.spec.context} positions that the model "
                              "knows; choose a shorter --context")


def window_features(view: View, corpus: Corpus, reference: tuple[View, HiddenStates] | None, device: torch.device,
                    scratch: Path, tick: Tick = silent) -> tuple[dict[str, Tensor], Tail | None]:
    """(what every window adds to the measures, the tail): loss in nats, predicted tokens, bytes where known, each (windows,)
    float64.

    Against a reference, given with its final states: also its loss, KL divergence in nats, and how many top tokens agree.
    """
    states = final_states(view, corpus, scratch / "model.f32", device, tick)
    if reference is None:
        found: Tensor | Divergence = token_losses(view, [states], corpus, device)[0]
    else:
        found = divergence(view, states, *reference, corpus, device)
    states.remove()
    return by_window(corpus, found)


def by_window(corpus: Corpus, scored: Tensor | Divergence) -> tuple[dict[str, Tensor], Tail | None]:
    """What every window adds to the measures, and the tail, from the losses of all predicted tokens or a divergence.

    Of windows with marks only the marked tokens count.
    """
    tokens, tail = [len(window) - 1 for window in corpus.windows], None
    if isinstance(scored, Tensor):
        per_token = {"loss": scored}
    else:
        per_token = {"loss": scored.losses, "reference_loss": scored.reference_losses, "kl": scored.kl,
                     "same_top": scored.same_top.double(), "top_difference": scored.top_difference}
    per_token["tokens"] = torch.ones(sum(tokens), dtype=torch.float64)
    if corpus.learned is not None:
        counts = torch.cat([marks[1:] for marks in corpus.learned])
        per_token = {name: values[counts] for name, values in per_token.items()}
        tokens = [int(marks[1:].sum()) for marks in corpus.learned]
    if (differences := per_token.pop("top_difference", None)) is not None:
        tail = Tail.of(per_token["kl"], differences)
    sums = {name: torch.stack([part.sum() for part in torch.split(values, tokens)]) for name, values in per_token.items()}
    if corpus.bytes_scored is not None:
        sums["bytes"] = torch.tensor(corpus.bytes_scored, dtype=torch.float64)
    return sums, tail


def mean_over_windows(sums: Mapping[str, Tensor], feature: str, per: str = "tokens") -> tuple[float, float | None]:
    """Σ feature / Σ per over windows, with its standard error if windows are independent."""
    items = torch.stack([sums[feature], sums[per]], -1).numpy()
    measure = Measure(feature, (feature, per), ratio)
    return measure.of(items), standard_error(measure, items)


def summed_up(name: str, corpus: Corpus, protocol: Protocol, sums: dict[str, Tensor], tail: Tail | None,
              reference: str | None, fitting: dict[str, bool], notes: tuple[str, ...]) -> Perplexity:
    """The measures of a model from what every window adds to them, and the tail of its divergence from a reference."""
    loss, loss_error = mean_over_windows(sums, "loss")
    against: JsonObject = {}
    if tail is not None:
        kl, kl_error = mean_over_windows(sums, "kl")
        against = {"reference": reference, "kl": kl, "kl_standard_error": kl_error, "tail": tail,
                   "reference_perplexity": math.exp(mean_over_windows(sums, "reference_loss")[0]),
                   "same_top_token": mean_over_windows(sums, "same_top")[0]}
    bits = mean_over_windows(sums, "loss", "bytes")[0] / math.log(2) if "bytes" in sums else None
    return Perplexity(name, protocol, len(corpus.windows), math.exp(loss), loss, loss_error, bits, **against, fits=fitting,
                      notes=notes)


def same_segmentation(checkpoint: Checkpoint, reference: Checkpoint, text: str, corpus: Corpus, context: int,
                      kind: Kind) -> None:
    """Raise CheckpointError unless the reference splits a text into the same tokens."""
    same_tokens(checkpoint, reference, corpus, evaluation_corpus(text, reference.codec, context, kind, corpus.source))


def same_tokens(checkpoint: Checkpoint, reference: Checkpoint, corpus: Corpus, other: Corpus) -> None:
    """Raise CheckpointError unless a corpus, as a checkpoint's tokenizer splits it, is that of the reference, `other`."""
    if reference.kept_tokens is not None:           # by the numbers that both have in the original
        numbers = torch.tensor(reference.kept_tokens)
        corpus = replace(corpus, windows=tuple(numbers[window] for window in corpus.windows))
    if other.fingerprint() != corpus.fingerprint():
        raise CheckpointError(f"{reference.directory} splits the text into other tokens than {checkpoint.directory}, so the "
                              "models cannot be compared token by token; compare bits per byte of two separate evaluations")


@dataclass(frozen=True)
class PerplexityOptions(RunOptions):
    """How a text is scored: in windows (or rows) of at most `context` tokens, only the first `limit` of them."""

    context: int = 512
    kind: Kind = "windows"
    limit: int | None = None


class PerplexityKeywords(RunKeywords, total=False):
    """The fields of PerplexityOptions, as keywords."""

    context: int
    kind: Kind
    limit: int | None


def evaluate_perplexity(checkpoint: Checkpoint, text: str, *, source: str, reference: Checkpoint | None = None,
                        name: str = "", reference_name: str = "", kept: Path | None = None,
                        options: PerplexityOptions | None = None, **keywords: Unpack[PerplexityKeywords]) -> Perplexity:
    """Score a text with a checkpoint, one layer in memory; with a reference, compare token by token as well.

    `source` is the text's name in the protocol, `name` and `reference_name` those of the models in the result.

    Where the checkpoint kept only some of the reference's tokens, the reference is renormalised over those. The final states
    of the reference stay in the folder `kept`, where the next evaluation against it on the same text finds them. Raises
    CorpusError or CheckpointError where the context, the limit, or the two tokenizers do not fit.
    """
    options = amended(options or PerplexityOptions(), keywords, evaluate_perplexity)
    context, kind, limit, tick = options.context, options.kind, options.limit, options.tick
    check_context(checkpoint, context)
    if limit is not None and limit < 1:
        raise CorpusError(f"--limit is {limit}; it takes 1 or more windows")
    codec = checkpoint.codec
    corpus = evaluation_corpus(text, codec, context, kind, source)
    if reference is not None:
        reference = reference.with_tokens_of(checkpoint)
        same_segmentation(checkpoint, reference, text, corpus, context, kind)
    corpus = corpus.first(limit)
    with tempfile.TemporaryDirectory(dir=options.scratch, ignore_cleanup_errors=True) as temporary:
        folder, where = Path(temporary), torch.device(options.device)
        original = View.of(reference) if reference is not None else None
        compared = None if original is None else (original, kept_states(original, corpus, kept or folder, where, tick))
        sums, tail = window_features(View.of(checkpoint), corpus, compared, where, folder, tick)
    bos = int(corpus.windows[0][0]) == codec.bos
    protocol = Protocol(kind, context, bos, source, corpus.fingerprint(), int(sums["tokens"].sum()))
    against = None if reference is None else reference_name or str(reference.directory)
    return summed_up(name or str(checkpoint.directory), corpus, protocol, sums, tail, against, fits(checkpoint),
                     _notes(checkpoint, reference))


def _notes(checkpoint: Checkpoint, reference: Checkpoint | None) -> tuple[str, ...]:
    """Notes on what is stored beside the weights of both models and is not used."""
    return checkpoint.notes + (() if reference is None else tuple(f"original: {note}" for note in reference.notes))


def kept_states(view: View, corpus: Corpus, folder: Path, device: torch.device, tick: Tick) -> HiddenStates:
    """Final states of a corpus; those that an earlier evaluation left in `folder` are used where they are complete."""
    name = hashlib.sha256(repr([view.checkpoint.fingerprint(), corpus.fingerprint()]).encode()).hexdigest()[:16]
    states = HiddenStates(folder / f"{name}.f32", [len(window) for window in corpus.windows], view.spec.hidden)
    if not states.path.exists() or states.path.stat().st_size != 4 * states.tokens * states.width:
        draft = folder / f"{name}-{uuid.uuid4().hex[:8]}.draft"
        final_states(view, corpus, draft, device, tick)
        draft.replace(states.path)
    return states
