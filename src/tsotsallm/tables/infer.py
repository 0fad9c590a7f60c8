"""Joint inference over a table: cells, column types and properties of pairs of columns support each other in a few rounds.

The graph is assumed to be incomplete. What it states about a candidate may match the row (evidence for the candidate),
contradict it (a property with a single value has another value: evidence against it), or be silent; only then does a model
decide.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from tsotsallm.tables.graph import EntityStatements, Graph
from tsotsallm.tables.lookup import Candidate, Lookup
from tsotsallm.tables.reading import Table
from tsotsallm.tables.words import is_literal, is_missing, same_literal

ROUNDS = 4
SAMPLED_ROWS = 300
"""Rows from which types and properties are decided; every row is annotated."""
KEPT = 8
"""Candidates of a cell that inference keeps."""
ENTITY_SHARE = 0.25
"""Share of a column's cells that must name an entity for it to be a column of entities."""
SPELLING, MATCH, CONTRADICTION, TYPE, OTHER_TYPE, NO_TYPE = 9.0, 3.0, 2.0, 1.5, 1.5, 3.0
"""Weights in nats: a name's similarity (times 9), a relation that the graph states (3) or contradicts (−2), the column's
type (1.5), another type below the same parent (−1.5), no type of the column's branch (−3)."""
LEAST_COVERAGE, LEAST_CELLS, LEAST_LEAD = 0.2, 1.4, 2.5
"""A type below another one is chosen where at least this share and this number of the cells have it, and this many times as
many cells as have any other type at its level."""
USUAL = 0.5
"""Weight, in rows, of the graph's use of properties between two types, before any row is read."""
SETTLED = 0.5
"""Weight of a property above which the relation between two columns is known."""

Cell = tuple[int, int]              # row among the table's rows, column among its columns
Pair = tuple[int, int]
Belief = dict[str, float]           # entity -> probability


@dataclass
class Evidence:
    """What a model adds: log p in nats of a row's other cell given a candidate, and probabilities of an entity's types."""

    relation: dict[tuple[Cell, str, int], float] = field(default_factory=dict)
    context: dict[tuple[Cell, str], float] = field(default_factory=dict)
    types: dict[str, dict[str, float]] = field(default_factory=dict)
    properties: dict[Pair, dict[str, float]] = field(default_factory=dict)


@dataclass
class Reading:
    """Beliefs about a table: candidates of its cells, types of its columns, properties of its pairs of columns."""

    table: Table
    graph: Graph
    columns: list[int]                                              # of entities
    rows: list[int]                                                 # sampled
    candidates: dict[Cell, tuple[Candidate, ...]] = field(default_factory=dict)
    beliefs: dict[Cell, Belief] = field(default_factory=dict)
    coverage: dict[int, dict[str, float]] = field(default_factory=dict)     # column -> type -> share of cells
    types: dict[int, str] = field(default_factory=dict)
    support: dict[Pair, dict[str, float]] = field(default_factory=dict)     # rows that a property holds in
    weights: dict[Pair, dict[str, float]] = field(default_factory=dict)
    single: dict[str, tuple[int, int]] = field(default_factory=dict)        # property -> entities that have it, once
    evidence: Evidence = field(default_factory=Evidence)

    def text(self, cell: Cell) -> str:
        """The text of a cell."""
        return self.table.rows[cell[0]][cell[1]]

    def best(self, cell: Cell) -> str | None:
        """The likeliest entity of a cell, or None where it has no candidate."""
        belief = self.beliefs.get(cell)
        return max(belief, key=lambda iri: (belief[iri], _order(iri))) if belief else None

    def single_valued(self, name: str) -> float:
        """Share of the entities with a property that have exactly one value for it."""
        having, once = self.single.get(name, (0, 0))
        return once / having if having else 0.0


def _order(iri: str) -> tuple[float, str]:
    """Sort key that prefers, among equals, the lower number (in Wikidata the older entity), then the first by name."""
    number = re.search(r"(\d+)$", iri)
    return (-float(number.group(1)) if number else 0.0, "".join(chr(0x10FFFF - ord(letter)) for letter in iri))


def begin(table: Table, graph: Graph, lookup: Lookup) -> Reading:
    """Find the columns of entities, sample the rows to decide by, and look up the candidates of their cells."""
    step = max(1, math.ceil(len(table.rows) / SAMPLED_ROWS))
    rows = list(range(0, len(table.rows), step))
    columns = []
    for column in range(table.width):
        cells = [table.rows[row][column] for row in rows if not is_missing(table.rows[row][column])]
        named = sum(bool((candidates := lookup.find(cell)) and candidates[0].score >= 0.75) for cell in cells)
        if cells and sum(map(is_literal, cells)) <= len(cells) / 2 and named >= ENTITY_SHARE * len(cells):
            columns.append(column)
    reading = Reading(table, graph, columns, rows)
    for row in rows:
        _fill(reading, lookup, row)
    return reading


def _fill(reading: Reading, lookup: Lookup, row: int) -> None:
    for column in reading.columns:
        candidates = lookup.find(reading.table.rows[row][column])
        if candidates:
            cell = (row, column)
            reading.candidates[cell] = candidates
            scores = {candidate.entity: SPELLING * candidate.score for candidate in candidates}
            reading.beliefs[cell] = _softmax(scores, None)
            for candidate in candidates:
                _count(reading, reading.graph.statements(candidate.entity))


def _count(reading: Reading, statements: EntityStatements) -> None:
    """Count for every property of an entity whether it has one value or several."""
    times: dict[str, int] = defaultdict(int)
    for names in statements.entities.values():
        for name in names:
            times[name] += 1
    for name, _ in statements.literals:
        times[name] += 1
    for name, count in times.items():
        having, once = reading.single.get(name, (0, 0))
        reading.single[name] = having + 1, once + (count == 1)


def _softmax(scores: dict[str, float], most: int | None = KEPT) -> Belief:
    top = max(scores.values())
    kept = sorted(scores, key=lambda iri: (-scores[iri], iri))[:most]
    total = math.fsum(math.exp(scores[iri] - top) for iri in kept)
    return {iri: math.exp(scores[iri] - top) / total for iri in kept}


def infer(reading: Reading, rounds: int = ROUNDS) -> None:
    """Repeat `rounds` times: decide types and properties from the beliefs about cells, then cells from these."""
    for _ in range(rounds):
        decide_columns(reading)
        for row in reading.rows:
            infer_row(reading, row)
    decide_columns(reading)


def decide_columns(reading: Reading) -> None:
    """Decide the types of columns and the properties of pairs from what the sampled cells are believed to be."""
    for column in reading.columns:
        _cover(reading, column)
        reading.types[column] = choose_type(reading, column)
    for subject in reading.columns:
        for other in range(reading.table.width):
            if other != subject:
                _support(reading, (subject, other))


# -- types ------------------------------------------------------------------------------------------------------------

def _cover(reading: Reading, column: int) -> None:
    cells = [(row, column) for row in reading.rows if (row, column) in reading.beliefs]
    totals: dict[str, float] = defaultdict(float)
    for cell in cells:
        for entity, belief in reading.beliefs[cell].items():
            for kind, share in type_shares(reading, entity).items():
                totals[kind] += belief * share
    reading.coverage[column] = {kind: total / len(cells) for kind, total in sorted(totals.items())} if cells else {}


def type_shares(reading: Reading, entity: str) -> dict[str, float]:
    """Types of an entity -> probability: 1 for those that the graph states and those above them, else a model's."""
    shares = dict.fromkeys(reading.graph.statements(entity).ancestors, 1.0)
    for kind, share in reading.evidence.types.get(entity, {}).items():
        shares.setdefault(kind, share)
    return shares


def choose_type(reading: Reading, column: int) -> str:
    """The most specific type that the column's cells agree on; empty where they have none.

    From the top of the hierarchy, each step goes down to the type that most cells have, as long as a fifth of all cells have
    it and 2.5 times as many as have the next one: a graph does not state every type of every entity.
    """
    coverage = reading.coverage[column]
    if not coverage or max(coverage.values()) < LEAST_COVERAGE:
        return ""
    cells = sum((row, column) in reading.beliefs for row in reading.rows)
    roots = [kind for kind in coverage if not any(parent in coverage for parent in reading.graph.parents(kind))]
    level, chosen = roots, ""
    seen: set[str] = set()
    while level:
        best = max(level, key=lambda kind: (coverage[kind], kind))
        next_best = max((coverage[kind] for kind in level if kind != best), default=0.0)
        if chosen and (coverage[best] < LEAST_COVERAGE or coverage[best] * cells < min(LEAST_CELLS, cells - 0.5)
                       or coverage[best] < LEAST_LEAD * next_best):
            break
        chosen = best
        seen.add(best)
        level = [kind for kind in coverage if chosen in reading.graph.parents(kind) and kind not in seen]
    return chosen


# -- properties -------------------------------------------------------------------------------------------------------

def _support(reading: Reading, pair: Pair) -> None:
    """Number of rows in which each property leads from the cell of the first column to that of the second, and its weight
    among all properties, evidence from a model included."""
    subject, other = pair
    holds: dict[str, float] = defaultdict(float)
    for row in reading.rows:
        mine = reading.beliefs.get((row, subject))
        if not mine or is_missing(reading.text((row, other))):
            continue
        theirs = reading.beliefs.get((row, other), {})
        for entity, belief in mine.items():
            statements = reading.graph.statements(entity)
            shares: dict[str, float] = {}
            for thing, sure in theirs.items():
                for name in statements.entities.get(thing, ()):
                    shares[name] = shares.get(name, 0.0) + sure
            for name in literal_matches(statements, reading.text((row, other))):
                shares[name] = max(shares.get(name, 0.0), 1.0)
            for name, share in shares.items():
                holds[name] += belief * share
    reading.support[pair] = {name: total for name, total in sorted(holds.items()) if total > 0.05}
    scores = dict(reading.support[pair])
    for name, share in (reading.evidence.properties.get(pair) or _usual(reading, pair)).items():
        scores[name] = scores.get(name, 0.0) + share
    total = sum(scores.values()) + 0.3
    reading.weights[pair] = {name: score / total for name, score in scores.items()}


def _usual(reading: Reading, pair: Pair) -> dict[str, float]:
    """Weights of the properties that the graph uses between the types of two columns, known before any row is read."""
    subject, other = pair
    if not reading.coverage.get(subject) or (other in reading.columns and not reading.coverage.get(other)):
        return {}
    counts = reading.graph.properties_between(common_types(reading, subject),
                                              common_types(reading, other) if other in reading.columns else None)
    total = sum(counts.values())
    return {name: USUAL * count / total for name, count in counts.items()} if total else {}


def common_types(reading: Reading, column: int) -> frozenset[str]:
    """Types that at least 30% of a column's cells have."""
    return frozenset(kind for kind, share in reading.coverage[column].items() if share >= 0.3)


def literal_matches(statements: EntityStatements, text: str) -> list[str]:
    """Properties of an entity whose literal value a cell's text gives."""
    return [name for name, value in statements.literals if same_literal(text, value)]


def best_property(reading: Reading, pair: Pair) -> tuple[str, float]:
    """The likeliest property of a pair of columns and its weight; ('', 0) where there is none."""
    weights = reading.weights.get(pair, {})
    if not weights:
        return "", 0.0
    best = max(weights, key=lambda name: (weights[name], name))
    return best, weights[best]


# -- cells ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class GraphEvidence:
    """How far the graph's statements about a candidate match another cell of its row, and contradict it; 0 to 1 each."""

    match: float
    contradiction: float

    @property
    def silent(self) -> bool:
        """Whether the graph neither supports nor contradicts the candidate."""
        return self.match < 0.3 and self.contradiction < 0.3


def graph_evidence(reading: Reading, cell: Cell, entity: str, other: int) -> GraphEvidence:
    """What the graph states about a candidate of a cell and the row's cell in column `other`."""
    row, column = cell
    statements = reading.graph.statements(entity)
    theirs = reading.beliefs.get((row, other), {})
    forward, backward = reading.weights.get((column, other), {}), reading.weights.get((other, column), {})
    match = 0.0
    for thing, sure in theirs.items():
        there = [0.4 + 0.6 * forward.get(name, 0.0) for name in statements.entities.get(thing, ())]
        back = [0.4 + 0.6 * backward.get(name, 0.0) for name in reading.graph.statements(thing).entities.get(entity, ())]
        match += sure * max(there + back, default=0.0)
    match = max([match, *(0.4 + 0.6 * forward.get(name, 0.0)
                          for name in literal_matches(statements, reading.text((row, other))))])
    return GraphEvidence(match, (1 - match) * _contradiction(reading, statements, theirs, (column, other), entity))


def _contradiction(reading: Reading, statements: EntityStatements, theirs: Belief, pair: Pair, entity: str) -> float:
    name, weight = best_property(reading, pair)
    against = 0.0
    if weight >= SETTLED and (any(name in names for names in statements.entities.values())
                              or any(name == stated for stated, _ in statements.literals)):
        against = weight * reading.single_valued(name)
    name, weight = best_property(reading, (pair[1], pair[0]))
    if weight >= SETTLED:
        share = sum(sure for thing, sure in theirs.items() if any(
            name in names for other, names in reading.graph.statements(thing).entities.items() if other != entity))
        against = max(against, weight * share * reading.single_valued(name))
    return against


def infer_row(reading: Reading, row: int) -> None:
    """Update the beliefs about the cells of a row from its other cells and from the beliefs about the columns."""
    new: dict[Cell, Belief] = {}
    for column in reading.columns:
        cell = (row, column)
        if cell not in reading.candidates:
            continue
        scores = {}
        others = [other for other in range(reading.table.width) if other != column
                  and not is_missing(reading.text((row, other)))
                  and (other in reading.columns or reading.weights.get((column, other)))]
        for candidate in reading.candidates[cell]:
            score = SPELLING * candidate.score + _type_score(reading, column, candidate.entity)
            score += reading.evidence.context.get((cell, candidate.entity), 0.0)
            for other in others:
                graph = graph_evidence(reading, cell, candidate.entity, other)
                by_model = reading.evidence.relation.get((cell, candidate.entity, other))
                if by_model is not None and graph.silent:
                    score += MATCH + by_model
                else:
                    score += MATCH * graph.match - CONTRADICTION * graph.contradiction
            scores[candidate.entity] = score
        new[cell] = _softmax(scores)
    reading.beliefs |= new


def _type_score(reading: Reading, column: int, entity: str) -> float:
    chosen = reading.types.get(column, "")
    if not chosen:
        return 0.0
    ancestors = reading.graph.statements(entity).ancestors
    if chosen in ancestors:
        return TYPE
    above = reading.graph.parents(chosen)
    if not any(parent in ancestors for parent in above):
        return -NO_TYPE if ancestors and above else -NO_TYPE * 0.5
    if any(parent in reading.graph.parents(kind) for kind in ancestors for parent in above):
        return -OTHER_TYPE
    share = reading.evidence.types.get(entity, {}).get(chosen)
    return 0.0 if share is None else TYPE * share - OTHER_TYPE * (1 - share)


def finish(reading: Reading, lookup: Lookup) -> Iterable[int]:
    """Infer the rows that were not sampled, one after another; yields the number of every row once it is done."""
    sampled = set(reading.rows)
    for row in range(len(reading.table.rows)):
        if row not in sampled:
            _fill(reading, lookup, row)
            infer_row(reading, row)
            infer_row(reading, row)
        yield row
