"""Candidates of a cell: entities whose names are the cell's text, exactly, after normalising, or with slips."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tsotsallm.tables.graph import Graph, Label
from tsotsallm.tables.words import is_literal, is_missing, normalise, similarity, trigrams

LEAST = 0.62
"""Similarity that a name must have to be a candidate."""
ALIAS = 0.95
"""What another name of an entity counts, of its label's 1."""
ROWS_READ = 30_000
"""Entries of the trigram index that are read for one text; the rarest trigrams are asked first."""
SHORT = 16
"""Letters up to which exchanged letters and those too many are tried one by one: they leave few trigrams as they were."""
COMPARED = 120
"""Names that are compared letter by letter."""


@dataclass(frozen=True)
class Candidate:
    """An entity that a cell may mean: the name that was found, and how well the cell says it, 0 to 1."""

    entity: str
    name: str
    score: float
    how: str                # exact, normalised, alias, typo


class Lookup:
    """Finds candidates in a graph; equal texts are looked up once."""

    def __init__(self, graph: Graph, most: int = 20) -> None:
        self.graph, self.most = graph, most
        self.find = lru_cache(maxsize=200_000)(self._find)

    def _find(self, text: str) -> tuple[Candidate, ...]:
        """Candidates of a text, best first, at most `most`; none for numbers, dates and empty cells.

        A name that is the same after normalising scores 1 (its exact spelling first), 0.95 as another name; one that is
        merely similar scores its similarity (see `words.similarity`), 0.95 of that as another name. Similar names are
        looked for where none is the same.
        """
        if is_missing(text) or is_literal(text):
            return ()
        normal = normalise(text)
        found: dict[str, Candidate] = {}
        for label in self.graph.named(normal):
            exact = label.text.strip() == text.strip()
            _keep(found, Candidate(label.entity, label.text, ALIAS if label.alias else 1.0,
                                   "alias" if label.alias else "exact" if exact else "normalised"))
        if not found:
            near = [label for other in slips(normal) for label in self.graph.named(other)] if len(normal) <= SHORT else []
            for label in [*near, *self.graph.like(trigrams(normal), COMPARED, ROWS_READ)]:
                score = similarity(normal, normalise(label.text)) * (ALIAS if label.alias else 1.0)
                if score >= LEAST:
                    _keep(found, Candidate(label.entity, label.text, min(score, 0.99), "typo"))
        order = {"exact": 0, "normalised": 1, "alias": 2, "typo": 3}
        return tuple(sorted(found.values(), key=lambda one: (-one.score, order[one.how], one.entity))[:self.most])


def slips(normal: str) -> list[str]:
    """A text with two neighbouring letters exchanged, or one left out: short names that share no trigram with it."""
    exchanged = [normal[:place] + normal[place + 1] + normal[place] + normal[place + 2:] for place in range(len(normal) - 1)]
    shorter = [normal[:place] + normal[place + 1:] for place in range(len(normal))]
    return [text for text in dict.fromkeys(exchanged + shorter) if text != normal and len(text) > 1]


def _keep(found: dict[str, Candidate], one: Candidate) -> None:
    if one.entity not in found or found[one.entity].score < one.score:
        found[one.entity] = one


def naive(labels: list[Label], text: str, most: int) -> list[tuple[str, float]]:
    """What `Lookup` must find, by comparing a text with every label: the oracle of its tests."""
    normal = normalise(text)
    same: dict[str, float] = {}
    for label in labels:
        if normalise(label.text) == normal:
            same[label.entity] = max(same.get(label.entity, 0.0), ALIAS if label.alias else 1.0)
    if not same:
        for label in labels:
            score = min(similarity(normal, normalise(label.text)) * (ALIAS if label.alias else 1.0), 0.99)
            if score >= LEAST:
                same[label.entity] = max(same.get(label.entity, 0.0), score)
    return sorted(same.items(), key=lambda item: (-item[1], item[0]))[:most]
