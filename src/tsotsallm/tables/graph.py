"""A knowledge graph on disk: statements in an embedded store, labels in an index; loaded once, may exceed memory."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tsotsallm.checkpoint.writer import write_json
from tsotsallm.errors import TablesError
from tsotsallm.files import JsonObject
from tsotsallm.tables.load import FORMAT, Loaded, fill, key_of_sources

FACTS = "graph.json"
MOST_STATEMENTS = 400
"""Statements that are read per entity."""
ANCESTORS = 12
"""Most steps up the hierarchy of types."""


@dataclass(frozen=True)
class Label:
    """A name of an entity as written, and whether it is an alias rather than the entity's label."""

    entity: str
    text: str
    alias: bool


@dataclass(frozen=True)
class EntityStatements:
    """What a graph states about an entity: entities and literals by property, and its types with all types above them."""

    entities: dict[str, tuple[str, ...]]        # object -> properties that lead to it
    literals: tuple[tuple[str, str], ...]       # (property, value)
    types: tuple[str, ...]                      # stated
    ancestors: dict[str, int]                   # type, stated or above -> steps up, 0 for stated


class Graph:
    """Labels, types and relations of a graph; everything is read from disk, and recent results are cached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: JsonObject = json.loads((folder / FACTS).read_text("utf-8"))
        address = f"{(folder / 'labels.sqlite').absolute().as_uri()}?mode=ro"
        self.labels = sqlite3.connect(address, uri=True, check_same_thread=False)
        self.store: Any = None
        if self.facts["statements"]:
            from tsotsallm.tables.load import library

            self._rdf = library()
            self.store = self._rdf.Store.read_only(str(folder / "store"))
        self.statements = lru_cache(maxsize=100_000)(self._statements)
        self.label = lru_cache(maxsize=100_000)(self._label)
        self.parents = lru_cache(maxsize=100_000)(self._parents)
        self.children = lru_cache(maxsize=10_000)(self._children)
        self._between = lru_cache(maxsize=10_000)(self._between_types)
        self.sentences = lru_cache(maxsize=10_000)(self._sentences)

    @property
    def key(self) -> str:
        """Hash of the files that the graph was loaded from."""
        return str(self.facts["key"])

    def close(self) -> None:
        """Close the index and the store."""
        self.labels.close()
        self.store = None

    # -- names --------------------------------------------------------------------------------------------------------

    def named(self, normal: str, kind: str = "entity") -> list[Label]:
        """Labels that are equal to a text after normalising, at most 200; aliases last."""
        rows = self.labels.execute("SELECT e.iri, l.text, l.alias FROM label l JOIN entity e ON e.id = l.entity "
                                   "WHERE l.normal = ? AND e.kind = ? ORDER BY l.alias, e.id LIMIT 200", (normal, kind))
        return [Label(iri, text, bool(alias)) for iri, text, alias in rows]

    def like(self, grams: Sequence[str], most: int, rows_read: int, kind: str = "entity") -> list[Label]:
        """At most `most` labels that share rare trigrams with a text, those that share the most first.

        At most `rows_read` entries of the index are read, those of the rarest trigrams.
        """
        counts = {}
        for gram in grams:
            row = self.labels.execute("SELECT doc FROM frequency WHERE term = ?", (gram,)).fetchone()
            if row is not None:
                counts[gram] = int(row[0])
        chosen: list[str] = []
        read = 0
        for gram in sorted(counts, key=lambda gram: (counts[gram], gram)):
            if chosen and (read + counts[gram] > rows_read or len(chosen) >= 12):
                break
            chosen.append(gram)
            read += counts[gram]
        shared: dict[int, int] = {}
        for gram in chosen:
            quoted = gram.replace('"', '""')
            for (row,) in self.labels.execute("SELECT rowid FROM trigram WHERE trigram MATCH ? LIMIT ?",
                                              (f'"{quoted}"', rows_read)):
                shared[row] = shared.get(row, 0) + 1
        least = 2 if len(chosen) > 5 else 1
        best = sorted((row for row in shared if shared[row] >= least), key=lambda row: (-shared[row], row))[:most]
        if not best:
            return []
        marks = ",".join("?" * len(best))
        rows = self.labels.execute(f"SELECT l.id, e.iri, l.text, l.alias FROM label l JOIN entity e ON e.id = l.entity "
                                   f"WHERE l.id IN ({marks}) AND e.kind = ?", (*best, kind))
        rank = {row: place for place, row in enumerate(best)}
        return [Label(iri, text, bool(alias)) for _, iri, text, alias in sorted(rows, key=lambda row: rank[row[0]])]

    def _label(self, iri: str) -> str:
        """The label of an entity, or the last part of its address where it has none."""
        row = self.labels.execute("SELECT l.text FROM label l JOIN entity e ON e.id = l.entity WHERE e.iri = ? "
                                  "ORDER BY l.alias, l.rank, l.id LIMIT 1", (iri,)).fetchone()
        return str(row[0]) if row else iri.rstrip("/#").replace("#", "/").rpartition("/")[2].replace("_", " ")

    def description(self, iri: str) -> str:
        """The description of an entity; empty where it has none."""
        row = self.labels.execute("SELECT text FROM description WHERE entity = (SELECT id FROM entity WHERE iri = ?) "
                                  "ORDER BY id LIMIT 1", (iri,)).fetchone()
        return str(row[0]) if row else ""

    def _sentences(self, iri: str) -> tuple[str, ...]:
        """Phrasings of a property with {s} and {o}; one made from its label where the graph gives none."""
        rows = self.labels.execute("SELECT text FROM sentence WHERE entity = (SELECT id FROM entity WHERE iri = ?) "
                                   "ORDER BY id", (iri,)).fetchall()
        return tuple(str(row[0]) for row in rows) or (f"{{s}} {self.label(iri)} {{o}}.",)

    def has_sentences(self, iri: str) -> bool:
        """Whether the graph gives phrasings of a property."""
        return self.labels.execute("SELECT 1 FROM sentence WHERE entity = (SELECT id FROM entity WHERE iri = ?) LIMIT 1",
                                   (iri,)).fetchone() is not None

    # -- statements ---------------------------------------------------------------------------------------------------

    def _statements(self, iri: str) -> EntityStatements:
        entities: dict[str, list[str]] = {}
        literals: list[tuple[str, str]] = []
        types: list[str] = []
        if self.store is not None:
            rdf, ignored, typing = self._rdf, self.facts["ignored"], self.facts["typing"]
            for number, quad in enumerate(self.store.quads_for_pattern(rdf.NamedNode(iri), None, None)):
                if number >= MOST_STATEMENTS:
                    break
                predicate = quad.predicate.value
                if isinstance(quad.object, rdf.NamedNode):
                    if predicate in typing:
                        types.append(quad.object.value)
                    elif predicate not in ignored:
                        entities.setdefault(quad.object.value, []).append(predicate)
                elif isinstance(quad.object, rdf.Literal) and predicate not in ignored:
                    literals.append((predicate, quad.object.value))
        return EntityStatements({other: tuple(sorted(set(entities[other]))) for other in sorted(entities)},
                                tuple(sorted(set(literals))), tuple(sorted(set(types))), self._up(types))

    def _up(self, types: Sequence[str]) -> dict[str, int]:
        """Types and all types above them -> steps up."""
        steps = dict.fromkeys(sorted(types), 0)
        level = sorted(types)
        for step in range(1, ANCESTORS + 1):
            level = [parent for parent in dict.fromkeys(parent for kind in level for parent in self.parents(kind))
                     if parent not in steps]
            if not level:
                break
            steps |= dict.fromkeys(level, step)
        return steps

    def _parents(self, kind: str) -> tuple[str, ...]:
        return self._hierarchy(kind, up=True)

    def _children(self, kind: str) -> tuple[str, ...]:
        """Direct subclasses."""
        return self._hierarchy(kind, up=False)

    def _hierarchy(self, kind: str, *, up: bool) -> tuple[str, ...]:
        if self.store is None:
            return ()
        rdf, types, here = self._rdf, set(), self._rdf.NamedNode(kind)
        for predicate in self.facts["subclass"]:
            pattern = (here, rdf.NamedNode(predicate), None) if up else (None, rdf.NamedNode(predicate), here)
            for quad in self.store.quads_for_pattern(*pattern):
                other = quad.object if up else quad.subject
                if isinstance(other, rdf.NamedNode):
                    types.add(other.value)
        return tuple(sorted(types - {kind}))

    def properties_between(self, subject_types: frozenset[str], object_types: frozenset[str] | None) -> dict[str, int]:
        """Property -> how often the graph uses it between entities of these types (None: literals), most used first."""
        return self._between(subject_types, object_types)

    def _between_types(self, subjects: frozenset[str], objects: frozenset[str] | None) -> dict[str, int]:
        totals: dict[str, int] = {}
        for name, subject, thing, count in self.labels.execute(
                "SELECT e.iri, s.subject, s.object, s.count FROM signature s JOIN entity e ON e.id = s.property "
                "ORDER BY s.id"):
            if subject in subjects and (thing == "" if objects is None else thing in objects):
                totals[name] = max(totals.get(name, 0), count)
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


def open_graph(sources: Sequence[str | Path], root: Path, say: Callable[[str], None] = lambda _line: None, *,
               strict: bool = False) -> Graph:
    """Open the graph of some files; it is loaded into `root` the first time that these files are given.

    Statements that do not parse are skipped and noted, up to 1% of a file; `strict` raises TablesError at the first one.
    Raises TablesError where a file is missing or is not a graph.
    """
    paths = [Path(source) for source in sources]
    for path in paths:
        if not path.is_file():
            raise TablesError(f"{path} does not exist; give a graph as RDF (Turtle, N-Triples, N-Quads, RDF/XML), labels as "
                              "JSON, CSV or TSV, or 'embedded'")
    key = key_of_sources(paths)
    folder = root / f"graph-{key}"
    if not (folder / FACTS).exists():
        _load(paths, key, folder, say, strict=strict)
    os.utime(folder)
    graph = Graph(folder)
    graph.facts["sources"] = [path.name for path in paths]      # the same content may have been loaded by another name
    if strict and (skipped := graph.facts["skipped"]):
        graph.close()
        raise TablesError(f"{skipped[0]} {skipped[1]}; correct it, or leave out --strict")
    return graph


def _load(paths: Sequence[Path], key: str, folder: Path, say: Callable[[str], None], *, strict: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    for left in folder.parent.glob(f"{folder.name}.*.partial"):
        if not _alive(left):
            shutil.rmtree(left, ignore_errors=True)
    partial.mkdir()
    started = time.monotonic()
    try:
        loaded: Loaded = fill(paths, partial, say, strict=strict)
        write_json(partial / FACTS, loaded.plain() | {"key": key, "format": FORMAT,
                                                      "sources": [path.name for path in paths],
                                                      "seconds": round(time.monotonic() - started, 2)})
        if not folder.exists():
            partial.replace(folder)
    except OSError:
        if not (folder / FACTS).exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"graph loaded: {loaded.entities:,} entities, {loaded.labels:,} labels, {loaded.statements:,} statements in "
        f"{time.monotonic() - started:.1f} s")


def _alive(partial: Path) -> bool:
    import psutil

    number = partial.name.split(".")[-2]
    return number.isdigit() and int(number) != os.getpid() and psutil.pid_exists(int(number))
