"""Linears on one of GGUF's grids, which llama.cpp computes with as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.errors import RecipeError
from tsotsallm.files import Json
from tsotsallm.machine import compiler
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.numerics.grids import Grid
from tsotsallm.numerics.rounding import AT_ONCE, BYTES_A_WEIGHT, OUTPUTS
from tsotsallm.stages.contract import Model, Needs
from tsotsallm.stages.quantize.common import GgufGrid, Quantize
from tsotsallm.validation import Natural

OWN = ("bits", "group", "symmetric", "act_order")
"""Options of integers that GGUF's grids have of their own."""


@dataclass(frozen=True)
class BlockQuantize(Quantize):
    """What quantisation onto GGUF's grids has in common.

    couple      rows compensate for each other's errors, by how the loss couples their outputs; needs `weigh`, whose sweep
                back finds that too (by default with gptq)
    passes      how often scales and codes are chosen again with all others as they stand
    lose_zeros  take a grid without a level at zero for a pruned model, although it does not hold all zeros
    """

    named: ClassVar[tuple[str, ...]] = OWN
    couple: bool | None = None
    passes: Natural = 2
    lose_zeros: bool = False

    @classmethod
    def from_fields(cls, fields: Mapping[str, Json]) -> Self:
        """Build the stage; raises RecipeError for options that only integers have."""
        if isinstance(fields, Mapping) and any(name in fields for name in OWN):
            raise RecipeError(f"quantize.grid {fields.get('grid', 'mixed')} has its own bits, groups and order; leave bits, "
                              "group, symmetric and act_order out")
        return super().from_fields(fields)

    def __post_init__(self) -> None:
        knows_inputs = self.method == "gptq"
        self._set(weigh=knows_inputs, follow=0.5 if knows_inputs and not self.sequential else 0.0)
        self._set(couple=knows_inputs and self.weigh)
        if self.couple and not (knows_inputs and self.weigh):
            raise RecipeError("quantize.couple is for gptq on GGUF's grids, and needs the sweep back that weigh makes; "
                              "leave couple out")
        super().__post_init__()

    @property
    def needs(self) -> Needs:
        """What every quantisation needs, and the metric of the outputs with `couple`."""
        return super().needs | Needs(output_metric=bool(self.couple))

    @property
    def passes_over_blocks(self) -> int:
        """`passes`."""
        return self.passes

    @property
    def leaves_python(self) -> bool:
        """Where a compiler is installed and inputs are known."""
        return self.method == "gptq" and compiler() is not None

    @property
    def passes_over_ends(self) -> int:
        """`passes`."""
        return self.passes

    def flops(self, d_out: int, d_in: int) -> float:
        """One visit to every column, and two for every pass over the blocks."""
        return 0.0 if self.method == "rtn" else float(d_out) * d_in ** 2 * (2 * self.passes + 2)

    def work_bytes(self, d_out: int, d_in: int) -> int:
        """What the linear aims at, its codes twice, and what rounding takes for the rows that are rounded at once."""
        rounded = min(d_out, AT_ONCE * OUTPUTS) * d_in
        return 6 * d_out * d_in + BYTES_A_WEIGHT * rounded

    def _require_blocks(self, model: Model) -> None:
        """Raise RecipeError where no linear's rows are whole blocks."""
        widths = {name: d_in for name, (_, d_in) in linear_shapes(model.spec, 0).items()}
        if not any(self.grid_for(d_in) for d_in in widths.values()):
            found = ", ".join(f"{name} has {d_in}" for name, d_in in widths.items())
            raise RecipeError(f"quantize.grid {getattr(self, 'grid', 'mixed')} stands in blocks of 32 or 256 input columns, "
                              f"which divide no linear: {found}; take an integer grid, such as gptq:4:channel")


@dataclass(frozen=True)
class GgufQuantize(BlockQuantize):
    """Put linears on a grid of GGUF's, kept in the project's own container and written to GGUF as they are.

    Where a block of the grid does not divide a row, the next grid that does is taken, or the linear stays in 16 bits.

    grid  a type of GGUF's, such as q4_k
    """

    what: ClassVar[str] = "GGUF's grids"
    grid: GgufGrid = "q4_0"

    def short(self) -> str:
        """`method:grid`."""
        return f"{self.method}:{self.grid}"

    def without_text(self) -> GgufQuantize | None:
        """The same grid, rounded to nearest."""
        return GgufQuantize(method="rtn", grid=self.grid, ends=self.ends, lose_zeros=self.lose_zeros)

    @property
    def levels(self) -> GgmlGrid:
        """The grid that linears are put on where its blocks divide their rows."""
        return GgmlGrid(self.grid)

    def grid_for(self, d_in: int, *, zeros: bool = False) -> Grid | None:
        """The grid, or the next one whose blocks divide the row; None for 16 bits."""
        return self.levels.fitting(d_in, zeros=zeros)

    def check(self, model: Model) -> None:
        """Raise RecipeError where zeros would be lost, or where no linear has whole blocks."""
        super().check(model)
        if model.sparse and not self.levels.holds_zeros and not self.lose_zeros:
            why = "gives every part a minimum of its own" if self.levels.layout.minimum else "has no level at zero"
            raise RecipeError(f"quantize.grid {self.grid} {why} and does not hold the zeros of a pruned model; take q4_0, "
                              "q5_0, q8_0, q3_k or q6_k, or write lose_zeros: true")
        self._require_blocks(model)

    def remarks(self, model: Model) -> list[str]:
        """Which linears take another grid, or none."""
        elsewhere: dict[str, list[str]] = {}
        for name, (_, d_in) in linear_shapes(model.spec, 0).items():
            fits = self.levels.fitting(d_in, zeros=model.sparse)
            if fits != self.levels:
                place = f"on {fits.type}" if fits is not None else "in 16 bits"
                elsewhere.setdefault(place, []).append(f"{name.rpartition('.')[2]} ({d_in} columns)")
        return [f"blocks of {self.grid} do not divide {', '.join(names)}, which will lie {place}"
                for place, names in elsewhere.items()]
