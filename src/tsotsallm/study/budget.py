"""The best use of a budget over everything at once: layers, widths, and the bits of every matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tsotsallm.checkpoint.anatomy import linear_shapes
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD, ModelSpec
from tsotsallm.errors import RecipeError
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.stages.allocation import allocate, candidates
from tsotsallm.stages.neurons import Neurons
from tsotsallm.stages.quantize import other_bytes


@dataclass(frozen=True)
class Structure:
    """What a model is before its matrices get their grids: the layers that go, and the share of neurons."""

    removed: tuple[int, ...] = ()
    narrower: float = 0.0

    @property
    def name(self) -> str:
        parts = [f"{len(self.removed)} layers fewer"] if self.removed else []
        parts += [f"{self.narrower:.0%} fewer neurons"] if self.narrower else []
        return ", ".join(parts) or "all layers and neurons"

    def spec(self, whole: ModelSpec) -> ModelSpec:
        found = whole.with_layers(whole.layers - len(self.removed))
        return Neurons(feed_forward=self.narrower).spec_after(found) if self.narrower else found

    def stages(self, layers: int) -> list[Any]:
        """The stages that make it."""
        kept = [layer for layer in range(layers) if layer not in self.removed]
        found: list[Any] = [{"layers": {"order": kept}}] if self.removed else []
        return found + ([{"neurons": {"feed_forward": self.narrower}}] if self.narrower else [])


@dataclass(frozen=True)
class Measured:
    """What units cost and hurt, each by itself, in nats a token (KL divergence).

    order    layers, that whose removal hurts least first
    depth    loss with the first k of them removed, for k from 0 on
    width    share of neurons -> loss
    grids    `layer.linear`, embeddings or head -> grid -> loss
    """

    order: tuple[int, ...]
    depth: tuple[float, ...]
    width: dict[float, float]
    grids: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Corrections:
    """How measured losses compare with the sums of those of units: for structure and for grids."""

    structure: float = 1.0
    grids: float = 1.0


@dataclass(frozen=True)
class Plan:
    """A way to use a budget, and the loss that is expected of it."""

    structure: Structure
    bytes: int
    structure_loss: float
    grids_loss: float

    @property
    def loss(self) -> float:
        return self.structure_loss + self.grids_loss


def structures(measured: Measured) -> Iterator[Structure]:
    """Every combination of depth and width that was measured."""
    for removed in range(len(measured.depth)):
        for narrower in sorted(measured.width):
            yield Structure(tuple(sorted(measured.order[:removed])), narrower)


def plan_for(structure: Structure, whole: ModelSpec, directory: Path, measured: Measured, corrections: Corrections,
             budget: int) -> Plan | None:
    """The best grids for a structure within a budget of bytes; None where even the smallest do not fit.

    What a narrower linear loses on a grid is its share of what the whole one does.
    """
    spec = structure.spec(whole)
    kept = [layer for layer in range(whole.layers) if layer not in structure.removed]
    shapes: dict[str, tuple[tuple[int, int], dict[str, float], float]] = {}
    for layer, original in enumerate(kept):
        before = linear_shapes(whole, original)
        for name, shape in linear_shapes(spec, layer).items():
            share = math.prod(shape) / math.prod(before[name])
            shapes[f"{original}.{name}"] = (shape, measured.grids.get(f"{original}.{name}", {}), share)
    for end in (EMBEDDING, HEAD)[:1 if spec.tied else 2]:
        module = end.removesuffix(".weight")
        shapes[module] = ((spec.vocabulary, spec.hidden), measured.grids.get(module, {}), 1.0)
    sizes: dict[str, list[int]] = {}
    losses: dict[str, list[float]] = {}
    fixed = other_bytes(spec, directory)
    for key, (shape, known, share) in shapes.items():
        grids = candidates(shape[1])
        if not grids:
            fixed += 2 * math.prod(shape)
            continue
        sizes[key] = [grid.stored_bytes(*shape) for grid in grids]
        losses[key] = [share * _loss_on(grid, known) for grid in grids]
    try:
        chosen = allocate(losses, sizes, budget - fixed)
    except RecipeError:
        return None
    used = fixed + sum(sizes[key][place] for key, place in chosen.items())
    lost = sum(losses[key][place] for key, place in chosen.items())
    return Plan(structure, used, corrections.structure * _structure_loss(structure, measured), corrections.grids * lost)


def smallest(whole: ModelSpec, directory: Path, measured: Measured) -> tuple[int, Structure]:
    """The fewest bytes that any structure takes on its smallest grids."""
    found = []
    for structure in structures(measured):
        spec = structure.spec(whole)
        total = other_bytes(spec, directory)
        for layer in range(spec.layers):
            for shape in linear_shapes(spec, layer).values():
                grids = candidates(shape[1])
                total += min((grid.stored_bytes(*shape) for grid in grids), default=2 * math.prod(shape))
        ends = candidates(spec.hidden)
        total += (1 if spec.tied else 2) * min((grid.stored_bytes(spec.vocabulary, spec.hidden) for grid in ends),
                                               default=2 * spec.vocabulary * spec.hidden)
        found.append((total, structure))
    return min(found, key=lambda one: one[0])


def best_plans(whole: ModelSpec, directory: Path, measured: Measured, corrections: Corrections, budget: int,
               known: Mapping[Structure, float]) -> list[Plan]:
    """Plans for all structures, the least expected loss first; those that were built count with their measured structure."""
    found = []
    for structure in structures(measured):
        plan = plan_for(structure, whole, directory, measured, corrections, budget)
        if plan is not None:
            found.append(replace(plan, structure_loss=known[structure]) if structure in known else plan)
    return sorted(found, key=lambda plan: plan.loss)


def _structure_loss(structure: Structure, measured: Measured) -> float:
    return measured.depth[len(structure.removed)] + measured.width[structure.narrower]


def _loss_on(grid: GgmlGrid, known: Mapping[str, float]) -> float:
    """The loss on a grid; on one that was not measured, from that with the nearest bits (a bit is worth a factor of 4)."""
    if not known:
        return 0.0
    if grid.type in known:
        return known[grid.type]
    nearest = min(known, key=lambda name: abs(GgmlGrid(name).bits_per_weight - grid.bits_per_weight))
    finer = GgmlGrid(nearest).bits_per_weight - grid.bits_per_weight
    return known[nearest] * math.exp(math.log(4) * finer)


def corrected(pairs: Sequence[tuple[float, float]]) -> float:
    """The factor between predicted and measured losses: the mean of their ratios, by the logarithm."""
    ratios = [math.log(measured / predicted) for predicted, measured in pairs if predicted > 1e-9 and measured > 1e-9]
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
