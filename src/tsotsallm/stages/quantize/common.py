"""What the kinds of quantisation share: the method, the metric, and how a linear is put on a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.shapes import layer_shapes, linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import NumericsError, RecipeError, nearest
from tsotsallm.files import Json, JsonObject, quoted
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid
from tsotsallm.numerics.gptq import gptq, visiting_order
from tsotsallm.numerics.grids import GRIDS, Grid, Stored
from tsotsallm.numerics.rounding import OUTPUTS, block_order, round_plainly, round_to_blocks
from tsotsallm.stages.contract import LayerFile, LinearEdit, Model, Needs, Short, whole_number
from tsotsallm.stages.costs import HEADER_BYTES_PER_TENSOR
from tsotsallm.stages.ends import end_modules, packed_ends
from tsotsallm.streaming.statistics import Gram
from tsotsallm.streaming.sweep import Tick
from tsotsallm.training.trainee import Place
from tsotsallm.validation import NotNegative, Share

GgufGrid = Literal["q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k", "q2_k",
                   "tq2_0"]
END_PASSES = 2
COUPLING_DAMP = 0.5
"""Added to the metric of the outputs, whose mean diagonal is one (docs/LOG.md)."""


ROWS_JUDGED = 512
"""Rows that are judged at a time, to spare memory."""


def _nearest(weight: Tensor, grid: Grid, storage: torch.dtype, keep: Tensor | None,
             importance: Tensor | None = None) -> Stored:
    """A weight (d_out, d_in) rounded to nearest; on integers with scales for the `importance` of columns, where that is
    known."""
    if isinstance(grid, GgmlGrid):
        return round_plainly(weight, grid, keep)
    return grid.round(weight, storage, keep, importance)


def _short(method: str, values: list[str]) -> JsonObject:
    fields: JsonObject = {"method": method}
    if values[0] == "mixed":
        try:
            return fields | {"bits_per_weight": float(values[1] if len(values) == 2 else "")}
        except ValueError:
            raise RecipeError(f"{method}:mixed takes bits a weight, such as {method}:mixed:4.2") from None
    if values[0] not in GRIDS and not values[0].isdecimal():
        raise RecipeError(f"{method}: there is no grid {quoted(values[0])}{nearest(values[0], (*GRIDS, 'mixed'))}; it takes "
                          "bits, or a grid of GGUF's")
    fields |= {"grid": values[0]} if values[0] in GRIDS else {"bits": whole_number(values[0], method)}
    if len(values) == 2:
        fields["group"] = values[1] if values[1] in ("channel", "auto") else whole_number(values[1], method)
    return fields


@dataclass(frozen=True)
class Quantize(LinearEdit):
    """Store linears on a grid; zeros that `sparsity` made stay zero where the grid holds them.

    Which kind it is follows from the options: `bits_per_weight`, `file_bytes` or `grids` make it a mixture, a grid of GGUF's
    one of these, and anything else integers or nf4.

    `what` says in messages which kind it is, `named` which options of other kinds it refuses by itself.

    method      gptq (arXiv:2210.17323), which knows the inputs, or rtn: round to nearest
    damp        raises the Gram's diagonal by this share of its mean
    sequential  observe o_proj and down_proj again after the linears before them were edited
    weigh       weight every token by the loss gradient at the linear's outputs, found in a sweep back through the model
                first (on GGUF's grids by default)
    follow      how far, 0 to 1, a linear compensates for the errors of the layers before it: it aims at the outputs that it
                has on the original's inputs (arXiv:2504.02692; on GGUF's grids 0.5 by default, else 0)
    ends        a grid of GGUF's for embeddings and head as well
    """

    name: ClassVar[str] = "quantize"
    kinds: ClassVar[list[tuple[Callable[[Mapping[str, Json]], bool], type[Quantize]]]] = []
    what: ClassVar[str] = "quantisation"
    named: ClassVar[tuple[str, ...]] = ()
    shorts: ClassVar[dict[str, Short]] = {
        method: Short(partial(_short, method), f"{method}:BITS, {method}:BITS:GROUP, {method}:GRID or "
                      f"{method}:mixed:BITS", 2)
        for method in ("gptq", "rtn")}
    method: Literal["gptq", "rtn"] = "gptq"
    damp: NotNegative = 0.01
    sequential: bool = False
    weigh: bool | None = None
    follow: Share | None = None
    ends: GgufGrid | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Json]) -> Self:
        """The kind of quantisation that the options mean."""
        if cls is Quantize and isinstance(fields, Mapping):
            known = ("int", "nf4", *LAYOUTS, "mixed")
            if (grid := fields.get("grid", "int")) not in known:
                raise RecipeError(f"quantize.grid is {quoted(grid)}{nearest(str(grid), known)}")
            kind = next(kind for means, kind in cls.kinds if means(fields))
            every = {name for _, other in cls.kinds for name in other.options()}
            for key in fields:
                if key not in every:
                    raise RecipeError(f"quantize has no option {quoted(key)}{nearest(str(key), every)}")
                if key not in {*kind.options(), *kind.named}:
                    raise RecipeError(f"quantize.{key} does not apply to {kind.what}; leave it out")
            stage: Self = kind.from_fields(fields)      # type: ignore[assignment]
            return stage
        return super().from_fields(fields)

    @classmethod
    def schema(cls) -> JsonObject:
        """The kinds of quantisation, one of which applies."""
        if cls is not Quantize:
            return super().schema()
        return {"description": super().schema()["description"], "anyOf": [kind.schema() for _, kind in cls.kinds]}

    def __post_init__(self) -> None:
        if self.method == "rtn" and (self.weigh or self.follow):
            raise RecipeError("quantize.follow and weigh are for gptq, which knows the inputs; leave them out with rtn")
        if self.follow and self.sequential:
            raise RecipeError("quantize.sequential observes linears again after others were edited, where `follow` needs "
                              "the layer as it was; take one of them")

    def _set(self, **values: Any) -> None:
        """Write out what a missing option means."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    # -- its grids ----------------------------------------------------------------------------------------------

    def grid_for(self, d_in: int, *, zeros: bool = False) -> Grid | None:
        """The grid that a linear with rows so long is stored on, whether its zeros were made on purpose or not; None where
        it stays in 16 bits."""
        raise RecipeError(f"{type(self).__name__} has no grid")

    def grid_at(self, place: Place, d_in: int, *, zeros: bool = False) -> Grid | None:
        """The grid of one linear, decisions included."""
        return self.grid_for(d_in, zeros=zeros)

    @property
    def extra_bits(self) -> float:
        """Bits a weight of the whole model that some linears take beyond `grid_for`, at most."""
        return 0.0

    def ends_after(self, spec: ModelSpec, before: int) -> int:
        """What embeddings, final norm and head take afterwards, `before` bytes before."""
        fits = GgmlGrid(self.ends).fitting(spec.hidden) if self.ends is not None else None
        if fits is None:
            return before
        return fits.stored_bytes(spec.vocabulary, spec.hidden) * (1 if spec.tied else 2) + 4 * spec.hidden + 4 * 200

    def end_grids(self, view: View) -> dict[str, GgmlGrid]:
        """Embeddings and head on the grid of `ends`, where its blocks divide their rows."""
        fits = GgmlGrid(self.ends).fitting(view.spec.hidden) if self.ends is not None else None
        return dict.fromkeys(end_modules(view), fits) if fits is not None else {}

    def round_ends(self, view: View, gram: Gram | None, tick: Tick) -> dict[str, Tensor]:
        """Embeddings and head in blocks, rounded in the metric of what the head reads."""
        return packed_ends(view, self.end_grids(view), gram, self.passes_over_ends, tick)

    @property
    def passes_over_ends(self) -> int:
        """How often scales and codes of embeddings and head are chosen again with all others as they stand."""
        return END_PASSES

    def budget_bytes(self, spec: ModelSpec) -> int | None:
        """What all weights of the model take afterwards at most, where the stage keeps to a budget."""
        return None

    # -- the contract -------------------------------------------------------------------------------------------

    @property
    def needs(self) -> Needs:
        """With gptq text, Grams and factors, and what `weigh`, `follow` and `sequential` ask for."""
        knows_inputs = self.method == "gptq"
        return Needs(text=knows_inputs, gram=knows_inputs, factor=knows_inputs, token_weights=bool(self.weigh),
                     original_inputs=bool(self.follow), second_observation=self.sequential and knows_inputs,
                     held_out=knows_inputs)

    def check(self, model: Model) -> None:
        """Raise RecipeError where the edit before put the linears on a grid already."""
        super().check(model)
        if model.regridded:
            raise RecipeError("the recipe quantizes twice in a row, and the first would be lost; keep one of them")

    def layer_after(self, model: Model, index: int) -> LayerFile:
        """The layer with every linear on its grid."""
        size, packed = 0, False
        linears = linear_shapes(model.spec, index)
        for name, shape in layer_shapes(model.spec, index).items():
            linear = linears.get(name.removesuffix(".weight"))
            grid = None if linear is None else self.grid_at((index, name.removesuffix(".weight")), linear[1],
                                                            zeros=model.sparse)
            packed = packed or grid is not None
            if grid is not None and linear is not None:
                size += grid.stored_bytes(*linear, model.element) + 3 * HEADER_BYTES_PER_TENSOR
            else:
                size += math.prod(shape) * model.element + HEADER_BYTES_PER_TENSOR
        if packed:
            size += math.ceil(self.extra_bits / 8 * sum(math.prod(shape) for shape in linears.values()))
        return LayerFile(model.layers[index].source, size, packed)

    def shape(self, model: Model) -> Model:
        """The model on its grids, embeddings and head included where the stage rounds them."""
        return replace(super().shape(model), packed=True, quantized=True, regridded=True,
                       ends=self.ends_after(model.spec, model.ends), most_bytes=self.budget_bytes(model.spec))

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        """Put the linear on its grid: to nearest, or column by column with compensation.

        Where inputs were held out, compensation is kept only if it lowers the error there.
        """
        grid = self.grid_at((layer, linear.name), linear.d_in, zeros=linear.mask is not None)
        if grid is None:
            return
        keep = linear.mask if grid.holds_zeros else None
        if self.method == "rtn":
            linear.quantise(_nearest(linear.dense, grid, linear.storage, keep))
            return
        assert gram is not None
        visit, order_of = self._visiting(grid)
        try:
            last = last and not self.shares_grams
            factor = gram.factor(self.damp, visit, order_of, last=last)
        except NumericsError as error:
            raise NumericsError(f"layer {layer}, {linear.name}: {error}") from None
        aim = linear.reference
        if self.follow:
            aim = gram.followed(linear.reference, self.damp, visit, last=last).mul_(self.follow).add_(linear.reference)
        if isinstance(grid, GgmlGrid):
            stored: Stored = round_to_blocks(aim, factor.upper, factor.order, grid, passes=self.passes_over_blocks,
                                             keep=keep, outputs=self._metric(gram, linear))
        else:
            stored = gptq(aim, factor.upper, factor.order, grid, linear.storage, keep, searched=True)
        if gram.held_out is not None and self._loses(linear, grid, keep, gram, aim, stored):
            stored = _nearest(linear.dense, grid, linear.storage, keep, gram.diagonal)
        linear.quantise(stored)

    @staticmethod
    def _loses(linear: Linear, grid: Grid, keep: Tensor | None, gram: Gram, aim: Tensor, stored: Stored) -> bool:
        """Whether rounding to nearest has a smaller error than `stored` on the inputs that were held out."""
        more = 0.0
        for first in range(0, linear.d_out, ROWS_JUDGED):
            rows = torch.arange(first, min(first + ROWS_JUDGED, linear.d_out), device=aim.device)
            plain = _nearest(linear.dense[rows], grid, linear.storage, None if keep is None else keep[rows], gram.diagonal)
            more += gram.error_held_out(stored.rows_at(rows).dequantise().sub_(aim[rows]))
            more -= gram.error_held_out(plain.dequantise().sub_(aim[rows]))
        return more > 0

    @property
    def passes_over_blocks(self) -> int:
        """How often scales and codes of GGUF's grids are chosen again with all others as they stand."""
        return 0

    @property
    def shares_grams(self) -> bool:
        """Whether one Gram serves several grids, so that no factor may take its memory."""
        return False

    @property
    def falling(self) -> bool:
        """Whether columns are visited by falling diagonal of the Gram."""
        return True

    def _visiting(self, grid: Grid) -> tuple[str, Callable[[Tensor], Tensor]]:
        """The name of the order in which columns are visited, and what makes it of the Gram's diagonal."""
        if isinstance(grid, GgmlGrid):
            layout = grid.layout
            return f"blocks of {layout.block} in parts of {layout.part}", partial(block_order, grid=grid)
        return "falling" if self.falling else "as stored", partial(visiting_order, act_order=self.falling)

    def _metric(self, gram: Gram, linear: Linear) -> Tensor | None:
        """The metric of the outputs, damped: what little text tells of how outputs belong together is half believed."""
        if not self.needs.output_metric:
            return None
        outputs = gram.outputs[linear.name]
        rows = torch.arange(len(outputs))
        damped = outputs.to(linear.reference.device).float()
        damped[rows, rows % OUTPUTS] += COUPLING_DAMP
        return damped
