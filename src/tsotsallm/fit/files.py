"""From a structure and the grids of its matrices to a recipe, and to the GGUF file that the recipe makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tsotsallm.checkpoint.gguf_layout import Entry, Labels, Layout, layout_of
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.files import Json, JsonObject
from tsotsallm.recipe import Recipe
from tsotsallm.stages.neurons import Neurons

Stages = list[JsonObject]


@dataclass(frozen=True)
class Structure:
    """What a model is before its matrices get their grids: tokens kept, layers that go, the share of neurons that goes.

    vocabulary  tokens; None: all
    """

    removed: tuple[int, ...] = ()
    narrower: float = 0.0
    vocabulary: int | None = None

    @property
    def single(self) -> bool:
        """Whether it was measured as it is: nothing goes, or of one kind only."""
        return not (self.removed and self.narrower)

    @property
    def name(self) -> str:
        """What was removed, in a few words."""
        parts = [f"{self.vocabulary} tokens"] if self.vocabulary is not None else []
        parts += [f"{len(self.removed)} layer{'s' if len(self.removed) > 1 else ''} fewer"] if self.removed else []
        parts += [f"{self.narrower:.0%} fewer neurons"] if self.narrower else []
        return ", ".join(parts) or "all layers and neurons"

    def kept(self, layers: int) -> list[int]:
        """The layers that stay of so many, in order."""
        return [layer for layer in range(layers) if layer not in self.removed]

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The spec of the model that the structure leaves."""
        found = whole.with_layers(whole.layers - len(self.removed))
        if self.vocabulary is not None:
            found = ModelSpec(found.config | {"vocab_size": self.vocabulary}, found.quantization, found.layer_order)
        return Neurons(feed_forward=self.narrower).spec_after(found) if self.narrower else found


@dataclass(frozen=True)
class Files:
    """The recipes and files of candidates.

    whole       the shape of the model with the largest vocabulary
    vocabulary  the keys of a file that describe a vocabulary of so many tokens (None: all)
    source      the model's name in results and in their files
    keep        texts whose tokens stay
    recover     stages that a cut model learns by
    rounding    options of `quantize`
    """

    whole: ModelSpec
    vocabulary: Callable[[int | None], tuple[Entry, ...]]
    source: str
    keep: tuple[str, ...] = ()
    recover: tuple[Json, ...] = ()
    rounding: Mapping[str, Json] = field(default_factory=dict)

    def cut(self, structure: Structure) -> Stages:
        """The stages that cut the model to a structure."""
        found: Stages = []
        if structure.vocabulary is not None:
            found.append({"vocabulary": {"keep": list(self.keep), "size": structure.vocabulary}})
        if structure.removed:
            found.append({"layers": {"order": structure.kept(self.whole.layers)}})
        return found + ([{"neurons": {"feed_forward": structure.narrower}}] if structure.narrower else [])

    def recovered(self, structure: Structure) -> Stages:
        """The same, and those that it learns by where layers or neurons went."""
        return [*self.cut(structure), *(self.recover if structure.removed or structure.narrower else ())]

    def recipe(self, structure: Structure, grids: Mapping[str, str]) -> Stages:
        """The stages that make a structure with a grid for every matrix."""
        return [*self.recovered(structure), {"quantize": {"grids": dict(grids)} | dict(self.rounding)}]

    def layout(self, structure: Structure, grids: Mapping[str, str]) -> Layout:
        """The file that the recipe makes."""
        recipe = Recipe.parse(self.recipe(structure, grids)).resolved(self.whole).plain()
        return layout_of(structure.spec(self.whole), self.vocabulary(structure.vocabulary),
                         Labels(self.source, recipe, self.source), grids)
