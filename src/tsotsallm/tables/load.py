"""Load a graph: RDF into an embedded store, labels of RDF or of label files into an index of trigrams."""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tsotsallm.errors import TablesError
from tsotsallm.files import Json, csv_rows, parse_json, quoted, regular_size, utf8_lines
from tsotsallm.rdf import SUFFIXES, Skipped, Statements, opened, suffix_of
from tsotsallm.rdf import library as rdf_library
from tsotsallm.records import Record
from tsotsallm.store import key_of
from tsotsallm.tables.reading import LONGEST_CELL
from tsotsallm.tables.words import normalise

FORMAT = 4
"""The version of a loaded graph on disk; a graph of another version is loaded again."""
_SKOS, _SCHEMA, _FOAF = "http://www.w3.org/2004/02/skos/core#", "http://schema.org/", "http://xmlns.com/foaf/0.1/"
_RDFS, _OWL = "http://www.w3.org/2000/01/rdf-schema#", "http://www.w3.org/2002/07/owl#"
_WIKIDATA, _RDFNS = "http://www.wikidata.org/", "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
LABELS = (f"{_RDFS}label", f"{_SKOS}prefLabel", f"{_SCHEMA}name", f"{_FOAF}name")
ALIASES = (f"{_SKOS}altLabel", f"{_SKOS}hiddenLabel", f"{_SCHEMA}alternateName", f"{_FOAF}nick")
DESCRIPTIONS = (f"{_SCHEMA}description", f"{_RDFS}comment", f"{_SKOS}definition", "http://purl.org/dc/terms/description")
SENTENCE = "urn:tsotsallm:sentence"
"""Annotation of a property: a phrasing with {s} and {o}, for a model to evaluate."""
TYPING = (f"{_RDFNS}type", f"{_WIKIDATA}prop/direct/P31")
SUBCLASS = (f"{_RDFS}subClassOf", f"{_WIKIDATA}prop/direct/P279")
_CLASSES = (f"{_OWL}Class", f"{_RDFS}Class", f"{_RDFS}Datatype")
_PROPERTIES = (f"{_RDFNS}Property", f"{_OWL}ObjectProperty", f"{_OWL}DatatypeProperty", f"{_OWL}AnnotationProperty")
LANGUAGES = ("en", "", "fr")
SAMPLE = 400
"""Statements of a property from which its signature is taken."""
ROWS = 20_000
_TABLES = """
CREATE TABLE entity (id INTEGER PRIMARY KEY, iri TEXT UNIQUE, kind TEXT NOT NULL DEFAULT 'entity');
CREATE TABLE label (id INTEGER PRIMARY KEY, entity INTEGER, text TEXT, normal TEXT, alias INTEGER, rank INTEGER);
CREATE TABLE description (id INTEGER PRIMARY KEY, entity INTEGER, text TEXT);
CREATE TABLE sentence (id INTEGER PRIMARY KEY, entity INTEGER, text TEXT);
CREATE TABLE signature (id INTEGER PRIMARY KEY, property INTEGER, subject TEXT, object TEXT, count INTEGER);
CREATE VIRTUAL TABLE trigram USING fts5 (normal, content='', detail='none', columnsize=0,
                                         tokenize='trigram case_sensitive 1');
CREATE VIRTUAL TABLE frequency USING fts5vocab ('trigram', 'row');
"""


@dataclass
class Loaded(Record):
    """What was loaded of a graph: counts, notes, and the properties that have a meaning of their own."""

    entities: int = 0
    labels: int = 0
    statements: int = 0
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)    # sentences about what could not be read; also among the notes
    typing: tuple[str, ...] = TYPING
    subclass: tuple[str, ...] = SUBCLASS
    ignored: tuple[str, ...] = (*LABELS, *ALIASES, *DESCRIPTIONS, SENTENCE, *SUBCLASS)


def library() -> ModuleType:
    """The pyoxigraph library, which has no types; raises MissingExtraError where it is not installed."""
    return rdf_library("tables", "a graph in RDF")


def key_of_sources(paths: Sequence[Path]) -> str:
    """A hash of the contents and kinds of some files, whatever they are called."""
    hashes = []
    for path in paths:
        regular_size(path, TablesError)
        with path.open("rb") as file:
            hashes.append((hashlib.file_digest(file, "sha256").hexdigest(), suffix_of(path)))
    return key_of([FORMAT, hashes])


def fill(paths: Sequence[Path], folder: Path, say: Callable[[str], None], *, strict: bool = False) -> Loaded:
    """Write the store and the index of labels of some files into a folder.

    Statements that do not parse are skipped and noted; `strict` raises TablesError at the first one. Raises TablesError
    also where a file is of an unknown kind, or where the files hold no statement or no label.
    """
    loaded = Loaded()
    rdf_files = [path for path in paths if suffix_of(path) in SUFFIXES]
    index = sqlite3.connect(folder / "labels.sqlite")
    index.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-32000; {_TABLES}")
    names = _Names(index)
    if rdf_files:
        store = library().Store(str(folder / "store"))
        for path in rdf_files:
            say(f"loading {path.name}")
            statements = Statements(path, TablesError, "tables", strict=strict)
            store.bulk_extend(statements)
            loaded.skipped += statements.skipped.notes
        store.flush()
        loaded.statements = len(store)
        if not loaded.statements:
            raise TablesError(f"{rdf_files[0].name} holds no statement; give a graph with at least one")
        say("indexing labels")
        _labels_of_store(store, names, loaded)
        _signatures(store, index, names)
        del store
    for path in paths:
        if path not in rdf_files:
            loaded.skipped += _labels_of_file(path, names, strict=strict)
    names.finish()
    loaded.labels, loaded.entities = names.labels, names.entities
    if not loaded.labels:
        raise TablesError(f"{paths[0].name} holds no label; cells are found by rdfs:label, skos:prefLabel, schema:name or "
                          "foaf:name, so give a graph with one of them")
    loaded.notes += loaded.skipped
    if not rdf_files:
        loaded.notes.append("labels alone: the graph has no types and no relations, so columns get no type, pairs get no "
                            "property, and equal names cannot be distinguished by their neighbourhood")
    index.execute("CREATE INDEX by_normal ON label (normal)")
    index.execute("CREATE INDEX by_entity ON label (entity)")
    index.execute("CREATE INDEX description_of ON description (entity)")
    index.execute("INSERT INTO trigram (trigram) VALUES ('optimize')")
    index.commit()
    index.close()
    return loaded


class _Names:
    """Adds entities and labels to the index, a few thousand at a time."""

    def __init__(self, index: sqlite3.Connection) -> None:
        self.index = index
        self.labels = 0
        self._rows: list[tuple[int, int, str, str, int, int]] = []

    @property
    def entities(self) -> int:
        return int(self.index.execute("SELECT COUNT(*) FROM entity").fetchone()[0])

    def number(self, iri: str, kind: str | None = None) -> int:
        row = self.index.execute("SELECT id FROM entity WHERE iri = ?", (iri,)).fetchone()
        if row is None:
            number = int(self.index.execute("INSERT INTO entity (iri, kind) VALUES (?, ?)",
                                            (iri, kind or "entity")).lastrowid or 0)
        else:
            number = int(row[0])
            if kind is not None:
                self.index.execute("UPDATE entity SET kind = ? WHERE id = ?", (kind, number))
        return number

    def add(self, iri: str, text: str, *, alias: bool = False, rank: int = 0, kind: str | None = None) -> None:
        if not (normal := normalise(text)):
            return
        self.labels += 1
        self._rows.append((self.labels, self.number(iri, kind), text, normal, int(alias), rank))
        if len(self._rows) >= ROWS:
            self.finish()

    def add_text(self, table: str, iri: str, text: str) -> None:
        self.index.execute(f"INSERT INTO {table} (entity, text) VALUES (?, ?)", (self.number(iri), text))

    def finish(self) -> None:
        self.index.executemany("INSERT INTO label VALUES (?, ?, ?, ?, ?, ?)", self._rows)
        self.index.executemany("INSERT INTO trigram (rowid, normal) VALUES (?, ?)",
                               [(number, normal) for number, _, _, normal, _, _ in self._rows if len(normal) >= 3])
        self._rows.clear()


# -- RDF --------------------------------------------------------------------------------------------------------------

def _quads(store: Any, predicate: str) -> Iterator[Json]:
    rdf = library()
    return (quad for quad in store.quads_for_pattern(None, rdf.NamedNode(predicate), None)
            if isinstance(quad.subject, rdf.NamedNode))


def _labels_of_store(store: Any, names: _Names, loaded: Loaded) -> None:
    rdf = library()
    for predicate in TYPING[:1]:
        for kinds, kind in ((_CLASSES, "class"), (_PROPERTIES, "property")):
            for type_ in kinds:
                for quad in store.quads_for_pattern(None, rdf.NamedNode(predicate), rdf.NamedNode(type_)):
                    if isinstance(quad.subject, rdf.NamedNode):
                        names.number(quad.subject.value, kind)
    for predicates, alias in ((LABELS, False), (ALIASES, True)):
        for predicate in predicates:
            for quad in _quads(store, predicate):
                if isinstance(quad.object, rdf.Literal):
                    language = (quad.object.language or "").partition("-")[0]
                    rank = LANGUAGES.index(language) if language in LANGUAGES else len(LANGUAGES)
                    names.add(quad.subject.value, quad.object.value, alias=alias, rank=rank)
    for predicate in (*DESCRIPTIONS, SENTENCE):
        for quad in _quads(store, predicate):
            if isinstance(quad.object, rdf.Literal):
                names.add_text("sentence" if predicate == SENTENCE else "description", quad.subject.value, quad.object.value)
    if not names.labels:
        loaded.notes.append("the graph has no labels: the last part of every address serves as one")
        for quad in store:
            if isinstance(quad.subject, rdf.NamedNode):
                iri = quad.subject.value
                if names.index.execute("SELECT 1 FROM entity WHERE iri = ?", (iri,)).fetchone() is None:
                    names.add(iri, label_from_address(iri))


def label_from_address(iri: str) -> str:
    """The last part of an address as a label: http://dbpedia.org/resource/New_York_(state) -> New York (state)."""
    from urllib.parse import unquote

    return unquote(re.split(r"[/#]", iri.rstrip("/#"))[-1]).replace("_", " ")


def _signatures(store: Any, index: sqlite3.Connection, names: _Names) -> None:
    """Record the types that every property joins, from SAMPLE statements, so that properties can be proposed for types."""
    rdf = library()
    counted = store.query("SELECT ?p (COUNT(*) AS ?n) WHERE { ?s ?p ?o } GROUP BY ?p")
    skipped = {*LABELS, *ALIASES, *DESCRIPTIONS, SENTENCE, *TYPING, *SUBCLASS}
    total = {row["p"].value: int(row["n"].value) for row in counted}

    def types(node: Any) -> list[str]:
        return [quad.object.value for predicate in TYPING
                for quad in store.quads_for_pattern(node, rdf.NamedNode(predicate), None)
                if isinstance(quad.object, rdf.NamedNode)]

    for predicate in sorted(set(total) - skipped):
        number = names.number(predicate, "property")
        pairs: dict[tuple[str, str], int] = {}
        read = 0
        for quad in store.quads_for_pattern(None, rdf.NamedNode(predicate), None):
            if read >= SAMPLE:
                break
            read += 1
            if isinstance(quad.subject, rdf.NamedNode):
                things = types(quad.object) if isinstance(quad.object, rdf.NamedNode) else [""]
                for pair in ((subject, thing) for subject in types(quad.subject) for thing in things):
                    pairs[pair] = pairs.get(pair, 0) + 1
        index.executemany("INSERT INTO signature (property, subject, object, count) VALUES (?, ?, ?, ?)",
                          [(number, *pair, count * total[predicate] // max(read, 1))
                           for pair, count in sorted(pairs.items())])


# -- label files ------------------------------------------------------------------------------------------------------

def full_address(name: str) -> tuple[str, str]:
    """(address, kind) of an identifier: Q42 and P31 are Wikidata's, anything else stays as it is."""
    if re.fullmatch(r"Q\d+", name):
        return f"{_WIKIDATA}entity/{name}", "entity"
    if re.fullmatch(r"P\d+", name):
        return f"{_WIKIDATA}prop/direct/{name}", "property"
    return name, "entity"


def _labels_of_file(path: Path, names: _Names, *, strict: bool) -> list[str]:
    """Add the labels of a file; returns sentences about what could not be read."""
    kind = suffix_of(path)
    if kind not in _READERS:
        raise TablesError(f"{path.name} is not a graph of a known kind: RDF ends in {', '.join(SUFFIXES)}, label files "
                          "in .json, .jsonl, .csv or .tsv (each also with .gz)")
    skipped = Skipped(path, f"{kind[1:].upper()} of labels", TablesError, strict=strict)
    for identifier, labels, description, given in _READERS[kind](path, skipped):
        skipped.read += 1
        iri, usual = full_address(identifier)
        for place, text in enumerate(labels):
            names.add(iri, text, alias=place > 0, rank=place, kind=given or (usual if usual != "entity" else None))
        if description:
            names.add_text("description", iri, description)
    skipped.judge()
    return skipped.notes


Entry = tuple[str, list[str], str, str | None]
"""Identifier, labels, description, kind."""


def _of_json(path: Path, skipped: Skipped) -> Iterator[Entry]:
    with opened(path, TablesError) as file:
        text = "\n".join(line for _, line in utf8_lines(file, path.name, TablesError))
    content = parse_json(text, path.name, TablesError)
    if not isinstance(content, dict):
        raise TablesError(f"{path.name} holds a {type(content).__name__}; a label file maps identifiers to labels, "
                          'such as {"Q5": "human"}')
    for identifier, value in content.items():
        try:
            yield _entry(identifier, value)
        except TablesError as error:
            skipped.add(0, error)


def _of_json_lines(path: Path, skipped: Skipped) -> Iterator[Entry]:
    with opened(path, TablesError) as file:
        for number, line in utf8_lines(file, path.name, TablesError):
            if not line.strip():
                continue
            try:
                value = parse_json(line, "the line", TablesError)
                if not isinstance(value, dict) or "id" not in value:
                    raise TablesError(f'no object with an id: {quoted(value)}; each line takes {{"id": "Q5", "label": '
                                      '"human"}')
                yield _entry(str(value["id"]), value)
            except TablesError as error:
                skipped.add(number, error)


def _of_rows(path: Path, skipped: Skipped) -> Iterator[Entry]:
    with opened(path, TablesError) as file:
        lines = (f"{line}\n" for _, line in utf8_lines(file, path.name, TablesError))
        rows = csv_rows(lines, path.name, TablesError, delimiter="," if suffix_of(path) == ".csv" else "\t",
                        longest=LONGEST_CELL)
        for place, (number, row) in enumerate(rows):
            if not any(row) or (place == 0 and row[0].strip().lower() in ("id", "entity", "uri", "iri", "qid")):
                continue
            if len(row) < 2 or not row[0].strip() or not row[1].strip():
                skipped.add(number, f"{quoted(','.join(row))}; each line takes an identifier, a label and optionally a "
                                    "description")
                continue
            yield row[0].strip(), [row[1].strip()], row[2].strip() if len(row) > 2 else "", None


_READERS: dict[str, Callable[[Path, Skipped], Iterator[Entry]]] = {
    ".json": _of_json, ".jsonl": _of_json_lines, ".csv": _of_rows, ".tsv": _of_rows, ".txt": _of_rows}


def _entry(identifier: str, value: object) -> Entry:
    if isinstance(value, str):
        return identifier, [value], "", None
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        return identifier, value, "", None
    if isinstance(value, dict) and isinstance(value.get("label"), str):
        aliases = value.get("aliases", [])
        listed = aliases if isinstance(aliases, list) else [aliases]
        if all(isinstance(alias, str) for alias in listed):
            return identifier, [value["label"], *listed], str(value.get("description") or ""), \
                "property" if value.get("kind") == "property" else None
    raise TablesError(f"the entry of {quoted(identifier)} is {quoted(value)}; it takes a label, a list of labels, or "
                      '{"label": ..., "aliases": [...], "description": ...}')
