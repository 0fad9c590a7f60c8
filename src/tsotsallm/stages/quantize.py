"""Quantisation of every linear: round to nearest, or GPTQ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

from tsotsallm.checkpoint.anatomy import linear_shapes
from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import NumericsError, RecipeError
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid
from tsotsallm.numerics.gptq import gptq, visiting_order
from tsotsallm.numerics.grids import Grid, IntegerGrid, grid_from, require_divisible
from tsotsallm.numerics.rounding import block_order, round_plainly, round_to_blocks
from tsotsallm.stages.base import LinearEdit, Workplace, decided_later
from tsotsallm.stages.selection import Selection, places_of
from tsotsallm.streaming.statistics import Gram
from tsotsallm.training.lora import Place


@dataclass(frozen=True)
class Quantize(LinearEdit):
    """Store linears as integers of 2 to 8 bits, or on another grid; zeros that `sparsity` made stay zero.

    grid        int; nf4: the sixteen levels of QLoRA (arXiv:2305.14314); or one of GGUF's (q8_0, q6_k, q5_k, q5_1, q5_0,
                q4_k, q4_1, q4_0, q3_k, q2_k), which llama.cpp then computes with as they are. All but int are kept in the
                project's own container. Where a block of GGUF's does not divide a row, the next grid that does is taken,
                or the linear stays in 16 bits
    group       columns that share a scale, or `channel` for whole rows; 128, on nf4 64
    symmetric   no zero points; asymmetric results load in transformers through `dequantize`
    act_order   GPTQ visits columns by falling Gram diagonal; scales stay those of the stored order
    damp        raises the Gram's diagonal by this share of its mean
    sequential  observe o_proj and down_proj again after the linears before them were edited
    weigh       whether a token counts as much as the loss depends on what the linear gives for it, which a sweep back
                through the model finds out first (on GGUF's grids yes, else no)
    follow      how far, 0 to 1, a linear makes up for the errors of the layers before it: it aims at the outputs that it
                has on the original's inputs (arXiv:2504.02692; on GGUF's grids 0.5, else 0)
    passes      how often scales and codes of GGUF's grids are chosen anew with all others as they stand
    lose_zeros  take a grid with a minimum for a pruned model, although it does not hold all zeros
    keep        {graph: FILE, share: 0.2, bits: 8}: linears that a domain needs most keep more bits (see `adapt.select`)
    """

    name: ClassVar[str] = "quantize"
    method: Literal["gptq", "rtn"] = "gptq"
    grid: Literal["int", "nf4", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k"] = "int"
    bits: int = 4
    group: int | Literal["channel"] | None = None
    symmetric: bool = True
    act_order: bool = True
    damp: float = 0.01
    sequential: bool = False
    weigh: bool | None = None
    follow: float | None = None
    passes: int = 2
    lose_zeros: bool = False
    keep: dict[Any, Any] = field(default_factory=dict)
    chosen: tuple[Place, ...] | None = decided_later()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"quantize.bits is {self.bits}; it takes 2 to 8")
        if self.grid in LAYOUTS and (self.bits, self.group, self.symmetric, self.act_order) != (4, None, True, True):
            raise RecipeError(f"quantize.grid {self.grid} has its own bits, groups and order; leave bits, group, symmetric "
                              "and act_order out")
        of_gguf = self.grid in LAYOUTS and self.method == "gptq"
        if self.weigh is None:
            object.__setattr__(self, "weigh", of_gguf)
        if self.follow is None:
            object.__setattr__(self, "follow", 0.5 if of_gguf and not self.sequential else 0.0)
        if not 0 <= float(self.follow or 0) <= 1 or (self.method == "rtn" and (self.weigh or self.follow)):
            raise RecipeError(f"quantize.follow is {self.follow} with method {self.method}; it takes 0 to 1, and it and "
                              "weigh are for gptq, which knows the inputs")
        if self.follow and self.sequential:
            raise RecipeError("quantize.sequential observes linears again after others were edited, where `follow` needs "
                              "the layer as it was; take one of them")
        if self.passes < 0:
            raise RecipeError(f"quantize.passes is {self.passes}; it takes 0 or more")
        if self.group is None and self.grid not in LAYOUTS:
            object.__setattr__(self, "group", 64 if self.grid == "nf4" else 128)
        if self.group not in ("channel", None) and (not isinstance(self.group, int) or self.group < 1):
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
    def levels(self) -> Grid:
        """The grid that linears are put on."""
        if self.grid in LAYOUTS:
            return GgmlGrid(self.grid)
        return grid_from({"type": self.grid, "bits": self.bits, "group": None if self.group == "channel" else self.group,
                          "symmetric": self.symmetric})

    @property
    def surveys(self) -> bool:
        return bool(self.keep)

    def survey(self, view: View, workplace: Workplace) -> dict[str, Any] | None:
        places = [(layer, name) for layer in range(view.spec.layers) for name in linear_shapes(view.spec, layer)]
        return Selection(self.keep, "quantize.keep", also=("bits",)).survey(view, workplace, places, 0)

    def decided(self, decision: Mapping[str, Any]) -> Self:
        return replace(self, chosen=places_of(decision))

    def levels_of(self, place: Place, d_in: int) -> Grid | None:
        """The grid of one linear; None where it stays as it is."""
        grid = self.grid_for(d_in)
        if isinstance(grid, IntegerGrid) and self.chosen is not None and place in self.chosen:
            return replace(grid, bits=self.keep["bits"])
        return grid

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
    def weighs_tokens(self) -> bool:
        return bool(self.weigh)

    @property
    def follows_original(self) -> bool:
        return bool(self.follow)

    @property
    def observes_again(self) -> bool:
        return self.sequential and self.method == "gptq"

    def grid_for(self, d_in: int) -> Grid | None:
        return self.levels.fitting(d_in) if isinstance(self.levels, GgmlGrid) else self.levels

    def check(self, spec: ModelSpec) -> None:
        widths = {name: d_in for name, (_, d_in) in linear_shapes(spec, 0).items()}
        if isinstance(self.levels, IntegerGrid) and self.levels.group is not None:
            require_divisible(widths, self.levels.group, ", or channel for one scale a row")
        if not any(self.grid_for(d_in) for d_in in widths.values()):
            found = ", ".join(f"{name} has {d_in}" for name, d_in in widths.items())
            raise RecipeError(f"quantize.grid {self.grid} stands in blocks of 32 or 256 input columns, which divide no "
                              f"linear: {found}; take an integer grid, such as gptq:4:channel")

    def require_zeros(self, *, pruned: bool) -> None:
        """Raise RecipeError where zeros that were made on purpose would be lost without being asked for."""
        if pruned and not self.levels.holds_zeros and not self.lose_zeros:
            raise RecipeError(f"quantize.grid {self.grid} gives every part a minimum of its own and does not hold the zeros "
                              "of a pruned model; take q4_0, q5_0, q8_0, q3_k or q6_k, or write lose_zeros: true")

    def flops(self, d_out: int, d_in: int) -> float:
        if self.method == "rtn":
            return 0.0
        again = 2 * self.passes + 1 if isinstance(self.levels, GgmlGrid) else 0
        return float(d_out) * d_in ** 2 * (1 + again)

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        grid = self.levels_of((layer, linear.name), linear.d_in)
        if grid is None:
            return
        keep = linear.mask if grid.holds_zeros else None
        if self.method == "rtn":
            linear.quantise(round_plainly(linear.dense, grid, keep) if isinstance(grid, GgmlGrid) else
                            grid.round(linear.dense, linear.storage, keep))
            return
        assert gram is not None
        if isinstance(grid, GgmlGrid):
            layout = grid.layout
            visit, order_of = f"blocks of {layout.block} in parts of {layout.part}", partial(block_order, grid=grid)
        else:
            visit, order_of = ("falling" if self.act_order else "as stored",
                               partial(visiting_order, act_order=self.act_order))
        try:
            factor, order = gram.factor(self.damp, visit, order_of, last=last)
        except NumericsError as error:
            raise NumericsError(f"layer {layer}, {linear.name}: {error}") from None
        aim = linear.reference
        if self.follow:
            aim = aim + self.follow * gram.followed(linear.reference, self.damp, visit)
        linear.quantise(round_to_blocks(aim, factor, order, grid, passes=self.passes, keep=keep)
                        if isinstance(grid, GgmlGrid) else gptq(aim, factor, order, grid, linear.storage, keep))
