"""Training objectives: the loss of next tokens, the distance to a teacher's distribution, or to a layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tsotsallm.checkpoint.view import View
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.frame import Frame
from tsotsallm.streaming.head import head_pieces
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.score import HEAD_TOKENS, final_states, read_rows
from tsotsallm.streaming.sweep import Tick, silent
from tsotsallm.streaming.targets import Targets
from tsotsallm.timing import part
from tsotsallm.training.engines import Engine
from tsotsallm.training.samples import Samples


@dataclass
class Predicting:
    """The loss of a whole model on samples: of the next token, or the distance to a teacher's distribution."""

    engine: Engine
    samples: Samples
    teacher: TeacherTokens | None = None

    @property
    def count(self) -> int:
        """The number of samples to train on."""
        return len(self.samples.training.windows)

    def _targets(self, batch: Corpus, numbers: Sequence[int], *, held_out: bool) -> Targets:
        if self.teacher is None:
            return Targets.next_tokens(batch)
        return self.teacher.targets(batch, numbers, held_out=held_out)

    def gradients(self, numbers: list[int], step: int) -> float:
        """Add the gradient of the mean loss of some samples to the factors' `.grad`; returns that loss in nats per token."""
        batch = self.samples.training.take(numbers)
        return self.engine.gradients(batch, self._targets(batch, numbers, held_out=False), step)

    def held_out(self) -> float:
        """The mean loss of the held-out samples in nats per token."""
        corpus = self.samples.held_out
        targets = self._targets(corpus, range(len(corpus.windows)), held_out=True)
        return float((self.engine.losses(corpus, targets) * targets.weights).sum())


class TeacherTokens:
    """A teacher's most probable tokens after every token of the samples, computed once and kept on disk.

    Each row keeps the `top` highest logits; at temperature τ the student's target is the softmax of logit / τ over them
    (arXiv:1503.02531, section 2, restricted to the top tokens). With `whole`, at temperature 1, all other tokens together
    keep their probability too.
    """

    def __init__(self, teacher: View, samples: Samples, top: int, temperature: float, path: Path, device: torch.device,
                 tick: Tick = silent, *, whole: bool = False) -> None:
        self.temperature, self.whole = temperature, whole
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors: dict[str, Tensor] = {}
            for name, corpus in (("training", samples.training), ("held_out", samples.held_out)):
                logits, tokens, normaliser = top_logits(teacher, corpus, top, path.with_name("teacher-states.f32"), device,
                                                        tick)
                tensors |= {f"{name}.logits": logits - normaliser[:, None] if whole else logits, f"{name}.tokens": tokens}
            draft = path.with_name(path.name + ".new")
            save_file(tensors, draft)
            draft.replace(path)
        self.kept = load_file(path)
        self.starts = {"training": samples.training.starts, "held_out": samples.held_out.starts}

    def targets(self, batch: Corpus, numbers: Sequence[int], *, held_out: bool) -> Targets:
        """The targets of a batch, which is made of the windows `numbers` of the samples."""
        side = "held_out" if held_out else "training"
        plain = Targets.next_tokens(batch)
        places = torch.cat([torch.arange(self.starts[side][number], self.starts[side][number] + len(window))
                            for number, window in zip(numbers, batch.windows, strict=True)])[plain.rows]
        logits = self.kept[f"{side}.logits"][places] / self.temperature
        return Targets(plain.rows, self.kept[f"{side}.tokens"][places].long(),
                       logits.exp() if self.whole else logits.softmax(-1), plain.weights, self.temperature, self.whole)


@torch.no_grad()
def top_logits(view: View, corpus: Corpus, top: int, path: Path, device: torch.device,
               tick: Tick = silent) -> tuple[Tensor, Tensor, Tensor]:
    """The `top` highest logits after every token, their tokens, both (tokens, top), float32 and int32, and the log of the
    normaliser of all logits, (tokens,) float32."""
    states = final_states(view, corpus, path, device, tick)
    top = min(top, view.spec.vocabulary)
    best = torch.full((corpus.tokens, top), -torch.inf)
    tokens = torch.zeros(corpus.tokens, top, dtype=torch.int32)
    normaliser = torch.full((corpus.tokens,), -torch.inf, dtype=torch.float64)
    for piece in head_pieces(view, device):
        for start in range(0, corpus.tokens, HEAD_TOKENS):
            block = slice(start, min(start + HEAD_TOKENS, corpus.tokens))
            logits = piece.logits(read_rows(states, torch.arange(block.start, block.stop)).to(device)).cpu()
            normaliser[block] = torch.logaddexp(normaliser[block], logits.logsumexp(-1).double())
            here = torch.arange(piece.first, piece.first + len(piece), dtype=torch.int32).expand(len(logits), -1)
            highest = torch.cat([best[block], logits], 1).topk(top, 1)
            best[block], tokens[block] = highest.values, torch.cat([tokens[block], here], 1).gather(1, highest.indices)
    states.remove()
    return best, tokens, normaliser.float()


class Begin(Protocol):
    """Called before every step, and with `active` False before losses are taken without dropout."""

    def __call__(self, step: int, /, *, active: bool) -> None: ...


@dataclass
class ImitatingLayer:
    """The mean of ‖y − t‖² / ‖t‖² over tokens, with a layer's current outputs y and the original's t.

    Every token counts the same, although a few states are a hundred times longer than the rest.
    """

    frame: Frame
    inputs: HiddenStates
    wanted: HiddenStates
    trained_windows: int                     # the windows after these are held out
    begin: Begin

    @property
    def count(self) -> int:
        """The number of windows to train on."""
        return self.trained_windows

    def _loss(self, numbers: Sequence[int]) -> Tensor:
        outputs = self.frame(self.inputs.read(numbers))
        wanted = self.wanted.read(numbers).to(outputs)
        distance = (outputs - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)
        return distance.sum()

    def gradients(self, numbers: list[int], step: int) -> float:
        """Add the gradient of the mean loss of some windows to the tensors' `.grad`; returns that loss."""
        self.begin(step, active=True)
        tokens, total = sum(self.inputs.lengths[number] for number in numbers), 0.0
        for number in numbers:
            with torch.enable_grad():
                loss = self._loss([number]) / tokens
            with part("backward passes"):
                torch.autograd.backward(loss)
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def held_out(self) -> float:
        """The mean loss of the held-out windows."""
        self.begin(0, active=False)
        numbers = range(self.trained_windows, len(self.inputs.lengths))
        tokens = sum(self.inputs.lengths[number] for number in numbers)
        return sum(float(self._loss([number])) for number in numbers) / tokens
