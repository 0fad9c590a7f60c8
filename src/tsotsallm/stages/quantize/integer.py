"""Linears as integers of 2 to 8 bits, or on the sixteen levels of QLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.files import Json, JsonObject
from tsotsallm.numerics.grids import Grid, IntegerGrid, grid_from, require_divisible
from tsotsallm.stages.contract import Model, Needs, Workplace, decided_later
from tsotsallm.stages.quantize.common import Quantize
from tsotsallm.stages.selection import Selection, places_of
from tsotsallm.training.trainee import Place
from tsotsallm.validation import Count

AUTO_GROUPS = (128, 96, 64, 48, 32)
"""What `group: auto` chooses among; on nf4 from 64 on, as QLoRA has it."""


Bits = Annotated[int, Field(ge=2, le=8)]


@dataclass(frozen=True)
class Keep(Selection):
    """{graph: FILE, share: 0.2, bits: 8}: the linears that keep more bits, and how many.

    bits  more than the others', at most 8
    """

    bits: Bits = 8


@dataclass(frozen=True)
class IntegerQuantize(Quantize):
    """Store linears as integers of `bits` bits, or on nf4 (arXiv:2305.14314), in groups of columns that share a scale.

    grid        int, or nf4
    bits        2 to 8
    group       columns that share a scale; `channel` for whole rows; `auto` for the largest of 128, 96, 64, 48, 32 (on nf4
                from 64 on) that divides the input width of every linear when the stage runs, or else whole rows
    symmetric   no zero points; asymmetric results load in transformers through `dequantize`
    act_order   GPTQ visits columns by falling Gram diagonal; scales stay those of the stored order
    keep        {graph: FILE, share: 0.2, bits: 8}: linears that a domain needs most keep more bits (see `adapt.select`)
    """

    what: ClassVar[str] = "integers and nf4"
    grid: Literal["int", "nf4"] = "int"
    bits: Bits = 4
    group: Count | Literal["channel", "auto"] = "auto"
    symmetric: bool = True
    act_order: bool = True
    keep: Keep | None = None
    chosen: tuple[Place, ...] | None = decided_later()

    @classmethod
    def from_fields(cls, fields: Mapping[str, Json]) -> Self:
        """Build the stage; raises RecipeError where nf4 is given bits or zero points."""
        if isinstance(fields, Mapping) and fields.get("grid") == "nf4":
            given = [name for name, value in (("bits", 4), ("symmetric", True)) if fields.get(name, value) != value]
            if given:
                raise RecipeError("quantize.grid nf4 has 4 bits and no zero points; leave bits and symmetric out")
        return super().from_fields(fields)

    def __post_init__(self) -> None:
        self._set(weigh=False, follow=0.0)
        super().__post_init__()
        if self.keep is not None and (self.keep.bits <= self.bits or self.grid != "int"):
            raise RecipeError(f"quantize.keep.bits is {self.keep.bits}; it takes more than the others' {self.bits}, at most "
                              "8, on the integer grid")

    def short(self) -> str:
        """`method:bits`, with the group where it is not `auto`."""
        group = "" if self.group == "auto" else f":{self.group}"
        return f"{self.method}:{self.bits if self.grid == 'int' else self.grid}{group}"

    def resolved(self, spec: ModelSpec) -> IntegerQuantize:
        """The stage with the group that `auto` means for these widths."""
        if self.group != "auto":
            return self
        widths = {d_in for _, d_in in linear_shapes(spec, 0).values()}
        groups = AUTO_GROUPS[AUTO_GROUPS.index(64):] if self.grid == "nf4" else AUTO_GROUPS
        return replace(self, group=next((size for size in groups if all(d_in % size == 0 for d_in in widths)), "channel"))

    def without_text(self) -> IntegerQuantize | None:
        """The same grid, rounded to nearest; None where a domain decides."""
        plain = replace(self, method="rtn", weigh=False, follow=0.0, sequential=False)
        return None if plain.needs.text else plain

    @property
    def needs(self) -> Needs:
        """What every quantisation needs, and text where a domain decides which linears keep more bits."""
        return super().needs | Needs(text=self.keep is not None and self.keep.by_saliency)

    @property
    def surveys(self) -> bool:
        """Whether a domain decides which linears keep more bits."""
        return self.keep is not None

    def survey(self, view: View, workplace: Workplace) -> JsonObject:
        """The linears that keep more bits, and the score of every one."""
        places = [(layer, name) for layer in range(view.spec.layers) for name in linear_shapes(view.spec, layer)]
        assert self.keep is not None
        return self.keep.survey(view, workplace, places, 0)

    def decided(self, decision: Mapping[str, Json]) -> Self:
        """The stage with the linears that keep more bits."""
        return replace(self, chosen=places_of(decision))

    @property
    def extra_bits(self) -> float:
        """The share of the weights that is kept, times what it takes more."""
        return self.keep.share * (self.keep.bits - self.bits) if self.keep is not None else 0.0

    @property
    def falling(self) -> bool:
        """`act_order`."""
        return self.act_order

    @property
    def levels(self) -> Grid:
        """The grid that linears are put on."""
        assert self.group != "auto", "a recipe is resolved before grids are asked for"
        return grid_from({"type": self.grid, "bits": self.bits, "group": None if self.group == "channel" else self.group,
                          "symmetric": self.symmetric})

    def grid_for(self, d_in: int, *, zeros: bool = False) -> Grid:
        """The same grid for all widths."""
        return self.levels

    def grid_at(self, place: Place, d_in: int, *, zeros: bool = False) -> Grid:
        """The grid, with more bits for linears that the survey chose."""
        grid = self.levels
        if isinstance(grid, IntegerGrid) and self.keep is not None and place in (self.chosen or ()):
            return replace(grid, bits=self.keep.bits)
        return grid

    def check(self, model: Model) -> None:
        """Raise RecipeError, with the usable groups, where the group does not divide every width."""
        super().check(model)
        if isinstance(self.levels, IntegerGrid) and self.levels.group is not None:
            widths = {name: d_in for name, (_, d_in) in linear_shapes(model.spec, 0).items()}
            require_divisible(widths, self.levels.group, ", or channel for one scale a row, or auto")

    def remarks(self, model: Model) -> list[str]:
        """That a GGUF file, where one is the source, has grids of its own."""
        if not model.from_gguf:
            return []
        return [f"the source is a GGUF file, and {self.short()} is a grid for transformers and vLLM: a GGUF file of the "
                "result may be larger than the source. For llama.cpp and Ollama take a grid of GGUF (gptq:q4_k), a mixture "
                "(gptq:mixed:4.5) or `tsotsallm fit`"]

    def flops(self, d_out: int, d_in: int) -> float:
        """One visit to every column; none for rounding to nearest."""
        return 0.0 if self.method == "rtn" else float(d_out) * d_in ** 2

