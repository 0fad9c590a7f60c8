"""A model decides by log-likelihood where the graph is silent: which property, which entity, which type.

Nothing is generated. A statement that could be true is put into words ("Ara Kalson lives in Belford."), and the model says how
likely its end is after its beginning. Questions about many tables go through the model together, one layer in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tsotsallm.streaming.likelihood import Likelihood
from tsotsallm.tables.graph import Graph
from tsotsallm.tables.infer import SETTLED, Cell, Pair, Reading, best_property, told
from tsotsallm.tables.words import is_literal, is_missing

TRUST = 0.7
"""What a nat of the model counts of a nat of the graph."""
FLOOR = -5.0
"""Least that a model's word on one relation may say, in nats."""
PHRASINGS = 3
"""Ways to say a property that are asked; their log p are averaged."""
ASKED_ROWS = 8
"""Rows that a property is asked with."""
ASKED_PROPERTIES = 12
ASKED_CELLS = 2000
"""Cells of a table that a model is asked about at most."""
ASKED_CANDIDATES = 6
ASKED_TYPES = 40
UNSURE = 0.08
"""Probability of a second candidate, of that of the first, from which a cell is asked about."""


class Asked(Protocol):
    """A model that is asked: log-likelihoods of continuations of prompts (`evaluation.scorer.Examinee`)."""

    def likelihoods(self, asked: Sequence[tuple[str, Sequence[str]]]) -> Iterable[tuple[int, list[Likelihood]]]: ...


@dataclass
class _Batch:
    """Questions, each once: prompts with all continuations that anybody asks about."""

    asked: dict[str, dict[str, int]] = field(default_factory=dict)
    found: dict[tuple[str, str], float] = field(default_factory=dict)

    def want(self, prompt: str, continuation: str) -> tuple[str, str]:
        self.asked.setdefault(prompt, {}).setdefault(continuation, len(self.asked.get(prompt, {})))
        return prompt, continuation

    def ask(self, model: Asked) -> None:
        questions = [(prompt, list(ends)) for prompt, ends in self.asked.items()]
        for index, scores in model.likelihoods(questions):
            prompt, ends = questions[index]
            for end, score in zip(ends, scores, strict=True):
                self.found[prompt, end] = score.total


@dataclass(frozen=True)
class _Said:
    """One way to say something: (prompt, continuation) of each phrasing."""

    parts: tuple[tuple[str, str], ...]

    def log_p(self, found: dict[tuple[str, str], float]) -> float:
        """Mean over phrasings, in nats."""
        return math.fsum(found[part] for part in self.parts) / len(self.parts)


class Decider:
    """Asks a model about readings of tables and adds what it says to their evidence."""

    def __init__(self, model: Asked, graph: Graph) -> None:
        self.model, self.graph = model, graph
        self.questions = 0

    def _say(self, batch: _Batch, name: str, subject: str, thing: str) -> _Said:
        """Ways to say that a subject has a property with some value, the value being what is predicted."""
        parts = []
        for sentence in self.graph.sentences(name):
            before, mark, _ = sentence.partition("{o}")
            if mark and "{s}" in before and len(parts) < PHRASINGS:
                prompt = before.replace("{s}", subject)
                parts.append(batch.want(prompt[:1].upper() + prompt[1:], thing))
        if not parts:
            parts.append(batch.want(f"{subject} {self.graph.label(name)} ", thing))
        return _Said(tuple(parts))

    def _ask(self, batch: _Batch) -> None:
        self.questions += sum(map(len, batch.asked.values()))
        if batch.asked:
            batch.ask(self.model)

    # -- properties ---------------------------------------------------------------------------------------------------

    def properties(self, readings: Sequence[Reading]) -> None:
        """How pairs of columns that the graph leaves open belong together: of the properties that join such types, the one
        that makes the rows likeliest. Σ over rows of log p(cell | subject, property), as odds between properties."""
        batch = _Batch()
        wanted: list[tuple[Reading, Pair, dict[str, list[list[tuple[float, _Said]]]]]] = []
        for reading in readings:
            subject = subject_column(reading)
            for other in range(reading.table.width):
                pair = (subject, other)
                if other == subject or (rows := self._open_rows(reading, pair)) is None:
                    continue
                names = self._possible(reading, pair)
                if len(names) > 1:
                    wanted.append((reading, pair, {name: [[(sure, self._say(batch, name, self.graph.label(entity),
                                                                            self._written(reading, (row, other))))
                                                           for entity, sure in top_beliefs(reading, (row, subject), 2)]
                                                          for row in rows] for name in names}))
        self._ask(batch)
        for reading, pair, said in wanted:
            scores = {name: math.fsum(max(FLOOR * 2, math.log(math.fsum(
                sure * math.exp(one.log_p(batch.found)) for sure, one in ways) + 1e-12)) for ways in rows)
                for name, rows in said.items()}
            top = max(scores.values())
            odds = {name: math.exp(TRUST * (score - top)) for name, score in scores.items()}
            total = math.fsum(odds.values())
            asked = len(next(iter(said.values())))
            reading.evidence.properties[pair] = {name: min(asked, 3) * share / total for name, share in odds.items()
                                                 if share / total > 0.05}

    def _open_rows(self, reading: Reading, pair: Pair) -> list[int] | None:
        """Rows to ask about a pair with; None where the graph has settled it or there is nothing to ask."""
        support = reading.support.get(pair, {})
        ordered = sorted(support.values(), reverse=True) + [0.0, 0.0]
        if ordered[0] >= 2 and ordered[0] >= 3 * ordered[1]:
            return None
        rows = [row for row in reading.rows if (row, pair[0]) in reading.beliefs
                and not is_missing(reading.text((row, pair[1])))]
        rows.sort(key=lambda row: (-max(reading.beliefs[row, pair[0]].values()), row))
        return rows[:ASKED_ROWS] or None

    def _possible(self, reading: Reading, pair: Pair) -> list[str]:
        """Properties that the graph uses between the types of two columns."""
        def kinds(column: int) -> set[str]:
            return {kind for kind, share in reading.coverage[column].items() if share >= 0.3}

        literal = pair[1] not in reading.columns
        found = self.graph.properties_between(kinds(pair[0]), None if literal else kinds(pair[1]))
        return list(dict.fromkeys([*reading.support.get(pair, {}), *found]))[:ASKED_PROPERTIES]

    def _written(self, reading: Reading, cell: Cell) -> str:
        """A cell as the model should read it: the label of what it surely means, else its text."""
        best = reading.best(cell)
        if best is not None and reading.beliefs[cell][best] > 0.8 and not is_literal(reading.text(cell)):
            return self.graph.label(best)
        return reading.text(cell)

    # -- cells and types ----------------------------------------------------------------------------------------------

    def cells_and_types(self, readings: Sequence[Reading]) -> None:
        """Which entity a cell means where several could be meant, and which types entities have that the graph gives no
        special one: all questions in one batch."""
        batch = _Batch()
        relations: list[tuple[Reading, tuple[Cell, str, int], _Said]] = []
        contexts: list[tuple[Reading, Cell, dict[str, tuple[tuple[str, str], tuple[str, str]]]]] = []
        types: list[tuple[Reading, str, dict[str, _Said]]] = []
        for reading in readings:
            for cell in open_cells(reading)[:ASKED_CELLS]:
                names = [name for name, _ in top_beliefs(reading, cell, ASKED_CANDIDATES)]
                asked = [(reading, (cell, name, other), said) for name in names
                         for other, said in self._relations(batch, reading, cell, name)]
                relations += asked
                if not asked and (choices := self._context(batch, reading, cell, names)):
                    contexts.append((reading, cell, choices))
            types += [(reading, entity, said) for entity, said in self._types(batch, reading)]
        self._ask(batch)
        for reading, key, one in relations:
            reading.evidence.relation[key] = max(FLOOR, TRUST * one.log_p(batch.found))
        for reading, cell, choices in contexts:
            for name, (here, alone) in choices.items():
                gain = TRUST * (batch.found[here] - batch.found[alone])
                reading.evidence.context[cell, name] = min(max(gain, FLOOR), -FLOOR)
        for reading, entity, by_type in types:
            scores = {kind: one.log_p(batch.found) for kind, one in by_type.items()}
            total = math.fsum(math.exp(score) for score in scores.values()) + 1e-3
            reading.evidence.types[entity] = {kind: math.exp(score) / total for kind, score in scores.items()}

    def _relations(self, batch: _Batch, reading: Reading, cell: Cell, name: str) -> Iterable[tuple[int, _Said]]:
        """Statements about a candidate and the other cells of its row that the graph neither has nor contradicts."""
        row, column = cell
        for other in range(reading.table.width):
            if other == column or is_missing(reading.text((row, other))):
                continue
            forward, weight = best_property(reading, (column, other))
            backward, back_weight = best_property(reading, (other, column))
            if max(weight, back_weight) < SETTLED or not told(reading, cell, name, other).silent:
                continue
            if weight >= back_weight:
                yield other, self._say(batch, forward, self.graph.label(name), self._written(reading, (row, other)))
            elif (subject := reading.best((row, other))) is not None:
                yield other, self._say(batch, backward, self.graph.label(subject), self.graph.label(name))

    def _context(self, batch: _Batch, reading: Reading, cell: Cell,
                 names: Sequence[str]) -> dict[str, tuple[tuple[str, str], tuple[str, str]]]:
        """The row as a short text with each candidate's description after it, and the description after nothing."""
        described = {name: text for name in names if (text := self.graph.description(name))}
        if len(set(described.values())) < 2:
            return {}
        row, column = cell
        cells = [reading.text((row, other)) for other in range(reading.table.width) if other != column]
        told_ = ", ".join(one for one in cells if not is_missing(one))
        word = reading.text(cell)
        return {name: (batch.want(f"{told_}. {word}: ", text), batch.want(f"{word}: ", text))
                for name, text in described.items()}

    def _types(self, batch: _Batch, reading: Reading) -> Iterable[tuple[str, dict[str, _Said]]]:
        """For entities that have the column's type and none below it: which of the types below it they would have."""
        for column, chosen in reading.types.items():
            level = self.graph.parents(chosen) if chosen and not self.graph.children(chosen) else (chosen,)
            for above in level:
                below = self.graph.children(above) if above else ()
                if not 1 < len(below) <= ASKED_TYPES:
                    continue
                for row in reading.rows[:4 * ASKED_ROWS]:
                    for entity, _ in top_beliefs(reading, (row, column), ASKED_CANDIDATES):
                        ancestors = self.graph.statements(entity).ancestors
                        if above in ancestors and not any(kind in ancestors for kind in below):
                            subject = self.graph.label(entity)
                            yield entity, {kind: _Said((batch.want(f"{subject} is a ", self.graph.label(kind)),))
                                           for kind in below}


def top_beliefs(reading: Reading, cell: Cell, most: int) -> list[tuple[str, float]]:
    belief = reading.beliefs.get(cell, {})
    return sorted(belief.items(), key=lambda item: (-item[1], item[0]))[:most]


def open_cells(reading: Reading) -> list[Cell]:
    """Sampled cells with a second candidate that is not much less likely than the first."""
    return [cell for cell, belief in reading.beliefs.items() if len(belief) > 1
            and sorted(belief.values())[-2] >= UNSURE * max(belief.values())]


def subject_column(reading: Reading) -> int:
    """The column that a table is about: of the first columns of entities the one with most different cells."""
    def different(column: int) -> tuple[int, int]:
        cells = [reading.table.rows[row][column] for row in reading.rows]
        return len({cell for cell in cells if not is_missing(cell)}), -column

    return max(reading.columns, key=different)
