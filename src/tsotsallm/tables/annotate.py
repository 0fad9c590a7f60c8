"""Annotate tables: the graph proposes candidates, and a model decides where the graph is silent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tsotsallm.errors import TablesError, nearest
from tsotsallm.tables.decide import Decider, subject_column
from tsotsallm.tables.graph import Graph
from tsotsallm.tables.infer import Reading, begin, best_property, finish, infer
from tsotsallm.tables.lookup import Lookup
from tsotsallm.tables.reading import Table

TASKS = ("cea", "cta", "cpa")
SHOWN = 5
"""Candidates listed for a cell, a column or a pair."""
LEAST_WEIGHT = 0.375
"""Least weight of the usual property of two types to annotate a pair of columns that no row supports."""
LEAST_SUPPORT = 0.5
"""Least number of rows in which a property must hold, by the graph or by a model, to annotate a pair of columns."""


@dataclass(frozen=True)
class Annotation:
    """One annotation: its place (row and columns as SemTab counts them), what was chosen, how certain, and alternatives.

    `place` is (row, column) for a cell, (column,) for a column, (first, second) for a pair. `confidence` is the probability
    of a cell's entity, the share of a column's cells that have its type, or the share of a pair's property among all that
    were considered. Candidates are (address, label, the same measure).
    """

    task: str
    place: tuple[int, ...]
    chosen: str
    confidence: float
    candidates: tuple[tuple[str, str, float], ...]
    text: str = ""

    def plain(self) -> dict[str, object]:
        """One line of annotations.jsonl, as plain data."""
        return {"task": self.task, "place": list(self.place), "text": self.text, "chosen": self.chosen,
                "confidence": self.confidence,
                "candidates": [{"id": iri, "label": label, "score": score} for iri, label, score in self.candidates]}


@dataclass(frozen=True)
class Annotated:
    """All annotations of a table with notes; `error` says why there are none where the table could not be read."""

    table: str
    answers: tuple[Annotation, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""
    model: str = ""


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks in the order of TASKS; raises TablesError for an unknown one or for none."""
    for task in tasks:
        if task not in TASKS:
            raise TablesError(f"there is no task {task!r}{nearest(task, TASKS)}")
    if not tasks:
        raise TablesError(f"no task is given; choose from {', '.join(TASKS)}")
    return tuple(task for task in TASKS if task in tasks)


def annotate_tables(tables: Sequence[Table], graph: Graph, lookup: Lookup, tasks: Sequence[str],
                    decider: Decider | None = None, tick: Callable[[float], None] = lambda _share: None) -> list[Annotated]:
    """Annotate several tables; the model evaluates the open questions of all of them together, in two batches."""
    readings = [begin(table, graph, lookup) for table in tables]
    for reading in readings:
        if reading.columns:
            infer(reading)
    able = [reading for reading in readings if reading.columns]
    if decider is not None and able:
        decider.properties(able)
        for reading in able:
            infer(reading, 1)
        decider.cells_and_types(able)
        for reading in able:
            infer(reading, 3)
    annotated = []
    for number, reading in enumerate(readings, 1):
        annotated.append(_written(reading, lookup, tasks))
        tick(number / len(readings))
    return annotated


def _written(reading: Reading, lookup: Lookup, tasks: Sequence[str]) -> Annotated:
    table = reading.table
    notes = list(table.notes)
    if not reading.columns:
        return Annotated(table.name, notes=(*notes, "no column names entities of the graph: nothing to annotate"))
    answers: list[Annotation] = []
    for row in finish(reading, lookup):
        for column in reading.columns if "cea" in tasks else ():
            if best := reading.best((row, column)):
                belief = reading.beliefs[row, column]
                answers.append(Annotation("cea", (table.first_row + row, table.columns[column]), best,
                                          round(belief[best], 3), _shown(reading, belief), reading.text((row, column))))
        if row not in reading.rows:
            for column in reading.columns:          # free what is written: a table may have any number of rows
                reading.beliefs.pop((row, column), None)
                reading.candidates.pop((row, column), None)
    for column in reading.columns if "cta" in tasks else ():
        if chosen := reading.types.get(column, ""):
            coverage = reading.coverage[column]
            answers.append(Annotation("cta", (table.columns[column],), chosen, round(min(coverage[chosen], 1.0), 3),
                                  _shown(reading, coverage), table.header[column]))
    if "cpa" in tasks:
        answers += _pairs(reading)
    return Annotated(table.name, tuple(answers), tuple(notes))


def _pairs(reading: Reading) -> list[Annotation]:
    """Properties of pairs of columns that rows support; a pair that begins with the subject column also gets the property
    that is usual between the types of its columns, since such a pair must have some property."""
    table, pairs, subject = reading.table, [], subject_column(reading)
    for pair in sorted(reading.weights):
        name, weight = best_property(reading, pair)
        support = reading.support[pair].get(name, 0.0) + reading.evidence.properties.get(pair, {}).get(name, 0.0)
        reverse = sum(reading.support.get((pair[1], pair[0]), {}).values())
        if name and ((support >= LEAST_SUPPORT and support >= 0.1 * len(reading.rows))
                     or (pair[0] == subject and weight >= LEAST_WEIGHT and reverse < LEAST_SUPPORT)):
            pairs.append(Annotation("cpa", (table.columns[pair[0]], table.columns[pair[1]]), name, round(weight, 3),
                                    _shown(reading, reading.weights[pair])))
    return pairs


def _shown(reading: Reading, scores: dict[str, float]) -> tuple[tuple[str, str, float], ...]:
    best = sorted(scores, key=lambda iri: (-scores[iri], iri))[:SHOWN]
    return tuple((iri, reading.graph.label(iri), round(scores[iri], 3)) for iri in best)
