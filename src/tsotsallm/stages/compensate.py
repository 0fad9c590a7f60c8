"""A low-rank correction of what the edits before it did to a linear."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal, Self

from torch import Tensor

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.files import Json, JsonObject
from tsotsallm.numerics.lowrank import low_rank_correction
from tsotsallm.stages.contract import LayerFile, LinearEdit, Model, Needs, Short, decided_later, whole_number
from tsotsallm.stages.costs import HEADER_BYTES_PER_TENSOR
from tsotsallm.streaming.statistics import Gram
from tsotsallm.units import bytes_from_text, human_bytes
from tsotsallm.validation import Count

MOST_RANK = 128
DAMP = 0.01
"""Raises the Gram's diagonal by this share of its mean, whatever edits came before."""


def _short(values: list[str]) -> JsonObject:
    if values[0] == "auto":
        return {"rank": "auto", "budget": values[1] if len(values) == 2 else None}
    return {"rank": whole_number(values[0], "eora")}


@dataclass(frozen=True)
class Compensate(LinearEdit):
    """Add B·A of rank `rank` to every linear, so that its outputs are as near as can be to those of its reference.

    rank    the same for all, or auto: a first sweep measures what every rank of every linear takes off the error of its
            outputs, as a share of what they are, and `budget` is spent where a byte takes off most
    budget  bytes of all corrections together with `rank: auto`, such as 2MB
    method  eora: nearest on the calibration inputs (arXiv:2410.21271); svd: nearest in the weights themselves
    bits    of its numbers: 16, a PEFT adapter beside the base; or 8, with a scale for every rank, in the project's own
            container and as a GGUF adapter
    merge   add it to dense weights instead of keeping it as an adapter beside the base
    """

    name: ClassVar[str] = "compensate"
    shorts: ClassVar[dict[str, Short]] = {"eora": Short(_short, "eora:RANK or eora:auto:BYTES", 2)}
    rank: Count | Literal["auto"] = 32
    budget: int | str | None = None
    method: Literal["eora", "svd"] = "eora"
    bits: Literal[8, 16] = 16
    merge: bool = False
    ranks: Mapping[str, int] | None = decided_later()

    def __post_init__(self) -> None:
        if (self.rank == "auto") != (self.budget is not None):
            raise RecipeError("compensate.rank auto spends a budget, and only auto does; write "
                              "{compensate: {rank: auto, budget: 2MB}}")
        if self.budget is not None and self.budget_bytes < 1:
            raise RecipeError(f"compensate.budget is {self.budget}; it takes bytes, such as 2MB")
        if self.merge and self.bits == 8:
            raise RecipeError("compensate.bits 8 is how a correction is stored beside the weights, and merge stores none; "
                              "leave one of them out")

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes; raises RecipeError where it is no size."""
        return bytes_from_text(str(self.budget), "compensate.budget")

    def short(self) -> str | None:
        """`eora:RANK` or `eora:auto:BYTES`."""
        return None if self.method == "svd" else f"eora:{self.rank}" + ("" if self.budget is None else f":{self.budget}")

    @property
    def needs(self) -> Needs:
        """Ranks are measured in a sweep, whatever they are of."""
        return Needs(text=self.method == "eora" or self.surveys, gram=self.method == "eora")

    def without_text(self) -> Compensate | None:
        """The same correction nearest in the weights themselves; none where ranks are measured."""
        return None if self.surveys else replace(self, method="svd")

    @property
    def completes_edit_before(self) -> bool:
        """Always: a correction is of the edit before it."""
        return True

    @property
    def surveys(self) -> bool:
        """Whether ranks are chosen by a survey."""
        return self.rank == "auto"

    @property
    def highest(self) -> int:
        """The highest rank that a linear may get."""
        return MOST_RANK if self.rank == "auto" else int(self.rank)

    def rank_bytes(self, shape: tuple[int, int], element: int) -> int:
        """Bytes of one rank of a linear."""
        return sum(shape) * element if self.bits == 16 else sum(shape) + 2 * element

    def adapter_bytes(self, shapes: Mapping[str, tuple[int, int]], layers: int, element: int) -> int:
        """Bytes of the corrections of a layer at most; `element` are those of a number in storage."""
        if self.merge:
            return 0
        if self.rank == "auto":
            return -(-self.budget_bytes // layers)
        return sum(min(self.highest, *shape) * self.rank_bytes(shape, element) for shape in shapes.values())

    def layer_after(self, model: Model, index: int) -> LayerFile:
        """The layer with its correction beside it."""
        shapes = linear_shapes(model.spec, index)
        beside = self.adapter_bytes(shapes, model.spec.layers, model.element)
        headers = 4 * HEADER_BYTES_PER_TENSOR * len(shapes) if beside else 0
        return replace(model.layers[index], size=model.layers[index].size + beside + headers)

    def shape(self, model: Model) -> Model:
        """The model with its corrections: beside the linears, or merged into them."""
        after = super().shape(model)
        added = sum(new.size - old.size for new, old in zip(after.layers, model.layers, strict=True))
        return replace(after, corrected=not self.merge, beside=not self.merge,
                       most_bytes=None if model.most_bytes is None else model.most_bytes + added)

    def check(self, model: Model) -> None:
        """Raise RecipeError where there is nothing to correct, or where the budget buys no rank."""
        super().check(model)
        if not model.edits:
            raise RecipeError("compensate corrects what the stages before it did to the linears; put it right after "
                              "sparsity or quantize")
        spec = model.spec
        if self.rank == "auto":
            smallest = min(self.rank_bytes(shape, 2) for shape in linear_shapes(spec, 0).values())
            if self.budget_bytes < smallest:
                raise RecipeError(f"compensate.budget is {human_bytes(self.budget_bytes)}, but rank 1 of the smallest "
                                  f"linear takes {human_bytes(smallest)}")

    def flops(self, d_out: int, d_in: int) -> float:
        # Δ·H·Δᵀ of all outputs where it is exact, and its eigenvectors; see numerics.lowrank
        """The eigenvectors of the error, or a randomised search for them in wide linears."""
        width = min(d_out, 1024) if d_out <= 1024 else self.highest + 16
        rounds = 1 if d_out <= 1024 else 15
        gram = d_in ** 2 if self.method == "eora" else 0
        return 2.0 * rounds * width * (2 * d_out * d_in + gram) + 10.0 * width ** 3

    def probe(self, *, sparse: bool) -> tuple[LinearEdit, dict[str, list[float]]]:
        """A probe that notes what every rank takes off the error of every linear."""
        notes: dict[str, list[float]] = {}
        return _Probe(self.method, notes), notes

    def decide(self, notes: Mapping[str, list[float]], view: View) -> JsonObject:
        """Rank by rank to the linear where a byte takes off most of the error: falling gains make that the best choice."""
        element = view.checkpoint.storage.itemsize
        cost = {f"{layer}.{name}": self.rank_bytes(shape, element) for layer in range(view.spec.layers)
                for name, shape in linear_shapes(view.spec, layer).items()}
        ranks = dict.fromkeys(notes, 0)
        left = self.budget_bytes
        heap = [(-gains[0] / cost[key], key) for key, gains in notes.items() if gains]
        heapq.heapify(heap)
        while heap:
            _, key = heapq.heappop(heap)
            if cost[key] > left:
                continue                    # a narrower linear may still fit
            left -= cost[key]
            ranks[key] += 1
            if ranks[key] < len(notes[key]):
                heapq.heappush(heap, (-notes[key][ranks[key]] / cost[key], key))
        return {"ranks": ranks, "bytes": self.budget_bytes - left}

    def decided(self, decision: Mapping[str, Json]) -> Self:
        """The stage with a rank for every linear."""
        return replace(self, ranks=dict(decision["ranks"]))

    def _metric(self, gram: Gram | None) -> Callable[[Tensor], Tensor] | None:
        return None if self.method == "svd" or gram is None else partial(gram.times, damp=DAMP)

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        """Add the best correction of the rank to the linear, beside it or merged."""
        rank = self.highest if self.ranks is None else self.ranks[f"{layer}.{linear.name}"]
        if not rank:
            return
        delta = linear.reference - linear.effective()
        if not bool(delta.any()):           # nothing was done to it
            return
        left, right, _ = low_rank_correction(delta, self._metric(gram), rank)
        if not self.merge:
            linear.compensate(left, right, self.bits)
            return
        if linear.stored is not None:
            raise RecipeError("compensate.merge adds to dense weights, but quantize made codes of them; leave merge out, or "
                              "put compensate before quantize")
        linear.values, linear.edited = linear.dense + left @ right, True
        if linear.mask is not None:
            linear.values *= linear.mask


@dataclass(frozen=True)
class _Probe(LinearEdit):
    """Notes for every linear what each rank takes off the error of its outputs, as a share of their own squares."""

    name: ClassVar[str] = "probe"
    method: str = "eora"
    notes: dict[str, list[float]] = field(default_factory=dict)

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        times = None if self.method == "svd" or gram is None else partial(gram.times, damp=DAMP)
        _, _, removed = low_rank_correction(linear.reference - linear.effective(), times, MOST_RANK)
        outputs = linear.reference if times is None else times(linear.reference.mT).mT
        whole = float((outputs * linear.reference).sum(dtype=linear.reference.dtype))
        self.notes[f"{layer}.{linear.name}"] = [float(value) / max(whole, 1e-30) for value in removed]
