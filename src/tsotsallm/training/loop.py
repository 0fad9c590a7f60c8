"""The training loop: batches drawn by the seed alone, AdamW, validation, early stopping; a kill loses half a minute."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tsotsallm.checkpoint.provenance import SampleSummary, TrainingSummary
from tsotsallm.errors import NumericsError
from tsotsallm.records import Brief, Record
from tsotsallm.streaming.sweep import Tick, silent
from tsotsallm.validation import Count, Natural, NotNegative, Positive, Share

SAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    steps           optimizer steps; fewer when the held-out loss stops falling
    batch           samples per step
    learning_rate   highest value, after a linear rise over the share `warmup` of the steps
    decay           shape of the fall afterwards
    warmup          share of the steps in which the learning rate rises
    weight_decay    AdamW's decoupled decay
    clip            largest norm of all gradients together
    validate_every  steps between two validations; 0: ten validations in all
    patience        validations without a better held-out loss before training stops; the best factors are kept
    seed            of the samples' order
    """

    steps: Count = 200
    batch: Count = 8
    learning_rate: Positive = 2e-4
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.05
    weight_decay: NotNegative = 0.0
    clip: Positive = 1.0
    validate_every: Natural = 0
    patience: Count = 3
    seed: int = 0

    @property
    def look_every(self) -> int:
        """Steps between two validations."""
        return self.validate_every or max(1, self.steps // 10)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        share = (step - rising) / max(1, self.steps - rising)
        falls = {"constant": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
        return self.learning_rate * falls[self.decay]

    def drawn(self, step: int, samples: int) -> list[int]:
        """The samples of a step, from one shuffle of all samples after another; seed and step alone decide."""
        found = []
        for position in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(position, samples)
            found.append(_shuffle(self.seed * 1_000_003 + epoch, samples)[place])
        return found


@dataclass
class Curve(Record):
    """The course of training: (step, loss) of every step and of every validation, in nats per token."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    stopped: str = ""
    elapsed_s: float = 0.0

    @property
    def best(self) -> float:
        """The held-out loss of the best step."""
        return dict(self.held_out)[self.best_step]


@dataclass(frozen=True, kw_only=True)
class TrainedOn(Brief):
    """The course of training on one source: on so many samples and validated on others, or of one layer by itself."""

    source: str
    layer: int | None = None
    training: int | None = None
    held_out: int | None = None
    curve: Curve

    def summary(self, *, timed: bool) -> SampleSummary:
        """What the training came to; seconds only with `timed`, since a repeated run takes others."""
        curve = self.curve
        return SampleSummary(source=self.source, layer=self.layer, samples=self.training, steps=len(curve.loss),
                             best_step=curve.best_step, held_out_loss_before=curve.held_out[0][1], held_out_loss=curve.best,
                             stopped=curve.stopped, elapsed_s=round(curve.elapsed_s, 1) if timed else None)


@dataclass(frozen=True)
class Training(Record):
    """What a stage that trains did, with the curves; `engine` says how: resident, streamed or layer by layer."""

    stage: str
    engine: str
    samples: tuple[TrainedOn, ...]

    def summary(self, *, timed: bool = False) -> TrainingSummary:
        """The training without its curves; seconds only with `timed`."""
        return TrainingSummary(self.stage, self.engine, tuple(one.summary(timed=timed) for one in self.samples))


class Objective(Protocol):
    """A loss over numbered samples."""

    @property
    def count(self) -> int:
        """The number of samples to train on."""

    def gradients(self, numbers: list[int], step: int) -> float:
        """Add the gradient of the mean loss of some samples to the tensors' `.grad`; returns that loss."""

    def held_out(self) -> float:
        """The mean loss of the samples that training never sees."""


def train(tensors: dict[str, Tensor], objective: Objective, schedule: Schedule, state: Path | None = None, *,
          after: Callable[[], None] = lambda: None, tick: Tick = silent) -> Curve:
    """Train tensors in place and leave their best values there; resumes from the file `state` where it exists.

    `after` is called between the gradients of a step and the step itself. The samples and the learning rate of a step
    depend on its number alone, so that training resumed after a kill has the same losses. Raises NumericsError where a loss
    is not finite.
    """
    names = list(tensors)
    optimizer = torch.optim.AdamW(list(tensors.values()), weight_decay=schedule.weight_decay)
    best = {name: tensors[name].detach().clone() for name in names}
    curve = _restored(state, tensors, optimizer, best) or Curve()
    began, before, saved = time.monotonic(), curve.elapsed_s, time.monotonic()

    def keep() -> None:
        nonlocal saved
        saved = time.monotonic()
        curve.elapsed_s = before + time.monotonic() - began
        if state is not None:
            _save(state, tensors, optimizer, best, curve)

    def validate(step: int) -> None:
        loss = objective.held_out()
        _require_finite(loss, step)
        curve.held_out.append((step, loss))
        if len(curve.held_out) == 1 or loss < curve.best:
            curve.best_step = step
            for name in names:
                best[name].copy_(tensors[name].detach())

    if not curve.held_out:
        tick("held-out loss", 0.0)
        validate(0)
    for step in range(len(curve.loss), schedule.steps):
        if curve.stopped:
            break
        for tensor in tensors.values():
            tensor.grad = None
        loss = objective.gradients(schedule.drawn(step, objective.count), step)
        _require_finite(loss, step)
        after()
        _step(tensors, optimizer, schedule, step)
        curve.loss.append((step + 1, loss))
        if (step + 1) % schedule.look_every == 0 or step + 1 == schedule.steps:
            validate(step + 1)
            late = [at for at, _ in curve.held_out if at > curve.best_step]
            if len(late) >= schedule.patience:
                curve.stopped = f"the held-out loss did not fall in {schedule.patience} validations"
        if time.monotonic() - saved > SAVE_SECONDS:
            keep()
        tick(f"loss {loss:.3f}, held out {curve.held_out[-1][1]:.3f}", (step + 1) / schedule.steps)
    keep()
    with torch.no_grad():
        for name in names:
            tensors[name].copy_(best[name])
    return curve


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise NumericsError(f"the loss is not finite after {step} steps; choose a smaller learning_rate")


def _step(tensors: dict[str, Tensor], optimizer: torch.optim.AdamW, schedule: Schedule, step: int) -> None:
    norm = float(torch.nn.utils.clip_grad_norm_(tensors.values(), schedule.clip))
    _require_finite(norm, step)
    for group in optimizer.param_groups:
        group["lr"] = schedule.rate(step)
    optimizer.step()


def _save(path: Path, tensors: dict[str, Tensor], optimizer: torch.optim.AdamW, best: dict[str, Tensor],
          curve: Curve) -> None:
    """Write the whole state to a file that takes its name when it is complete."""
    content = {f"best.{name}": tensor for name, tensor in best.items()}
    for name, tensor in tensors.items():
        content[f"tensor.{name}"] = tensor.detach().contiguous()
        for part, value in optimizer.state.get(tensor, {}).items():
            content[f"{part}.{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    try:
        save_file(content, draft, metadata={"curve": json.dumps(curve.plain())})
    except SafetensorError as error:        # a full disk is reported as text
        raise OSError(errno.ENOSPC, f"the state of the training could not be saved ({error})") from None
    with draft.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(draft, path)


def _restored(path: Path | None, tensors: dict[str, Tensor], optimizer: torch.optim.AdamW,
              best: dict[str, Tensor]) -> Curve | None:
    if path is None or not path.exists():
        return None
    with safe_open(path, "pt") as file, torch.no_grad():
        saved = set(file.keys())
        for name, tensor in tensors.items():
            tensor.copy_(file.get_tensor(f"tensor.{name}"))
            best[name].copy_(file.get_tensor(f"best.{name}"))
            if f"step.{name}" in saved:
                optimizer.state[tensor] = {part: file.get_tensor(f"{part}.{name}")
                                           for part in ("step", "exp_avg", "exp_avg_sq")}
        return Curve.parsed(json.loads(file.metadata()["curve"]))


@functools.lru_cache(4)
def _shuffle(seed: int, samples: int) -> list[int]:
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed % (1 << 63))).tolist()
