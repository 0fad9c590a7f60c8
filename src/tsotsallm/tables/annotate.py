"""Tables to annotations: the graph proposes, and a model decides where the graph is silent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tsotsallm.errors import TablesError, nearest
from tsotsallm.tables.decide import Decider, subject_column
from tsotsallm.tables.graph import Graph
from tsotsallm.tables.infer import Reading, begin, best_property, finish, infer
from tsotsallm.tables.lookup import Lookup
from tsotsallm.tables.reading import Table

TASKS = ("cea", "cta", "cpa")
SHOWN = 5
"""Candidates that are kept of a cell, a column or a pair."""
LEAST_WEIGHT = 0.375
"""Weight that the usual property of two types must have to be written for a pair that no row supports."""
LEAST_SUPPORT = 0.5
"""Rows in which a property must hold, by the graph or a model's word, for a pair of columns to be annotated."""


@dataclass(frozen=True)
class Annotation:
    """One annotation: its place (row and columns as SemTab counts them), what was chosen, how sure, and what else could be.

    Of cells `place` is (row, column), of columns (column,), of pairs (first, second). `confidence` is of a cell the
    probability of its entity, of a column the share of its cells that have the type, of a pair the share of its property
    among all that were considered. Candidates are (address, label, the same measure).
    """

    task: str
    place: tuple[int, ...]
    chosen: str
    confidence: float
    candidates: tuple[tuple[str, str, float], ...]
    text: str = ""

    def plain(self) -> dict[str, Any]:
        return {"task": self.task, "place": list(self.place), "text": self.text, "chosen": self.chosen,
                "confidence": self.confidence,
                "candidates": [{"id": one, "label": label, "score": score} for one, label, score in self.candidates]}


@dataclass(frozen=True)
class Annotated:
    """All annotations of a table, and what was noted; `error` says why there are none where it could not be read."""

    table: str
    answers: tuple[Annotation, ...] = ()
    notes: tuple[str, ...] = ()
    error: str = ""
    model: str = ""


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    for task in tasks:
        if task not in TASKS:
            raise TablesError(f"there is no task {task!r}{nearest(task, TASKS)}")
    if not tasks:
        raise TablesError(f"no task is asked for; choose from {', '.join(TASKS)}")
    return tuple(task for task in TASKS if task in tasks)


def annotate_tables(tables: Sequence[Table], graph: Graph, lookup: Lookup, tasks: Sequence[str],
                    decider: Decider | None = None, tick: Callable[[float], None] = lambda _share: None) -> list[Annotated]:
    """Annotate some tables; all questions to the model go in two batches for all of them together."""
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
    found = []
    for number, reading in enumerate(readings, 1):
        found.append(_written(reading, lookup, tasks))
        tick(number / len(readings))
    return found


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
            for column in reading.columns:          # what is written is let go of: a table may have any number of rows
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
    """Properties of pairs: where rows support one, and from the table's subject column also the one that is usual between
    the types of two columns, since such a pair must have some property."""
    table, found, subject = reading.table, [], subject_column(reading)
    for pair in sorted(reading.weights):
        name, weight = best_property(reading, pair)
        support = reading.support[pair].get(name, 0.0) + reading.evidence.properties.get(pair, {}).get(name, 0.0)
        reverse = sum(reading.support.get((pair[1], pair[0]), {}).values())
        if name and ((support >= LEAST_SUPPORT and support >= 0.1 * len(reading.rows))
                     or (pair[0] == subject and weight >= LEAST_WEIGHT and reverse < LEAST_SUPPORT)):
            found.append(Annotation("cpa", (table.columns[pair[0]], table.columns[pair[1]]), name, round(weight, 3),
                                _shown(reading, reading.weights[pair])))
    return found


def _shown(reading: Reading, scores: dict[str, float]) -> tuple[tuple[str, str, float], ...]:
    best = sorted(scores, key=lambda one: (-scores[one], one))[:SHOWN]
    return tuple((one, reading.graph.label(one), round(scores[one], 3)) for one in best)
