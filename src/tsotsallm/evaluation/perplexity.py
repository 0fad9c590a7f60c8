"""Perplexity, bits per byte and the divergence from an original, by streaming, for any size of model."""

from __future__ import annotations

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CheckpointError, CorpusError, TsotsallmError
from tsotsallm.streaming.corpus import Corpus, evaluation_rows, evaluation_windows
from tsotsallm.streaming.score import divergence, final_states, token_losses
from tsotsallm.streaming.sweep import Tick, silent

Kind = Literal["windows", "rows"]


@dataclass(frozen=True)
class Protocol:
    """Everything that a perplexity depends on besides the weights."""

    kind: Kind
    context: int
    bos: bool
    text: str
    tokens_sha256: str
    predicted_tokens: int
    arithmetic: str = "float32"

    def compare(self, other: Protocol) -> None:
        """Raise unless two numbers were taken in the same way."""
        differing = [key for key, value in asdict(self).items() if value != asdict(other)[key]]
        if differing:
            raise TsotsallmError(f"these numbers were taken with different {', '.join(differing)}; numbers compare only "
                                 "under one protocol: evaluate both with the same options")


@dataclass(frozen=True)
class Perplexity:
    """`loss` is nats per token with its standard error over windows; KL and agreement are against the reference."""

    model: str
    protocol: Protocol
    perplexity: float
    loss: float
    loss_standard_error: float | None
    bits_per_byte: float | None
    reference: str | None = None
    reference_perplexity: float | None = None
    kl: float | None = None
    kl_standard_error: float | None = None
    same_top_token: float | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def evaluation_corpus(text: str, tokenizer: Any, context: int, kind: Kind, source: str) -> Corpus:
    return (evaluation_rows if kind == "rows" else evaluation_windows)(text, tokenizer, context, source)


def _standard_error(values: Tensor, corpus: Corpus) -> float | None:
    """Standard error of a mean over tokens, tokens of one window taken as dependent; None for a single window."""
    counts = torch.tensor([len(window) - 1 for window in corpus.windows], dtype=torch.float64)
    if len(counts) < 2:
        return None
    sums = torch.stack([part.sum() for part in torch.split(values, counts.int().tolist())])
    mean = sums.sum() / counts.sum()
    windows = len(counts)
    spread = ((sums - mean * counts) ** 2).sum() * windows / (windows - 1)
    return float(spread.sqrt() / counts.sum())


def evaluate_perplexity(checkpoint: Checkpoint, text: str, *, source: str, context: int = 512, kind: Kind = "windows",
                        reference: Checkpoint | None = None, device: str = "cpu", scratch: Path | None = None,
                        name: str = "", reference_name: str = "", limit: int | None = None,
                        tick: Tick = silent) -> Perplexity:
    """Score a text with a checkpoint, one layer in memory; with a reference, compare token by token as well."""
    tokenizer = checkpoint.tokenizer()
    if context < 2:
        raise CorpusError(f"--context is {context}; it takes 2 tokens or more")
    if context > checkpoint.spec.context:
        raise CheckpointError(f"context {context} is longer than the {checkpoint.spec.context} positions that the model "
                              "knows; choose a shorter --context")
    if limit is not None and limit < 1:
        raise CorpusError(f"--limit is {limit}; it takes 1 or more windows")
    corpus = evaluation_corpus(text, tokenizer, context, kind, source)
    if reference is not None:
        other = evaluation_corpus(text, reference.tokenizer(), context, kind, source)
        if other.fingerprint() != corpus.fingerprint():
            raise CheckpointError(f"{reference.directory} segments the text differently: token by token the models do "
                                  "not compare; compare bits per byte of two separate evaluations")
    if limit is not None and limit < len(corpus.windows):
        corpus = Corpus(corpus.windows[:limit], source)
    where = torch.device(device)
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        view = View.of(checkpoint)
        states = final_states(view, corpus, folder / "model.f32", where, tick)
        found: dict[str, Any] = {}
        if reference is None:
            losses = token_losses(view, [states], corpus, where)[0]
        else:
            original = View.of(reference)
            original_states = final_states(original, corpus, folder / "reference.f32", where, tick)
            compared = divergence(view, states, original, original_states, corpus, where)
            losses = compared.losses
            found = {"reference": reference_name or str(reference.directory),
                     "reference_perplexity": math.exp(compared.reference_losses.mean()),
                     "kl": float(compared.kl.mean()), "kl_standard_error": _standard_error(compared.kl, corpus),
                     "same_top_token": float(compared.same_top.double().mean())}
    loss = float(losses.mean())
    bos = bool(corpus.windows) and int(corpus.windows[0][0]) == tokenizer.bos_token_id
    protocol = Protocol(kind, context, bos, source, corpus.fingerprint(), len(losses))
    bits = float(losses.sum()) / math.log(2) / corpus.bytes_scored if corpus.bytes_scored else None
    return Perplexity(name or str(checkpoint.directory), protocol, math.exp(loss), loss, _standard_error(losses, corpus),
                      bits, **found)
