"""Quantisation of every linear: round to nearest, or GPTQ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

from tsotsallm.checkpoint.anatomy import linear_shapes
from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import NumericsError, RecipeError
from tsotsallm.numerics.gptq import gptq
from tsotsallm.numerics.grids import GRIDS, IntegerGrid, require_divisible
from tsotsallm.stages.base import LinearEdit, Workplace, decided_later
from tsotsallm.stages.selection import Selection, places_of
from tsotsallm.streaming.statistics import Gram
from tsotsallm.training.lora import Place


@dataclass(frozen=True)
class Quantize(LinearEdit):
    """Store linears as integers of 2 to 8 bits, or on another grid; zeros that `sparsity` made stay zero.

    grid        int; nf4: the sixteen levels of QLoRA (arXiv:2305.14314), kept in the
                project's own container
    group       columns that share a scale, or `channel` for whole rows; 128, on nf4 64
    symmetric   no zero points; asymmetric results load in transformers through `dequantize`
    act_order   GPTQ visits columns by falling Gram diagonal; scales stay those of the stored order
    damp        raises the Gram's diagonal by this share of its mean
    sequential  observe o_proj and down_proj again after the linears before them were edited
    keep        {graph: FILE, share: 0.2, bits: 8}: linears that a domain needs most keep more bits (see `adapt.select`)
    """

    name: ClassVar[str] = "quantize"
    method: Literal["gptq", "rtn"] = "gptq"
    grid: Literal["int", "nf4"] = "int"
    bits: int = 4
    group: int | Literal["channel"] | None = None
    symmetric: bool = True
    act_order: bool = True
    damp: float = 0.01
    sequential: bool = False
    keep: dict[Any, Any] = field(default_factory=dict)
    chosen: tuple[Place, ...] | None = decided_later()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"quantize.bits is {self.bits}; it takes 2 to 8")
        if self.group is None:
            object.__setattr__(self, "group", 64 if self.grid == "nf4" else 128)
        if self.group != "channel" and (not isinstance(self.group, int) or self.group < 1):
            raise RecipeError(f"quantize.group is {self.group!r}; it takes a number of columns or `channel`")
        if self.grid == "nf4" and (self.bits, self.symmetric) != (4, True):
            raise RecipeError("quantize.grid nf4 has 4 bits and no zero points; leave bits and symmetric out")
        if self.keep:
            Selection(self.keep, "quantize.keep", also=("bits",))
            bits = self.keep.get("bits")
            if not isinstance(bits, int) or not self.bits < bits <= 8 or self.grid != "int":
                raise RecipeError(f"quantize.keep.bits is {bits!r}; it takes more than the others' {self.bits}, at "
                                  "most 8, on the integer grid")
        if not 0 <= self.damp < math.inf:
            raise RecipeError(f"quantize.damp is {self.damp}; it takes 0 or more")

    @property
    def levels(self) -> IntegerGrid:
        """The grid that linears are put on."""
        return GRIDS[self.grid](self.bits, None if self.group == "channel" else int(self.group or 0), self.symmetric)

    @property
    def surveys(self) -> bool:
        return bool(self.keep)

    def survey(self, view: View, workplace: Workplace) -> dict[str, Any] | None:
        places = [(layer, name) for layer in range(view.spec.layers) for name in linear_shapes(view.spec, layer)]
        return Selection(self.keep, "quantize.keep", also=("bits",)).survey(view, workplace, places, 0)

    def decided(self, decision: Mapping[str, Any]) -> Self:
        return replace(self, chosen=places_of(decision))

    def levels_of(self, place: Place) -> IntegerGrid:
        """The grid of one linear."""
        if self.chosen is not None and place in self.chosen:
            return replace(self.levels, bits=self.keep["bits"])
        return self.levels

    @property
    def extra_bits(self) -> float:
        """Bits a weight that what is kept takes beyond the grid, at most."""
        share = Selection(self.keep, "quantize.keep", also=("bits",)).share if self.keep else 0.0
        return share * (self.keep["bits"] - self.bits) if self.keep else 0.0

    @property
    def needs_corpus(self) -> bool:
        return self.needs_gram or (bool(self.keep) and self.keep.get("by", "saliency") == "saliency")

    @property
    def needs_gram(self) -> bool:
        return self.method == "gptq"

    @property
    def uses_factor(self) -> bool:
        return self.method == "gptq"

    @property
    def observes_again(self) -> bool:
        return self.sequential and self.method == "gptq"

    def grid_for(self, layer: int, layers: int) -> IntegerGrid | None:
        return self.levels

    def check(self, spec: ModelSpec) -> None:
        if self.levels.group is not None:
            require_divisible({name: d_in for name, (_, d_in) in linear_shapes(spec, 0).items()}, self.levels.group,
                              ", or channel for one scale a row")

    def flops(self, d_out: int, d_in: int) -> float:
        return float(d_out) * d_in ** 2 if self.method == "gptq" else 0.0

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        if self.method == "rtn":
            linear.quantise(self.levels_of((layer, linear.name)).round(linear.dense, linear.storage, linear.mask))
            return
        assert gram is not None
        try:
            factor, order = gram.factor(self.damp, self.act_order, last=last)
        except NumericsError as error:
            raise NumericsError(f"layer {layer}, {linear.name}: {error}") from None
        grid = self.levels_of((layer, linear.name))
        linear.quantise(gptq(linear.reference, factor, order, grid, linear.storage, linear.mask))
