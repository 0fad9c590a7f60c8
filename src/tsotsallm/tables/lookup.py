"""Candidates of a cell: entities whose names equal the cell's text exactly, after normalising, or but for typing errors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tsotsallm.tables.graph import Graph, Label
from tsotsallm.tables.words import is_literal, is_missing, normalise, similarity, trigrams

LEAST = 0.62
"""Similarity that a name must have to be a candidate."""
ALIAS = 0.95
"""Score of an alias that matches, where a label that matches scores 1."""
ROWS_READ = 30_000
"""Most entries of the trigram index that are read for one text, those of the rarest trigrams first."""
SHORT = 16
"""Letters up to which exchanged and surplus letters are tried one by one: such slips leave few trigrams unchanged."""
COMPARED = 120
"""Most names that are compared letter by letter."""


@dataclass(frozen=True)
class Candidate:
    """An entity that a cell may mean: the name that matched, and how well the cell's text matches it, 0 to 1."""

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

        A name that is equal after normalising scores 1 (exact spellings come first), or 0.95 as an alias; a name that is
        only similar scores its similarity (see `words.similarity`), or 0.95 of that as an alias. Similar names are searched
        for only where none is equal.
        """
        if is_missing(text) or is_literal(text):
            return ()
        normal = normalise(text)
        best: dict[str, Candidate] = {}
        for label in self.graph.named(normal):
            exact = label.text.strip() == text.strip()
            _keep(best, Candidate(label.entity, label.text, ALIAS if label.alias else 1.0,
                                  "alias" if label.alias else "exact" if exact else "normalised"))
        if not best:
            near = [label for other in slips(normal) for label in self.graph.named(other)] if len(normal) <= SHORT else []
            for label in [*near, *self.graph.like(trigrams(normal), COMPARED, ROWS_READ)]:
                score = similarity(normal, normalise(label.text)) * (ALIAS if label.alias else 1.0)
                if score >= LEAST:
                    _keep(best, Candidate(label.entity, label.text, min(score, 0.99), "typo"))
        order = {"exact": 0, "normalised": 1, "alias": 2, "typo": 3}
        ranked = sorted(best.values(), key=lambda candidate: (-candidate.score, order[candidate.how], candidate.entity))
        return tuple(ranked[:self.most])


def slips(normal: str) -> list[str]:
    """A text with two neighbouring letters exchanged or one left out, to find short names that share no trigram with it."""
    exchanged = [normal[:place] + normal[place + 1] + normal[place] + normal[place + 2:] for place in range(len(normal) - 1)]
    shorter = [normal[:place] + normal[place + 1:] for place in range(len(normal))]
    return [text for text in dict.fromkeys(exchanged + shorter) if text != normal and len(text) > 1]


def _keep(best: dict[str, Candidate], candidate: Candidate) -> None:
    if candidate.entity not in best or best[candidate.entity].score < candidate.score:
        best[candidate.entity] = candidate


def naive(labels: list[Label], text: str, most: int) -> list[tuple[str, float]]:
    """The result that `Lookup` must give, by comparing a text with every label: the oracle of its tests."""
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
