"""The linears that a domain needs most, chosen once for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.view import View
from tsotsallm.files import Json, JsonObject
from tsotsallm.stages.contract import Workplace
from tsotsallm.training.domain import chosen_places, contrast, read_graph, saliency
from tsotsallm.training.samples import text_windows
from tsotsallm.training.trainee import Place
from tsotsallm.validation import RULES


@dataclass(frozen=True)
class Selection:
    """{graph: FILE, share: 0.2, by: saliency | random}: a share of the weights, by what a domain's sentences ask of them.

    graph  the domain in RDF, which is put into sentences
    share  of the weights, at most
    by     saliency; or random, for comparison
    """

    __pydantic_config__ = RULES
    graph: str
    share: Annotated[float, Field(gt=0, le=1)] = 0.2
    by: Literal["saliency", "random"] = "saliency"

    @property
    def by_saliency(self) -> bool:
        """Whether sentences decide, and not chance."""
        return self.by == "saliency"

    def survey(self, view: View, workplace: Workplace, places: Sequence[Place], seed: int) -> JsonObject:
        """The choice among `places` and everything's score, as plain data."""
        graph = read_graph(self.graph)
        sizes = {place: math.prod(linear_shapes(view.spec, place[0])[place[1]]) for place in places}
        if self.by_saliency:
            general = workplace.text("selection")
            length = max(len(window) for window in general.windows)
            sentences = text_windows(graph.text, view.checkpoint.codec, length, self.graph)
            domain = sentences.first(len(general.windows))
            found = contrast(*(saliency(view, corpus, workplace.scratch, workplace.device, workplace.tick)
                               for corpus in (domain, general)))
            scores = {place: found[place] for place in places}
        else:
            generator = torch.Generator().manual_seed(seed)
            scores = dict(zip(places, torch.rand(len(places), generator=generator).tolist(), strict=True))
        return {"chosen": [list(place) for place in chosen_places(scores, sizes, self.share)],
                "scores": [[*place, score] for place, score in scores.items()],
                **({"notes": list(graph.notes)} if graph.notes else {})}


def places_of(decision: Mapping[str, Json]) -> tuple[Place, ...]:
    """The linears that a survey chose."""
    return tuple((int(layer), str(name)) for layer, name in decision["chosen"])
