"""A knowledge graph on disk: statements in an embedded store, labels in an index; loaded once, larger than memory."""

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
from tsotsallm.tables.load import FORMAT, Loaded, fill, key_of_sources

FACTS = "graph.json"
MOST_STATEMENTS = 400
"""EntityStatements of one entity that are looked at."""
ANCESTORS = 12
"""Steps up the hierarchy of types that are taken."""


@dataclass(frozen=True)
class Label:
    """A name of an entity: as it is written, and whether it is its own label or another name of it."""

    entity: str
    text: str
    alias: bool


@dataclass(frozen=True)
class EntityStatements:
    """What a graph says of an entity: entities and literals by property, and its types with all types above them."""

    entities: dict[str, tuple[str, ...]]        # object -> properties that lead to it
    literals: tuple[tuple[str, str], ...]       # (property, value)
    types: tuple[str, ...]                      # stated
    ancestors: dict[str, int]                   # type, stated or above -> steps up, 0 for stated


class Graph:
    """Labels, types and relations of a graph; every answer comes from disk and the latest ones are remembered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text("utf-8"))
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
        return str(self.facts["key"])

    def close(self) -> None:
        self.labels.close()
        self.store = None

    # -- names --------------------------------------------------------------------------------------------------------

    def named(self, normal: str, kind: str = "entity") -> list[Label]:
        """Labels that are the same after normalising."""
        rows = self.labels.execute("SELECT e.iri, l.text, l.alias FROM label l JOIN entity e ON e.id = l.entity "
                                   "WHERE l.normal = ? AND e.kind = ? ORDER BY l.alias, e.id LIMIT 200", (normal, kind))
        return [Label(iri, text, bool(alias)) for iri, text, alias in rows]

    def like(self, grams: Sequence[str], most: int, rows_read: int, kind: str = "entity") -> list[Label]:
        """Labels that share rare trigrams with a text, most of them first; at most `rows_read` entries of the index are
        read, those of the rarest trigrams."""
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
        found = self.labels.execute(f"SELECT l.id, e.iri, l.text, l.alias FROM label l JOIN entity e ON e.id = l.entity "
                                    f"WHERE l.id IN ({marks}) AND e.kind = ?", (*best, kind))
        rank = {row: place for place, row in enumerate(best)}
        return [Label(iri, text, bool(alias)) for _, iri, text, alias in sorted(found, key=lambda row: rank[row[0]])]

    def _label(self, iri: str) -> str:
        """The label of an entity; the last part of its address where it has none."""
        row = self.labels.execute("SELECT l.text FROM label l JOIN entity e ON e.id = l.entity WHERE e.iri = ? "
                                  "ORDER BY l.alias, l.rank, l.id LIMIT 1", (iri,)).fetchone()
        return str(row[0]) if row else iri.rstrip("/#").replace("#", "/").rpartition("/")[2].replace("_", " ")

    def description(self, iri: str) -> str:
        row = self.labels.execute("SELECT text FROM description WHERE entity = (SELECT id FROM entity WHERE iri = ?) "
                                  "ORDER BY id LIMIT 1", (iri,)).fetchone()
        return str(row[0]) if row else ""

    def _sentences(self, iri: str) -> tuple[str, ...]:
        """How a property is put into words, with {s} and {o}; by its label where the graph does not say."""
        rows = self.labels.execute("SELECT text FROM sentence WHERE entity = (SELECT id FROM entity WHERE iri = ?) "
                                   "ORDER BY id", (iri,)).fetchall()
        return tuple(str(row[0]) for row in rows) or (f"{{s}} {self.label(iri)} {{o}}.",)

    def has_sentences(self, iri: str) -> bool:
        """Whether the graph says how a property is put into words."""
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
        return EntityStatements({one: tuple(sorted(set(entities[one]))) for one in sorted(entities)},
                                tuple(sorted(set(literals))), tuple(sorted(set(types))), self._up(types))

    def _up(self, types: Sequence[str]) -> dict[str, int]:
        found = dict.fromkeys(sorted(types), 0)
        level = sorted(types)
        for step in range(1, ANCESTORS + 1):
            level = [one for one in dict.fromkeys(parent for kind in level for parent in self.parents(kind))
                     if one not in found]
            if not level:
                break
            found |= dict.fromkeys(level, step)
        return found

    def _parents(self, kind: str) -> tuple[str, ...]:
        return self._hierarchy(kind, up=True)

    def _children(self, kind: str) -> tuple[str, ...]:
        """Direct subclasses."""
        return self._hierarchy(kind, up=False)

    def _hierarchy(self, kind: str, *, up: bool) -> tuple[str, ...]:
        if self.store is None:
            return ()
        rdf, found, here = self._rdf, set(), self._rdf.NamedNode(kind)
        for predicate in self.facts["subclass"]:
            pattern = (here, rdf.NamedNode(predicate), None) if up else (None, rdf.NamedNode(predicate), here)
            for quad in self.store.quads_for_pattern(*pattern):
                other = quad.object if up else quad.subject
                if isinstance(other, rdf.NamedNode):
                    found.add(other.value)
        return tuple(sorted(found - {kind}))

    def properties_between(self, subject_types: frozenset[str], object_types: frozenset[str] | None) -> dict[str, int]:
        """Properties that the graph uses between things of such types (None: literals) with how often, most used first."""
        return self._between(subject_types, object_types)

    def _between_types(self, subjects: frozenset[str], objects: frozenset[str] | None) -> dict[str, int]:
        totals: dict[str, int] = {}
        for one, subject, thing, count in self.labels.execute(
                "SELECT e.iri, s.subject, s.object, s.count FROM signature s JOIN entity e ON e.id = s.property "
                "ORDER BY s.id"):
            if subject in subjects and (thing == "" if objects is None else thing in objects):
                totals[one] = max(totals.get(one, 0), count)
        return dict(sorted(totals.items(), key=lambda item: (-item[1], item[0])))


def open_graph(sources: Sequence[str | Path], root: Path, say: Callable[[str], None] = lambda _line: None, *,
               strict: bool = False) -> Graph:
    """The graph of some files, loaded into `root` the first time that these files are asked for.

    EntityStatements that do not parse are skipped and noted, up to 1% of a file; `strict` refuses the first one.
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
    found = Graph(folder)
    found.facts["sources"] = [path.name for path in paths]      # the same content may have been loaded by another name
    if strict and (skipped := found.facts["skipped"]):
        found.close()
        raise TablesError(f"{skipped[0]} {skipped[1]}; correct it, or leave out --strict")
    return found


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
        write_json(partial / FACTS, loaded.plain() | {"key": key, "format": FORMAT, "sources": [one.name for one in paths],
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
