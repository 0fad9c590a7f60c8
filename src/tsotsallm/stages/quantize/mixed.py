"""A grid of GGUF's for every matrix: as the recipe says, or within a budget of bytes, where measured losses decide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from tsotsallm.checkpoint.gguf_layout import UNKNOWN_LABELS, aligned, layout_of, vocabulary_entries
from tsotsallm.checkpoint.gguf_vocabulary import read_vocabulary
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD, ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError, nearest
from tsotsallm.files import Json, JsonObject, quoted
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid
from tsotsallm.numerics.grids import Grid
from tsotsallm.stages.allocation import (
    ACTIVATIONS,
    DENSE,
    MIXED,
    MIXED_WITH_ZEROS,
    Probe,
    allocate,
    candidates,
    require_budget,
)
from tsotsallm.stages.contract import LinearEdit, Model, Needs, Workplace, decided_later
from tsotsallm.stages.ends import end_losses, end_modules
from tsotsallm.stages.quantize.common import GgufGrid
from tsotsallm.stages.quantize.gguf import OWN, BlockQuantize
from tsotsallm.stages.quantize.sizes import matrix_weights, other_values
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.training.trainee import Place
from tsotsallm.units import bytes_from_text


@dataclass(frozen=True)
class MixedQuantize(BlockQuantize):
    """Give every matrix a grid of GGUF's of its own, or 16 bits, embeddings and head included, so that the loss grows least.

    grid                         mixed, which a budget says as well
    bits_per_weight, file_bytes  the budget: at most N bits a weight, or N bytes of the GGUF file, with at most 4 KiB of it
                                 for its name and recipe; a survey measures each matrix on each grid
    grids                        instead of a budget, the grid of every matrix, or f16, as in a survey's decision: keys such
                                 as `3.mlp.down_proj`, `model.embed_tokens`, `lm_head`
    """

    what: ClassVar[str] = "a mixture of grids"
    named: ClassVar[tuple[str, ...]] = (*OWN, "ends", "keep")
    grid: Literal["mixed"] = "mixed"
    bits_per_weight: Annotated[float, Field(gt=1, le=16)] | None = None
    file_bytes: int | str | None = None
    grids: dict[str, GgufGrid | Literal["f16"]] = field(default_factory=dict)
    assigned: Mapping[str, str] | None = decided_later()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Json]) -> Self:
        """Build the stage; raises RecipeError for options that the survey or `grids` decide."""
        if isinstance(fields, Mapping) and (fields.get("ends") or fields.get("keep") or (
                fields.get("method") == "rtn" and not fields.get("grids"))):
            raise RecipeError("quantize.grids names the grid of every matrix; leave ends and keep out" if fields.get("grids")
                              else "quantize with a budget chooses all grids itself, by what gptq's survey measures; leave "
                              "method, ends and keep out")
        if isinstance(fields, Mapping) and fields.get("grid", "mixed") in LAYOUTS:
            raise RecipeError(_ONE_BUDGET)
        return super().from_fields(fields)

    def __post_init__(self) -> None:
        if sum((self.bits_per_weight is not None, self.file_bytes is not None, bool(self.grids))) != 1:
            raise RecipeError(_ONE_BUDGET)
        if self.file_bytes is not None and self._file_bytes < 1:
            raise RecipeError(f"quantize.file_bytes is {self.file_bytes}; it takes bytes, such as 700MB")
        super().__post_init__()
        if self.grids:
            self._set(assigned={key: grid for key, grid in self.grids.items() if grid != DENSE})
        elif not self.weigh:
            raise RecipeError("quantize with a budget needs to know how much the loss depends on each linear; leave "
                              "weigh out")

    @property
    def _file_bytes(self) -> int:
        return bytes_from_text(str(self.file_bytes), "quantize.file_bytes")

    def short(self) -> str | None:
        """`gptq:mixed:BITS`; None for other budgets, and for grids that the recipe names."""
        return None if self.bits_per_weight is None else f"{self.method}:mixed:{self.bits_per_weight}"

    def without_text(self) -> MixedQuantize | None:
        """The same grids, rounded to nearest; None where only a survey could choose them."""
        return MixedQuantize(method="rtn", grids=self.grids, lose_zeros=self.lose_zeros) if self.grids else None

    @property
    def measured_by(self) -> list[Json]:
        """The candidates, and everything but the budget and how it is spent: the losses are the same."""
        return [self.name, [*MIXED, *MIXED_WITH_ZEROS], ACTIVATIONS,
                self.fields() | {"bits_per_weight": None, "file_bytes": None, "passes": None}]

    @property
    def needs(self) -> Needs:
        """What grids of GGUF's need, and the largest inputs, whose rounding counts in the choice."""
        return super().needs | Needs(peaks=self.surveys)

    @property
    def surveys(self) -> bool:
        """Whether a budget is given, not the grids."""
        return not self.grids

    @property
    def shares_grams(self) -> bool:
        """Always: linears with the same inputs may take different grids."""
        return True

    def grid_for(self, d_in: int, *, zeros: bool = False) -> Grid | None:
        """The largest that a matrix may get."""
        return GgmlGrid(MIXED[-1]).fitting(d_in)

    def grid_at(self, place: Place, d_in: int, *, zeros: bool = False) -> Grid | None:
        """The grid that the survey assigned; None for 16 bits."""
        if self.assigned is None:
            return self.grid_for(d_in, zeros=zeros)
        grid = self.assigned.get(f"{place[0]}.{place[1]}")
        return None if grid is None else GgmlGrid(grid)

    def check(self, model: Model) -> None:
        """Raise RecipeError where no linear has whole blocks, or where the given grids do not suit the matrices."""
        super().check(model)
        self._require_blocks(model)
        if not self.grids:
            budget = (self._file_bytes if self.bits_per_weight is None else
                      int(self.bits_per_weight * matrix_weights(model.spec) / 8))
            require_budget(budget, self._least_bytes(model))
            return
        shapes = _matrices(model.spec)
        for key, grid in self.grids.items():
            if key not in shapes:
                near = [one for one in shapes if one.partition(".")[0] in (str(key).partition(".")[0], "model", "lm_head")]
                raise RecipeError(f"quantize.grids names {quoted(key)}, which is no matrix of the model at that stage, with "
                                  f"{model.spec.layers} layers{nearest(str(key), near)}")
            if grid == DENSE:
                continue
            block, columns = LAYOUTS[grid].block, shapes[key][1]
            if columns % block:
                fits = ", ".join(one.type for one in candidates(columns, zeros=model.sparse)) or "none"
                raise RecipeError(f"quantize.grids puts {key} on {grid}, whose blocks of {block} do not divide its "
                                  f"{columns} columns; take f16 or one that does: {fits}")
            if model.sparse and not GgmlGrid(grid).holds_zeros and not self.lose_zeros:
                raise RecipeError(f"quantize.grids puts {key} on {grid}, which does not hold the zeros of a pruned model; "
                                  "take q4_0, q5_0, q8_0, q3_k or q6_k, or write lose_zeros: true")
        if missing := [key for key, (_, d_in) in shapes.items() if key not in self.grids and candidates(d_in)]:
            raise RecipeError(f"quantize.grids has no grid for {', '.join(missing[:3])}"
                              f"{' and others' * (len(missing) > 3)}; name one for every matrix, or f16")

    def _least_bytes(self, model: Model) -> int:
        """What all matrices take on the smallest grids that they can have."""
        zeros, ends = model.sparse and not self.lose_zeros, set(_end_names(model.spec))
        return sum(min((grid.stored_bytes(*shape) for grid in candidates(shape[1], zeros=zeros and key not in ends)),
                       default=2 * math.prod(shape)) for key, shape in _matrices(model.spec).items())

    def end_grids(self, view: View) -> dict[str, GgmlGrid]:
        """The grids that the survey assigned to embeddings and head."""
        assigned = self.assigned or {}
        return {module: GgmlGrid(assigned[module]) for module in end_modules(view) if module in assigned}

    def ends_after(self, spec: ModelSpec, before: int) -> int:
        """Embeddings and head on the given grids; as before with a budget, which holds them."""
        if not self.assigned:
            return before
        shape = spec.vocabulary, spec.hidden
        grids = [self.assigned.get(module) for module in _end_names(spec)]
        dense = (before - 4 * spec.hidden) // len(grids)
        return 4 * spec.hidden + sum(dense if grid is None else GgmlGrid(grid).stored_bytes(*shape) + 200 for grid in grids)

    def budget_bytes(self, spec: ModelSpec) -> int | None:
        """The budget in bytes of all weights; None where grids are given."""
        if self.grids:
            return None
        if self.file_bytes is not None:
            return self._file_bytes
        return int(float(self.bits_per_weight or 0) * matrix_weights(spec) / 8) + 4 * other_values(spec)

    def _matrix_bytes(self, view: View) -> int:
        """What the budget leaves for linears, embeddings and head; ExportError where no GGUF file of the model can be."""
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight * matrix_weights(view.spec) / 8)
        vocabulary = vocabulary_entries(read_vocabulary(view.checkpoint.codec))
        return self._file_bytes - layout_of(view.spec, vocabulary, UNKNOWN_LABELS).bytes_beside_matrices

    def survey(self, view: View, workplace: Workplace) -> None:
        """None, since `probe` and `decide` find out; raises early where a budget of bytes can have no file."""
        self._matrix_bytes(view)

    def probe(self, *, sparse: bool) -> tuple[LinearEdit, dict[str, list[float]]]:
        """A probe that notes the expected loss of every linear on every grid."""
        notes: dict[str, list[float]] = {}
        return Probe(self.damp, sparse and not self.lose_zeros, notes), notes

    def probe_ends(self, view: View, corpus: Corpus, outputs: HiddenStates, notes: dict[str, list[float]],
                   squares: float) -> None:
        """Add the expected losses of embeddings and head on every grid."""
        grids = {module: candidates(view.spec.hidden) for module in end_modules(view)}
        notes |= end_losses(view, corpus, outputs, grids, squares)

    def decide(self, notes: Mapping[str, list[float]], view: View) -> JsonObject:
        """A grid for every matrix, the budget used as well as the measured losses allow: what rounding it costs, and what
        rounding its inputs adds in llama.cpp."""
        shapes, stored = _matrices(view.spec), aligned if self.file_bytes is not None else int
        zeros = {key: len(notes[key]) != len(candidates(shape[1])) for key, shape in shapes.items()}
        grids = {key: candidates(shape[1], zeros=zeros[key]) for key, shape in shapes.items()}
        fixed = sum(stored(2 * math.prod(shape)) for key, shape in shapes.items() if not grids[key])
        sizes = {key: [*(stored(grid.stored_bytes(*shapes[key])) for grid in grids[key]), stored(2 * math.prod(shapes[key]))]
                 for key in shapes if grids[key]}
        matrices = self._matrix_bytes(view)
        losses = {key: [*notes[key], 0.0] for key in sizes}
        inputs = {key: [*notes[f"{key}{ACTIVATIONS}"], 0.0] for key in sizes}
        in_engine = {key: [own + more for own, more in zip(losses[key], inputs[key], strict=True)] for key in sizes}
        names = {key: [*(grid.type for grid in grids[key]), DENSE] for key in sizes}
        chosen = allocate(in_engine, sizes, matrices - fixed)
        used = sum(sizes[key][choice] for key, choice in chosen.items()) + fixed
        return {"grids": {key: names[key][choice] for key, choice in chosen.items()},
                "predicted_loss": sum(losses[key][choice] for key, choice in chosen.items()),
                "predicted_loss_of_activations": sum(inputs[key][choice] for key, choice in chosen.items()),
                "bits_per_weight": 8 * used / sum(math.prod(shape) for shape in shapes.values()),
                "bytes": used, "budget_bytes": matrices,
                "losses": _by_grid(grids, notes, sizes),
                "losses_of_activations": _by_grid(grids, {key: notes[f"{key}{ACTIVATIONS}"] for key in sizes}, sizes)}

    def decided(self, decision: Mapping[str, Json]) -> Self:
        """The stage with a grid for every matrix."""
        return replace(self, assigned={key: grid for key, grid in decision["grids"].items() if grid != DENSE})


def _by_grid(grids: Mapping[str, list[GgmlGrid]], notes: Mapping[str, list[float]],
             keys: Iterable[str]) -> dict[str, dict[str, float]]:
    return {key: {grid.type: loss for grid, loss in zip(grids[key], notes[key], strict=True)} for key in keys}


def _end_names(spec: ModelSpec) -> list[str]:
    return [end.removesuffix(".weight") for end in (EMBEDDING, HEAD)[:1 if spec.tied else 2]]


def _matrices(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """The shape of every matrix of a model, by the name that decisions have for it."""
    shapes = {f"{layer}.{name}": shape for layer in range(spec.layers) for name, shape in linear_shapes(spec, layer).items()}
    return shapes | dict.fromkeys(_end_names(spec), (spec.vocabulary, spec.hidden))


_ONE_BUDGET = ("quantize.grid mixed spends a budget, and only mixed does; give bits_per_weight, file_bytes or grids, one of "
               "them, and no other grid")
