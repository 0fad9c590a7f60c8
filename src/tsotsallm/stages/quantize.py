"""Quantisation of every linear: round to nearest, or GPTQ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.shapes import layer_shapes, linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.token_bytes import vocabulary_bytes
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import NumericsError, RecipeError
from tsotsallm.files import quoted
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid
from tsotsallm.numerics.gptq import gptq, visiting_order
from tsotsallm.numerics.grids import Grid, IntegerGrid, grid_from, require_divisible
from tsotsallm.numerics.rounding import OUTPUTS, block_order, round_plainly, round_to_blocks
from tsotsallm.stages.allocation import DENSE, MIXED, Probe, allocate, allocate_within, candidates, token_seconds
from tsotsallm.stages.base import LinearEdit, Workplace, decided_later
from tsotsallm.stages.ends import end_losses, end_modules, head_gram
from tsotsallm.stages.selection import Selection, places_of
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.statistics import Gram
from tsotsallm.training.lora import Place
from tsotsallm.units import bytes_from_text

HEADER_BYTES = 4 << 10
TENSOR_BYTES = 96
"""Of a GGUF file's header for every tensor, and what aligns it."""
AUTO_GROUPS = (128, 96, 64, 48, 32)
"""What `group: auto` chooses among; on nf4 from 64 on, as QLoRA has it."""
COUPLING_DAMP = 0.5
"""Added to the metric of the outputs, whose mean diagonal is one (docs/LOG.md)."""


def matrix_weights(spec: ModelSpec) -> int:
    """Numbers in linears, embeddings and head."""
    ends = spec.vocabulary * spec.hidden * (1 if spec.tied else 2)
    return ends + sum(math.prod(shape) for layer in range(spec.layers) for shape in linear_shapes(spec, layer).values())


def other_bytes(spec: ModelSpec, directory: Path) -> int:
    """Bytes of a GGUF file that are not matrices, hardly more: norms and biases in 32 bits, headers, vocabulary."""
    tensors = 3 + sum(len(layer_shapes(spec, layer)) for layer in range(spec.layers))
    return 4 * _other_values(spec) + HEADER_BYTES + TENSOR_BYTES * tensors + vocabulary_bytes(directory, spec.vocabulary)


def _other_values(spec: ModelSpec) -> int:
    """Numbers in norms and biases."""
    return spec.hidden + sum(math.prod(shape) for layer in range(spec.layers)
                             for shape in layer_shapes(spec, layer).values() if len(shape) == 1)


@dataclass(frozen=True)
class Quantize(LinearEdit):
    """Store linears as integers of 2 to 8 bits, or on another grid; zeros that `sparsity` made stay zero.

    grid        int; nf4: the sixteen levels of QLoRA (arXiv:2305.14314); or one of GGUF's (q8_0, q6_k, q5_k, q5_1, q5_0,
                q4_k, q4_1, q4_0, q3_k, q2_k), which llama.cpp then computes with as they are. All but int are kept in the
                project's own container. Where a block of GGUF's does not divide a row, the next grid that does is taken,
                or the linear stays in 16 bits
    group       columns that share a scale; `channel` for whole rows; `auto` for the largest of 128, 96, 64, 48, 32 (on nf4
                from 64 on) that divides the input width of every linear when the stage runs, or else whole rows
    symmetric   no zero points; asymmetric results load in transformers through `dequantize`
    act_order   GPTQ visits columns by falling Gram diagonal; scales stay those of the stored order
    damp        raises the Gram's diagonal by this share of its mean
    sequential  observe o_proj and down_proj again after the linears before them were edited
    weigh       whether a token counts as much as the loss depends on what the linear gives for it, which a sweep back
                through the model finds out first (on GGUF's grids yes, else no)
    couple      whether rows make up for each other's errors, by how the loss couples their outputs; needs `weigh`, and the
                same sweep back tells it (on GGUF's grids yes)
    follow      how far, 0 to 1, a linear makes up for the errors of the layers before it: it aims at the outputs that it
                has on the original's inputs (arXiv:2504.02692; on GGUF's grids 0.5, else 0)
    ends        a grid of GGUF's for embeddings and head as well
    bits_per_weight, file_bytes
                every matrix gets a grid of GGUF's of its own, or keeps 16 bits, embeddings and head included, so that the
                loss grows least within so many bits a weight, or so many bytes of the GGUF file: a survey measures each on
                each grid
    grid_seconds, token_seconds
                seconds that a weight takes in a new token on each grid, as measured on some machine, and how many seconds
                all matrices may take together: the budget is spent within that
    passes      how often scales and codes of GGUF's grids are chosen anew with all others as they stand
    lose_zeros  take a grid with a minimum for a pruned model, although it does not hold all zeros
    keep        {graph: FILE, share: 0.2, bits: 8}: linears that a domain needs most keep more bits (see `adapt.select`)
    """

    name: ClassVar[str] = "quantize"
    method: Literal["gptq", "rtn"] = "gptq"
    grid: Literal["int", "nf4", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k",
                  "mixed"] = "int"
    bits: int = 4
    group: int | Literal["channel", "auto"] | None = None
    symmetric: bool = True
    act_order: bool = True
    damp: float = 0.01
    sequential: bool = False
    weigh: bool | None = None
    couple: bool | None = None
    follow: float | None = None
    ends: Literal["q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k"] | None = None
    bits_per_weight: float | None = None
    file_bytes: int | str | None = None
    grid_seconds: dict[str, float] = field(default_factory=dict)
    token_seconds: float | None = None
    passes: int = 2
    lose_zeros: bool = False
    keep: dict[Any, Any] = field(default_factory=dict)
    chosen: tuple[Place, ...] | None = decided_later()
    assigned: Mapping[str, str] | None = decided_later()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise RecipeError(f"quantize.bits is {self.bits}; it takes 2 to 8")
        budget = self.bits_per_weight is not None or self.file_bytes is not None
        if budget and self.grid == "int":
            object.__setattr__(self, "grid", "mixed")
        if (self.grid == "mixed") != budget or (self.bits_per_weight is not None and self.file_bytes is not None):
            raise RecipeError("quantize.grid mixed spends a budget, and only mixed does; give bits_per_weight or "
                              "file_bytes, one of them, and no other grid")
        if self.mixed and (self.method != "gptq" or self.ends or self.keep):
            raise RecipeError("quantize with a budget chooses all grids itself, by what gptq's survey measures; leave "
                              "method, ends and keep out")
        if self.bits_per_weight is not None and not 1 < self.bits_per_weight <= 16:
            raise RecipeError(f"quantize.bits_per_weight is {self.bits_per_weight}; it takes more than 1, at most 16")
        if self.file_bytes is not None and bytes_from_text(str(self.file_bytes), "quantize.file_bytes") < 1:
            raise RecipeError(f"quantize.file_bytes is {self.file_bytes}; it takes bytes, such as 700MB")
        if (self.token_seconds is not None) != bool(self.grid_seconds) or (self.grid_seconds and not self.mixed):
            raise RecipeError("quantize.grid_seconds and token_seconds go together, with a budget; give both, or "
                              "neither")
        if any(name not in (*LAYOUTS, DENSE) or not seconds > 0 for name, seconds in self.grid_seconds.items()):
            raise RecipeError(f"quantize.grid_seconds is {quoted(self.grid_seconds)}; it takes grids of GGUF's and f16 with "
                              "seconds above 0")
        if self.on_gguf and (self.bits, self.group, self.symmetric, self.act_order) != (4, None, True, True):
            raise RecipeError(f"quantize.grid {self.grid} has its own bits, groups and order; leave bits, group, symmetric "
                              "and act_order out")
        of_gguf = self.on_gguf and self.method == "gptq"
        if self.weigh is None:
            object.__setattr__(self, "weigh", of_gguf)
        if self.couple is None:
            object.__setattr__(self, "couple", of_gguf and self.weigh)
        if self.couple and not (of_gguf and self.weigh):
            raise RecipeError("quantize.couple is for gptq on GGUF's grids, and needs the sweep back that weigh makes; "
                              "leave couple out")
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
        if self.mixed and not self.weigh:
            raise RecipeError("quantize with a budget needs to know how much the loss depends on each linear; leave "
                              "weigh out")
        if self.group is None and not self.on_gguf:
            object.__setattr__(self, "group", "auto")
        if self.group not in ("channel", "auto", None) and (not isinstance(self.group, int) or self.group < 1):
            raise RecipeError(f"quantize.group is {quoted(self.group)}; it takes a number of columns, `channel` or `auto`")
        if self.grid == "nf4" and (self.bits, self.symmetric) != (4, True):
            raise RecipeError("quantize.grid nf4 has 4 bits and no zero points; leave bits and symmetric out")
        if self.keep:
            Selection(self.keep, "quantize.keep", also=("bits",))
            bits = self.keep.get("bits")
            if not isinstance(bits, int) or not self.bits < bits <= 8 or self.grid != "int":
                raise RecipeError(f"quantize.keep.bits is {quoted(bits)}; it takes more than the others' {self.bits}, at "
                                  "most 8, on the integer grid")
        if not 0 <= self.damp < math.inf:
            raise RecipeError(f"quantize.damp is {self.damp}; it takes 0 or more")

    @property
    def mixed(self) -> bool:
        """Whether every matrix gets a grid of its own, within a budget."""
        return self.grid == "mixed"

    @property
    def on_gguf(self) -> bool:
        return self.mixed or self.grid in LAYOUTS

    @property
    def levels(self) -> Grid:
        """The grid that linears are put on; of a mixture the largest."""
        if self.mixed:
            return GgmlGrid(MIXED[-1])
        if self.grid in LAYOUTS:
            return GgmlGrid(self.grid)
        assert self.group != "auto", "a recipe is resolved before grids are asked for"
        return grid_from({"type": self.grid, "bits": self.bits, "group": None if self.group == "channel" else self.group,
                          "symmetric": self.symmetric})

    @property
    def measured_by(self) -> list[Any]:
        return [self.name, self.fields() | {"bits_per_weight": None, "file_bytes": None, "passes": None,
                                           "grid_seconds": {}, "token_seconds": None}]

    @property
    def surveys(self) -> bool:
        return bool(self.keep) or self.mixed

    def probe(self, *, sparse: bool) -> tuple[LinearEdit, dict[str, list[float]]]:
        notes: dict[str, list[float]] = {}
        return Probe(self.damp, sparse and not self.lose_zeros, notes), notes

    def probe_ends(self, view: View, corpus: Corpus, outputs: HiddenStates, notes: dict[str, list[float]],
                   squares: float) -> None:
        gram = head_gram(view, outputs, torch.device("cpu"))
        grids = {module: candidates(view.spec.hidden) for module in end_modules(view)}
        notes |= end_losses(view, corpus, gram, grids, squares)

    def decide(self, notes: Mapping[str, list[float]], view: View) -> dict[str, Any]:
        """A grid for every matrix, the budget used as well as the measured losses tell."""
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

    def _matrix_bytes(self, spec: ModelSpec, directory: Path) -> int:
        """What the budget leaves for linears, embeddings and head."""
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight * matrix_weights(spec) / 8)
        others = other_bytes(spec, directory)
        return bytes_from_text(str(self.file_bytes), "quantize.file_bytes") - others

    def model_bytes(self, spec: ModelSpec) -> int | None:
        if not self.mixed:
            return None
        if self.file_bytes is not None:
            return bytes_from_text(str(self.file_bytes), "quantize.file_bytes")
        return int(float(self.bits_per_weight or 0) * matrix_weights(spec) / 8) + 4 * _other_values(spec)

    def end_grids(self, view: View) -> dict[str, GgmlGrid]:
        if self.assigned is not None:
            return {module: GgmlGrid(self.assigned[module]) for module in end_modules(view) if module in self.assigned}
        fits = GgmlGrid(self.ends).fitting(view.spec.hidden) if self.ends is not None else None
        return dict.fromkeys(end_modules(view), fits) if fits is not None else {}

    def remarks(self, spec: ModelSpec) -> list[str]:
        if not isinstance(self.levels, GgmlGrid) or self.mixed:
            return []
        found: dict[str, list[str]] = {}
        for name, (_, d_in) in linear_shapes(spec, 0).items():
            fits = self.levels.fitting(d_in)
            if fits != self.levels:
                place = f"on {fits.type}" if fits is not None else "in 16 bits"
                found.setdefault(place, []).append(f"{name.rpartition('.')[2]} ({d_in} columns)")
        return [f"blocks of {self.grid} do not divide {', '.join(names)}, which will lie {place}"
                for place, names in found.items()]

    def end_bytes(self, spec: ModelSpec, before: int) -> int:
        fits = GgmlGrid(self.ends).fitting(spec.hidden) if self.ends is not None else None
        if fits is None:
            return before
        return fits.stored_bytes(spec.vocabulary, spec.hidden) * (1 if spec.tied else 2) + 4 * spec.hidden + 4 * 200

    def survey(self, view: View, workplace: Workplace) -> dict[str, Any] | None:
        if self.mixed:
            return None
        places = [(layer, name) for layer in range(view.spec.layers) for name in linear_shapes(view.spec, layer)]
        return Selection(self.keep, "quantize.keep", also=("bits",)).survey(view, workplace, places, 0)

    def decided(self, decision: Mapping[str, Any]) -> Self:
        if not self.mixed:
            return replace(self, chosen=places_of(decision))
        return replace(self, assigned={key: grid for key, grid in decision["grids"].items() if grid != DENSE})

    def levels_of(self, place: Place, d_in: int) -> Grid | None:
        """The grid of one linear; None where it stays as it is."""
        if self.assigned is not None:
            found = self.assigned.get(f"{place[0]}.{place[1]}")
            return None if found is None else GgmlGrid(found)
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

    def resolved(self, spec: ModelSpec) -> Quantize:
        if self.group != "auto":
            return self
        widths = {d_in for _, d_in in linear_shapes(spec, 0).values()}
        groups = AUTO_GROUPS[AUTO_GROUPS.index(64):] if self.grid == "nf4" else AUTO_GROUPS
        return replace(self, group=next((size for size in groups if all(d_in % size == 0 for d_in in widths)), "channel"))

    def without_text(self) -> Quantize | None:
        if self.mixed:
            return None
        plain = Quantize(method="rtn", grid=self.grid, bits=self.bits, group=self.group, symmetric=self.symmetric,
                         ends=self.ends, lose_zeros=self.lose_zeros, keep=self.keep)
        return None if plain.needs_corpus else plain

    def check(self, spec: ModelSpec) -> None:
        widths = {name: d_in for name, (_, d_in) in linear_shapes(spec, 0).items()}
        if isinstance(self.levels, IntegerGrid) and self.levels.group is not None:
            require_divisible(widths, self.levels.group, ", or channel for one scale a row, or auto")
        if not any(self.grid_for(d_in) for d_in in widths.values()):
            found = ", ".join(f"{name} has {d_in}" for name, d_in in widths.items())
            raise RecipeError(f"quantize.grid {self.grid} stands in blocks of 32 or 256 input columns, which divide no "
                              f"linear: {found}; take an integer grid, such as gptq:4:channel")

    def require_zeros(self, *, pruned: bool) -> None:
        """Raise RecipeError where zeros that were made on purpose would be lost without being asked for."""
        if pruned and not self.mixed and not self.levels.holds_zeros and not self.lose_zeros:
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
            factor, order = gram.factor(self.damp, visit, order_of, last=last and not self.mixed)
        except NumericsError as error:
            raise NumericsError(f"layer {layer}, {linear.name}: {error}") from None
        aim = linear.reference
        if self.follow:
            aim = aim + self.follow * gram.followed(linear.reference, self.damp, visit)
        outputs = self._metric(gram.outputs[linear.name]) if self.couple and isinstance(grid, GgmlGrid) else None
        linear.quantise(round_to_blocks(aim, factor, order, grid, passes=self.passes, keep=keep, outputs=outputs)
                        if isinstance(grid, GgmlGrid) else gptq(aim, factor, order, grid, linear.storage, keep))

    @staticmethod
    def _metric(outputs: Tensor) -> Tensor:
        """A metric of outputs, damped: what little text tells of how outputs belong together is only half believed."""
        rows = torch.arange(len(outputs))
        damped = outputs.float()
        damped[rows, rows % OUTPUTS] += COUPLING_DAMP
        return damped
