"""A model decides by log-likelihood where the graph is silent: which property, which entity, which type.

Nothing is generated. A statement that could be true is put into words ("Ara Kalson lives in Belford."), and the model gives
the likelihood of its end after its beginning. Statements about many tables run through the model together, one layer in
memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tsotsallm.streaming.likelihood import Likelihood
from tsotsallm.tables.graph import Graph
from tsotsallm.tables.infer import MATCH, SETTLED, Cell, Pair, Reading, best_property, common_types, graph_evidence
from tsotsallm.tables.load import ALIASES
from tsotsallm.tables.words import is_literal, is_missing

TRUST = 0.7
"""Weight of a nat from the model relative to a nat from the graph."""
FLOOR, LEVEL = -5.0, -2.5
"""Lowest scores that the model can give for one relation, in nats: of a candidate below the best one, and of the best."""
GAIN = 1.5
"""Most that the row, read as text, may add to or take from a candidate's score, in nats: it is a hint, not a statement."""
CONTEXT = 300
"""Characters of a row's other cells that the model reads."""
PHRASINGS = 3
"""Phrasings of a property that are evaluated; their log p are averaged."""
ASKED_ROWS = 8
"""Rows with which a property is evaluated."""
ASKED_PROPERTIES = 12
ASKED_CELLS = 2000
"""Most cells of a table that the model decides."""
ASKED_CANDIDATES, OTHERS = 6, 4
"""Candidates of a cell that are evaluated, and candidates of each other cell of its row."""
ASKED_TYPES = 40
UNSURE = 0.08
"""Probability of the second candidate, relative to that of the first, from which the model decides a cell."""


class LikelihoodSource(Protocol):
    """A model that gives log-likelihoods of continuations of prompts (`evaluation.examinee.Examinee`)."""

    def likelihoods(self, asked: Sequence[tuple[str, Sequence[str]]]) -> Iterable[tuple[int, list[Likelihood]]]:
        """Yield (index, one likelihood per continuation) for every (prompt, continuations)."""
        ...


@dataclass
class _Batch:
    """Prompts with all continuations whose log-likelihoods are wanted, each once."""

    asked: dict[str, dict[str, int]] = field(default_factory=dict)
    found: dict[tuple[str, str], float] = field(default_factory=dict)

    def want(self, prompt: str, continuation: str) -> tuple[str, str]:
        self.asked.setdefault(prompt, {}).setdefault(continuation, len(self.asked.get(prompt, {})))
        return prompt, continuation

    def ask(self, model: LikelihoodSource) -> None:
        questions = [(prompt, list(ends)) for prompt, ends in self.asked.items()]
        for index, scores in model.likelihoods(questions):
            prompt, ends = questions[index]
            for end, score in zip(ends, scores, strict=True):
                self.found[prompt, end] = score.total


@dataclass(frozen=True)
class _Said:
    """One statement, as (prompt, continuation) of each of its phrasings."""

    parts: tuple[tuple[str, str], ...]

    def log_p(self, found: dict[tuple[str, str], float]) -> float:
        """Mean over phrasings, in nats."""
        return math.fsum(found[part] for part in self.parts) / len(self.parts)


@dataclass(frozen=True)
class _Ways:
    """Several statements of which one may hold, each with the probability of the entity that it is about."""

    of: tuple[tuple[float, _Said], ...]

    def log_p(self, found: dict[tuple[str, str], float]) -> float:
        """log Σ p(about) · p(statement), in nats."""
        return math.log(math.fsum(sure * math.exp(statement.log_p(found)) for sure, statement in self.of) + 1e-12)


def relative(scores: dict[str, float]) -> dict[str, float]:
    """The score that a model's log p of one text under several candidates adds to each of them, in nats.

    The best candidate gets its own log p, but at least LEVEL, since a text may be unlikely for other reasons; the others
    get that less their distance from the best, at most −FLOOR.
    """
    best = max(scores.values())
    top = max(TRUST * best, LEVEL)
    return {name: top + max(TRUST * (score - best), FLOOR) for name, score in scores.items()}


class Decider:
    """Lets a model evaluate what readings of tables leave open, and adds the result to their evidence."""

    def __init__(self, model: LikelihoodSource, graph: Graph) -> None:
        self.model, self.graph = model, graph
        self.questions = 0

    def _say(self, batch: _Batch, name: str, subject: str, thing: str) -> _Said:
        """Phrasings of the statement that a subject has a property with some value; the value is what is predicted."""
        parts: list[tuple[str, str]] = []
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
        """Decide the properties of pairs of columns that the graph leaves open, among those that join such types.

        The score of a property is Σ over rows of log p(cell | subject, property); scores become odds between properties.
        """
        batch = _Batch()
        wanted: list[tuple[Reading, Pair, dict[str, list[_Ways]]]] = []
        for reading in readings:
            subject = subject_column(reading)
            for other in range(reading.table.width):
                pair = (subject, other)
                if other == subject or (rows := self._open_rows(reading, pair)) is None:
                    continue
                names = self._possible(reading, pair)
                if len(names) > 1:
                    wanted.append((reading, pair, {name: [_Ways(tuple(
                        (sure, self._say(batch, name, self.graph.label(entity), self._written(reading, (row, other))))
                        for entity, sure in top_beliefs(reading, (row, subject), 3))) for row in rows] for name in names}))
        self._ask(batch)
        for reading, pair, said in wanted:
            support = reading.support.get(pair, {})
            scores = {name: MATCH * support.get(name, 0.0) + TRUST * math.fsum(max(2 * FLOOR, row.log_p(batch.found))
                                                                              for row in rows)
                      for name, rows in said.items()}
            top = max(scores.values())
            odds = {name: math.exp(score - top) for name, score in scores.items()}
            total = math.fsum(odds.values())
            asked = min(len(next(iter(said.values()))), 3)
            reading.evidence.properties[pair] = {name: asked * share / total for name, share in odds.items()
                                                 if share / total > 0.05}

    def _open_rows(self, reading: Reading, pair: Pair) -> list[int] | None:
        """Rows to evaluate a pair with; None where the graph has settled it or there is no row to evaluate."""
        support = reading.support.get(pair, {})
        ordered = [*sorted(support.values(), reverse=True), 0.0, 0.0]
        if ordered[0] >= 2 and ordered[0] >= 3 * ordered[1]:
            return None
        rows = [row for row in reading.rows if (row, pair[0]) in reading.beliefs
                and not is_missing(reading.text((row, pair[1])))]
        rows.sort(key=lambda row: (-max(reading.beliefs[row, pair[0]].values()), row))
        return rows[:ASKED_ROWS] or None

    def _possible(self, reading: Reading, pair: Pair) -> list[str]:
        """Properties that the graph uses between the types of two columns."""
        literal = pair[1] not in reading.columns
        used = self.graph.properties_between(common_types(reading, pair[0]),
                                             None if literal else common_types(reading, pair[1]))
        return list(dict.fromkeys([*reading.support.get(pair, {}), *used]))[:ASKED_PROPERTIES]

    def _written(self, reading: Reading, cell: Cell) -> str:
        """A cell as the model should read it: the label of its entity where that is certain, else its text."""
        best = reading.best(cell)
        if best is not None and reading.beliefs[cell][best] > 0.8 and not is_literal(reading.text(cell)):
            return self.graph.label(best)
        return reading.text(cell)

    # -- cells and types ----------------------------------------------------------------------------------------------

    def cells_and_types(self, readings: Sequence[Reading]) -> None:
        """Decide between the entities that a cell may mean, and the types of entities that the graph gives no specific type.

        All statements run through the model in one batch.
        """
        batch = _Batch()
        relations: list[tuple[Reading, Cell, int, dict[str, _Ways]]] = []
        aliases: list[tuple[Reading, Cell, dict[str, _Said]]] = []
        contexts: list[tuple[Reading, Cell, dict[str, tuple[tuple[str, str], tuple[str, str]]]]] = []
        types: list[tuple[Reading, str, dict[str, _Said]]] = []
        for reading in readings:
            for cell in open_cells(reading)[:ASKED_CELLS]:
                names = [name for name, _ in top_beliefs(reading, cell, ASKED_CANDIDATES)]
                asked = [(reading, cell, other, said) for other, said in self._relations(batch, reading, cell, names)]
                relations += asked
                if said_alias := self._alias(batch, reading, cell, names):
                    aliases.append((reading, cell, said_alias))
                elif not asked and (choices := self._context(batch, reading, cell, names)):
                    contexts.append((reading, cell, choices))
            types += [(reading, entity, said) for entity, said in self._types(batch, reading)]
        self._ask(batch)
        for reading, cell, other, by_name in relations:
            for name, score in relative({name: ways.log_p(batch.found) for name, ways in by_name.items()}).items():
                reading.evidence.relation[cell, name, other] = score
        for reading, cell, by_alias in aliases:
            for name, score in relative({name: said.log_p(batch.found) for name, said in by_alias.items()}).items():
                reading.evidence.context[cell, name] = score
        for reading, cell, choices in contexts:
            for name, (here, alone) in choices.items():
                gain = TRUST * (batch.found[here] - batch.found[alone])
                reading.evidence.context[cell, name] = min(max(gain, -GAIN), GAIN)
        for reading, entity, by_type in types:
            scores = {kind: said.log_p(batch.found) for kind, said in by_type.items()}
            total = math.fsum(math.exp(score) for score in scores.values()) + 1e-3
            reading.evidence.types[entity] = {kind: math.exp(score) / total for kind, score in scores.items()}

    def _relations(self, batch: _Batch, reading: Reading, cell: Cell,
                   names: Sequence[str]) -> Iterable[tuple[int, dict[str, _Ways]]]:
        """For every other cell of the row: statements that relate each candidate to it, where the graph is silent."""
        row, column = cell
        for other in range(reading.table.width):
            if other == column or is_missing(reading.text((row, other))):
                continue
            forward, weight = best_property(reading, (column, other))
            backward, back_weight = best_property(reading, (other, column))
            if max(weight, back_weight) < SETTLED:
                continue
            theirs = top_beliefs(reading, (row, other), OTHERS) or [("", 1.0)]
            by_candidate = {}
            for name in names:
                if not graph_evidence(reading, cell, name, other).silent:
                    continue
                if weight >= back_weight:
                    by_candidate[name] = _Ways(tuple((sure, self._say(
                        batch, forward, self.graph.label(name), self.graph.label(thing) if thing
                        else reading.text((row, other)))) for thing, sure in theirs))
                elif theirs[0][0]:
                    by_candidate[name] = _Ways(tuple((sure, self._say(
                        batch, backward, self.graph.label(subject), self.graph.label(name))) for subject, sure in theirs))
            if by_candidate:
                yield other, by_candidate

    def _alias(self, batch: _Batch, reading: Reading, cell: Cell, names: Sequence[str]) -> dict[str, _Said]:
        """Statements that candidates are also known by the cell's text, where it is not among their names in the graph and
        the graph says how alternative names are put into words."""
        if any(known.how != "typo" for known in reading.candidates.get(cell, ())) or not self.graph.has_sentences(
                ALIASES[0]):
            return {}
        return {name: self._say(batch, ALIASES[0], self.graph.label(name), reading.text(cell)) for name in names}

    def _context(self, batch: _Batch, reading: Reading, cell: Cell,
                 names: Sequence[str]) -> dict[str, tuple[tuple[str, str], tuple[str, str]]]:
        """Each candidate's label and description after the row's other cells, and after nothing; nothing where candidates
        have the same text, or where the graph knows properties of the table, which are evaluated instead."""
        texts = {name: f"{self.graph.label(name)}{f', {about}' if (about := self.graph.description(name)) else ''}"
                 for name in names}
        row, column = cell
        others = ", ".join(text for other in range(reading.table.width) if other != column
                           and not is_missing(text := reading.text((row, other))))
        if len(set(texts.values())) < 2 or not others or any(reading.weights.values()):
            return {}
        return {name: (batch.want(f"{others[:CONTEXT]}, ", text), batch.want("", text)) for name, text in texts.items()}

    def _types(self, batch: _Batch, reading: Reading) -> Iterable[tuple[str, dict[str, _Said]]]:
        """For entities that have the column's type and no type below it: a statement for each type below it."""
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
    """The `most` likeliest entities of a cell with their probabilities, best first."""
    belief = reading.beliefs.get(cell, {})
    return sorted(belief.items(), key=lambda item: (-item[1], item[0]))[:most]


def open_cells(reading: Reading) -> list[Cell]:
    """Sampled cells whose second candidate is not much less likely than the first."""
    return [cell for cell, belief in reading.beliefs.items() if len(belief) > 1
            and sorted(belief.values())[-2] >= UNSURE * max(belief.values())]


def subject_column(reading: Reading) -> int:
    """The column that a table is about: the column of entities with the most different cells, the first one of equals."""
    def different(column: int) -> tuple[int, int]:
        cells = [reading.table.rows[row][column] for row in reading.rows]
        return len({cell for cell in cells if not is_missing(cell)}), -column

    return max(reading.columns, key=different)
