"""The linears that a domain needs most, chosen once for the whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError, nearest
from tsotsallm.stages.contract import Workplace
from tsotsallm.training.domain import chosen_places, contrast, read_graph, saliency
from tsotsallm.training.lora import Place
from tsotsallm.training.samples import text_windows

DEFAULT_SHARE = 0.2


class Selection:
    """{graph: FILE, share: 0.2, by: saliency | random}: a share of the weights, by what a domain's sentences ask of them."""

    def __init__(self, fields: Mapping[Any, Any], where: str, also: Sequence[str] = ()) -> None:
        known = ("graph", "share", "by", *also)
        for key in fields:
            if key not in known:
                raise RecipeError(f"{where} has no option {key!r}{nearest(str(key), known)}")
        graph, share, by = fields.get("graph"), fields.get("share", DEFAULT_SHARE), fields.get("by", "saliency")
        if not isinstance(graph, str):
            raise RecipeError(f"{where} takes a graph: {{graph: domain.ttl, share: 0.2}}")
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise RecipeError(f"{where}.share is {share!r}; it takes a number above 0, at most 1")
        if by not in ("saliency", "random"):
            raise RecipeError(f"{where}.by is {by!r}{nearest(str(by), ('saliency', 'random'))}")
        self.graph, self.share, self.by_saliency = graph, float(share), by == "saliency"

    def survey(self, view: View, workplace: Workplace, places: Sequence[Place], seed: int) -> dict[str, Any]:
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


def places_of(decision: Mapping[str, Any]) -> tuple[Place, ...]:
    """The linears that a survey chose."""
    return tuple((int(layer), str(name)) for layer, name in decision["chosen"])
