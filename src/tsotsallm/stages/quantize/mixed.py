"""A grid of GGUF's for every matrix, within a budget of bytes: measured losses decide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field

from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.files import quoted
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid
from tsotsallm.numerics.grids import Grid
from tsotsallm.stages.allocation import DENSE, MIXED, Probe, allocate, allocate_within, candidates, token_seconds
from tsotsallm.stages.contract import LinearEdit, Model, decided_later
from tsotsallm.stages.ends import end_losses, end_modules, head_gram
from tsotsallm.stages.quantize.gguf import OWN, BlockQuantize
from tsotsallm.stages.quantize.sizes import matrix_weights, other_bytes, other_values
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.training.lora import Place
from tsotsallm.units import bytes_from_text


@dataclass(frozen=True)
class MixedQuantize(BlockQuantize):
    """Give every matrix a grid of GGUF's of its own, or 16 bits, embeddings and head included, so that the loss grows least.

    grid                         mixed, which a budget says as well
    bits_per_weight, file_bytes  the budget: at most N bits a weight, or N bytes of the GGUF file; a survey measures each
                                 matrix on each grid
    grid_seconds, token_seconds  seconds that a weight takes in a new token on each grid, as measured on some machine, and
                                 the seconds that all matrices may take together: the budget is spent within that
    """

    what: ClassVar[str] = "a mixture of grids"
    named: ClassVar[tuple[str, ...]] = (*OWN, "ends", "keep")
    grid: Literal["mixed"] = "mixed"
    bits_per_weight: Annotated[float, Field(gt=1, le=16)] | None = None
    file_bytes: int | str | None = None
    grid_seconds: dict[str, float] = field(default_factory=dict)
    token_seconds: float | None = None
    assigned: Mapping[str, str] | None = decided_later()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Build the stage; raises RecipeError for options that the survey decides."""
        if isinstance(fields, Mapping) and (fields.get("method") == "rtn" or fields.get("ends") or fields.get("keep")):
            raise RecipeError("quantize with a budget chooses all grids itself, by what gptq's survey measures; leave "
                              "method, ends and keep out")
        if isinstance(fields, Mapping) and fields.get("grid", "mixed") in LAYOUTS:
            raise RecipeError(_ONE_BUDGET)
        return super().from_fields(fields)

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.file_bytes is None):
            raise RecipeError(_ONE_BUDGET)
        if self.file_bytes is not None and self._file_bytes < 1:
            raise RecipeError(f"quantize.file_bytes is {self.file_bytes}; it takes bytes, such as 700MB")
        if (self.token_seconds is not None) != bool(self.grid_seconds):
            raise RecipeError("quantize.grid_seconds and token_seconds go together, with a budget; give both, or neither")
        if any(name not in (*LAYOUTS, DENSE) or not seconds > 0 for name, seconds in self.grid_seconds.items()):
            raise RecipeError(f"quantize.grid_seconds is {quoted(self.grid_seconds)}; it takes grids of GGUF's and f16 with "
                              "seconds above 0")
        super().__post_init__()
        if not self.weigh:
            raise RecipeError("quantize with a budget needs to know how much the loss depends on each linear; leave "
                              "weigh out")

    @property
    def _file_bytes(self) -> int:
        return bytes_from_text(str(self.file_bytes), "quantize.file_bytes")

    def short(self) -> str:
        """`gptq:mixed:BITS`."""
        return f"{self.method}:mixed:{self.bits_per_weight}"

    def without_text(self) -> None:
        """None: without text nothing can be measured."""

    @property
    def measured_by(self) -> list[Any]:
        """Everything but the budget and how it is spent: the losses are the same."""
        return [self.name, self.fields() | {"bits_per_weight": None, "file_bytes": None, "passes": None,
                                           "grid_seconds": {}, "token_seconds": None}]

    @property
    def surveys(self) -> bool:
        """Always."""
        return True

    @property
    def surveyed_by_loss(self) -> bool:
        """Always."""
        return True

    def grid_for(self, d_in: int) -> Grid | None:
        """The largest that a matrix may get."""
        return GgmlGrid(MIXED[-1]).fitting(d_in)

    def grid_at(self, place: Place, d_in: int) -> Grid | None:
        """The grid that the survey assigned; None for 16 bits."""
        if self.assigned is None:
            return self.grid_for(d_in)
        grid = self.assigned.get(f"{place[0]}.{place[1]}")
        return None if grid is None else GgmlGrid(grid)

    def check(self, model: Model) -> None:
        """Raise RecipeError where no linear has whole blocks."""
        super().check(model)
        self._require_blocks(model)

    def end_grids(self, view: View) -> dict[str, GgmlGrid]:
        """The grids that the survey assigned to embeddings and head."""
        assigned = self.assigned or {}
        return {module: GgmlGrid(assigned[module]) for module in end_modules(view) if module in assigned}

    def ends_after(self, spec: ModelSpec, before: int) -> int:
        """As before: the budget holds them."""
        return before

    def budget_bytes(self, spec: ModelSpec) -> int:
        """The budget in bytes of all weights."""
        if self.file_bytes is not None:
            return self._file_bytes
        return int(float(self.bits_per_weight or 0) * matrix_weights(spec) / 8) + 4 * other_values(spec)

    def _matrix_bytes(self, spec: ModelSpec, directory: Path) -> int:
        """What the budget leaves for linears, embeddings and head."""
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight * matrix_weights(spec) / 8)
        return self._file_bytes - other_bytes(spec, directory)

    def probe(self, *, sparse: bool) -> tuple[LinearEdit, dict[str, list[float]]]:
        """A probe that notes the expected loss of every linear on every grid."""
        notes: dict[str, list[float]] = {}
        return Probe(self.damp, sparse and not self.lose_zeros, notes), notes

    def probe_ends(self, view: View, corpus: Corpus, outputs: HiddenStates, notes: dict[str, list[float]],
                   squares: float) -> None:
        """Add the expected losses of embeddings and head on every grid."""
        gram = head_gram(view, outputs, torch.device("cpu"))
        grids = {module: candidates(view.spec.hidden) for module in end_modules(view)}
        notes |= end_losses(view, corpus, gram, grids, squares)

    def decide(self, notes: Mapping[str, list[float]], view: View) -> dict[str, Any]:
        """A grid for every matrix, the budget used as well as the measured losses allow."""
        shapes = {f"{layer}.{name}": shape for layer in range(view.spec.layers)
                  for name, shape in linear_shapes(view.spec, layer).items()}
        shapes |= dict.fromkeys(end_modules(view), (view.spec.vocabulary, view.spec.hidden))
        zeros = {key: len(notes[key]) != len(candidates(shape[1])) for key, shape in shapes.items()}
        grids = {key: candidates(shape[1], zeros=zeros[key]) for key, shape in shapes.items()}
        fixed = sum(math.prod(shape) * 2 for key, shape in shapes.items() if not grids[key])
        sizes = {key: [*(grid.stored_bytes(*shapes[key]) for grid in grids[key]), 2 * math.prod(shapes[key])]
                 for key in shapes if grids[key]}
        matrices = self._matrix_bytes(view.spec, view.checkpoint.directory)
        losses = {key: [*notes[key], 0.0] for key in sizes}
        names = {key: [*(grid.type for grid in grids[key]), DENSE] for key in sizes}
        if self.token_seconds is None:
            chosen = allocate(losses, sizes, matrices - fixed)
        else:
            seconds = {key: [math.prod(shapes[key]) * taken for taken in token_seconds(grids[key], self.grid_seconds)]
                       for key in sizes}
            chosen = allocate_within(losses, sizes, matrices - fixed, seconds, self.token_seconds)
        used = sum(sizes[key][choice] for key, choice in chosen.items()) + fixed
        return {"grids": {key: names[key][choice] for key, choice in chosen.items()},
                "predicted_loss": sum(losses[key][choice] for key, choice in chosen.items()),
                "bits_per_weight": 8 * used / sum(math.prod(shape) for shape in shapes.values()),
                "bytes": used, "budget_bytes": matrices,
                "losses": {key: {grid.type: loss for grid, loss in zip(grids[key], notes[key], strict=True)}
                           for key in sizes}}

    def decided(self, decision: Mapping[str, Any]) -> Self:
        """The stage with a grid for every matrix."""
        return replace(self, assigned={key: grid for key, grid in decision["grids"].items() if grid != DENSE})


_ONE_BUDGET = ("quantize.grid mixed spends a budget, and only mixed does; give bits_per_weight or file_bytes, one of them, "
               "and no other grid")
