"""Width pruning: zero single weights, N of every M or a fraction."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.errors import RecipeError
from tsotsallm.files import JsonObject
from tsotsallm.numerics.gptq import sparsegpt, visiting_order
from tsotsallm.numerics.grids import require_divisible
from tsotsallm.numerics.masks import keep_all_but, keep_fraction, wanda_saliency
from tsotsallm.stages.contract import LayerFile, LinearEdit, Model, Needs, Protect, Short, whole_number
from tsotsallm.stages.costs import dense_bytes
from tsotsallm.streaming.statistics import Gram
from tsotsallm.validation import RULES, Count, Natural, Part

SPARSEGPT_DAMP = 0.01


def _short(method: str, values: list[str]) -> JsonObject:
    if len(values) == 2:
        return {"method": method, "prune": whole_number(values[0], method), "group": whole_number(values[1], method)}
    try:
        return {"method": method, "prune_fraction": float(values[0])}
    except ValueError:
        raise RecipeError(f"{method}:{values[0]}: give a fraction such as {method}:0.5, or N:M such as {method}:2:4 (prunes "
                          "2 of every 4)") from None


LayerKey = Annotated[int, Field(ge=0, strict=False)]
"""A layer as a key: JSON has no numbers there, so a recipe read back from a result has text."""


@dataclass(frozen=True)
class Pruning:
    """{prune: 1, group: 4} or {prune_fraction: 0.3}: how much of a layer goes, where it differs from the others."""

    __pydantic_config__ = RULES
    prune: Natural | None = None
    group: Count | None = None
    prune_fraction: Part | None = None


@dataclass(frozen=True)
class Sparsity(LinearEdit):
    """Zero `prune` of every `group` neighbouring inputs of a row, or `prune_fraction` of each row.

    method          wanda: |W|·‖X‖₂ (arXiv:2306.11695); sparsegpt: with compensation (arXiv:2301.00774); magnitude: |W|
    prune, group    N of every M: how many go of how many neighbours
    prune_fraction  the share of every row that goes
    per_layer       {layer: {prune: 1}}: other numbers for some layers (prune: 0 leaves a layer dense)
    """

    name: ClassVar[str] = "sparsity"
    shorts: ClassVar[dict[str, Short]] = {
        method: Short(partial(_short, method), f"{method}:N:M (prunes N of every M) or {method}:FRACTION", 2)
        for method in ("wanda", "sparsegpt", "magnitude")}
    method: Literal["wanda", "sparsegpt", "magnitude"] = "wanda"
    prune: Natural | None = None
    group: Count | None = None
    prune_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    protect: Protect = field(default_factory=Protect)
    per_layer: dict[LayerKey, Pruning] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.prune_fraction is None) == (self.prune is None):
            raise RecipeError("sparsity takes either `prune` and `group`, or `prune_fraction`")
        if self.prune_fraction is not None and self.group is not None:
            raise RecipeError("sparsity.group belongs to `prune`, not to `prune_fraction`")
        for layer in (None, *self.per_layer):
            self._numbers(layer)

    def _numbers(self, layer: int | None) -> tuple[int, int, float]:
        """(prune, group, fraction) of a layer, or of all others; group 0 means a fraction."""
        own = self.per_layer.get(layer, Pruning()) if layer is not None else Pruning()
        fraction = own.prune_fraction
        if fraction is None and own == Pruning():
            fraction = self.prune_fraction
        if fraction is not None:
            return 0, 0, float(fraction)
        prune = self.prune if own.prune is None else own.prune
        group = self.group if own.group is None else own.group
        if prune is None or group is None or prune >= group:
            where = "sparsity" if layer is None else f"sparsity of layer {layer}"
            raise RecipeError(f"{where} prunes {prune} of every {group}; it must be fewer than the group")
        return prune, group, 0.0

    def short(self) -> str:
        """`method:N:M` or `method:FRACTION`."""
        numbers = self.prune_fraction if self.prune is None else f"{self.prune}:{self.group}"
        return f"{self.method}:{numbers}"

    @property
    def needs(self) -> Needs:
        """Text and Grams unless magnitudes decide; factors for SparseGPT."""
        knows_inputs = self.method != "magnitude"
        return Needs(text=knows_inputs, gram=knows_inputs, factor=self.method == "sparsegpt")

    @property
    def leaves_zeros(self) -> bool:
        """Always."""
        return True

    def without_text(self) -> Sparsity:
        """The same by magnitude."""
        return replace(self, method="magnitude")

    def applies_to(self, layer: int, layers: int) -> bool:
        """Whether any weight of the layer is pruned."""
        prune, _, fraction = self._numbers(layer)
        return layer in self.protect.open_layers(layers) and (prune > 0 or fraction > 0)

    def layer_after(self, model: Model, index: int) -> LayerFile:
        """The layer dense: zeros are stored."""
        return LayerFile(model.layers[index].source, dense_bytes(model.spec, index, model.element))

    def shape(self, model: Model) -> Model:
        """The model with its zeros, its linears dense."""
        return replace(super().shape(model), packed=False)

    def check(self, model: Model) -> None:
        """Raise RecipeError after quantisation, for layers that do not exist, and where groups do not divide a width."""
        super().check(model)
        if model.quantized:
            raise RecipeError("sparsity comes after quantize, which would make the weights dense again; put sparsity "
                              "first: quantize keeps its zeros and compensates for them")
        spec = model.spec
        for layer in self.per_layer:
            if not 0 <= layer < spec.layers:
                raise RecipeError(f"sparsity.per_layer names layer {layer}, but there are layers 0 to {spec.layers - 1} "
                                  "when this stage runs")
        if not any(self.applies_to(layer, spec.layers) for layer in range(spec.layers)):
            raise RecipeError(f"sparsity protects all {spec.layers} layers, so it would do nothing; protect fewer")
        for layer in range(spec.layers):
            if self.applies_to(layer, spec.layers):
                _, group, _ = self._numbers(layer)
                if group:
                    require_divisible({name: d_in for name, (_, d_in) in linear_shapes(spec, layer).items()}, group)

    def flops(self, d_out: int, d_in: int) -> float:
        """SparseGPT's updates; masks alone cost nothing that counts."""
        return float(d_out) * d_in ** 2 if self.needs.factor else 0.0

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        """Zero the weights of lowest saliency, with SparseGPT compensating for them."""
        prune, group, fraction = self._numbers(layer)
        if self.method == "sparsegpt":
            assert gram is not None
            factor = gram.factor(SPARSEGPT_DAMP, "as stored", partial(visiting_order, act_order=False), last=last)
            values, keep = sparsegpt(linear.dense, factor.upper, prune, group, fraction)
            linear.prune(keep, values)
            return
        saliency = linear.dense.abs()
        if self.method == "wanda":
            assert gram is not None
            saliency = wanda_saliency(linear.dense, gram.norms)
        linear.prune(keep_all_but(saliency, prune, group) if group else keep_fraction(saliency, fraction))
