"""A graph on disk: what is loaded, what is found in it, and what is said when it does not parse."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from tsotsallm.errors import TablesError
from tsotsallm.lab.graph import slip, world_turtle
from tsotsallm.lab.world import build_world
from tsotsallm.tables.graph import Graph, Label, open_graph
from tsotsallm.tables.lookup import Lookup, naive

TURTLE = """@prefix : <http://x/> .
@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .
@prefix skos: <http://www.w3.org/2004/02/skos/core#> .
:City a <http://www.w3.org/2002/07/owl#Class> ; rdfs:label "city"@en ; rdfs:subClassOf :Place .
:Place a rdfs:Class .
:in a <http://www.w3.org/2002/07/owl#ObjectProperty> ; rdfs:label "lies in" .
:rome a :City ; rdfs:label "Rome"@en, "Roma"@it, "Рим"@ru ; skos:altLabel "the Eternal City" ; :in :italy ; :people 2873000 .
:paris a :City ; rdfs:label "Paris"@en ; :in :france ; :twin :rome .
:texas a :City ; rdfs:label "Paris"@en ; :in :usa .
:italy rdfs:label "Italy"@en, "Italie"@fr .
:france rdfs:label "France"@en .
:usa rdfs:label "United States"@en .
"""


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return made(tmp_path, TURTLE)


def made(folder: Path, text: str, name: str = "small.ttl") -> Graph:
    path = folder / name
    path.write_text(text, "utf-8")
    return open_graph([path], folder / "graphs")


def test_what_a_graph_says(graph: Graph) -> None:
    said = graph.statements("http://x/rome")
    assert said.entities == {"http://x/italy": ("http://x/in",)}
    assert said.literals == (("http://x/people", "2873000"),)
    assert said.ancestors == {"http://x/City": 0, "http://x/Place": 1}
    assert graph.label("http://x/rome") == "Rome"
    assert graph.label("http://x/nowhere_else") == "nowhere else"
    assert graph.children("http://x/Place") == ("http://x/City",)
    assert graph.sentences("http://x/in") == ("{s} lies in {o}.",)
    assert graph.properties_between(frozenset({"http://x/City"}), None) == {"http://x/people": 1}
    assert graph.properties_between(frozenset({"http://x/City"}), frozenset({"http://x/City"})) == {"http://x/twin": 1}


@pytest.mark.parametrize(("text", "entity", "how"), [
    ("Rome", "rome", "exact"), ("ROME ", "rome", "normalised"), ("Roma", "rome", "exact"), ("рим", "rome", "normalised"),
    ("the eternal city", "rome", "alias"), ("Itlay", "italy", "typo"), ("Untied States", "usa", "typo"),
    ("Italie", "italy", "exact")])
def test_names_are_found(graph: Graph, text: str, entity: str, how: str) -> None:
    best = Lookup(graph).find(text)[0]
    assert (best.entity, best.how) == (f"http://x/{entity}", how)


def test_equal_names_classes_properties_and_literals(graph: Graph) -> None:
    find = Lookup(graph).find
    assert {one.entity for one in find("Paris")} == {"http://x/paris", "http://x/texas"}
    assert "http://x/City" not in {one.entity for one in find("city")}
    assert not find("lies in")                    # a property
    assert not find("2873000")
    assert not find("")
    assert not find("Wagadugu")


def test_typos_are_found_as_by_comparing_with_every_label(tmp_path: Path) -> None:
    graph, rng = made(tmp_path, world_turtle()), random.Random(3)
    rows = graph.labels.execute("SELECT e.iri, l.text, l.alias FROM label l JOIN entity e ON e.id = l.entity "
                                "WHERE e.kind = 'entity'").fetchall()
    labels = [Label(iri, text, bool(alias)) for iri, text, alias in rows]
    lookup, same, best = Lookup(graph), 0, 0
    texts = [slip(person.term.en, rng) for person in rng.sample(build_world().people, 60)]
    for text in texts:
        slow, fast = naive(labels, text, 20), [(one.entity, one.score) for one in lookup.find(text)]
        best += bool(slow) and bool(fast) and slow[0][1] == fast[0][1]
        same += {one for one, score in slow if score >= 0.8} <= {one for one, _ in fast}
    assert best == len(texts)                     # nothing better is overlooked
    assert same >= 0.95 * len(texts)


def test_a_graph_is_loaded_once(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tmp_path / "small.ttl"
    path.write_text(TURTLE, "utf-8")
    first = open_graph([path], tmp_path / "graphs", lines.append)
    said = len(lines)
    again = open_graph([path], tmp_path / "graphs", lines.append)
    assert len(lines) == said
    assert first.folder == again.folder
    path.write_text(TURTLE + ":oslo rdfs:label 'Oslo' .\n", "utf-8")
    other = open_graph([path], tmp_path / "graphs", lines.append)
    assert other.folder != first.folder
    assert Lookup(other).find("Oslo")
    assert not list((tmp_path / "graphs").glob("*.partial"))


@pytest.mark.parametrize(("name", "text", "message"), [
    ("bad.ttl", "@prefix : <http://x/> .\n:a :b :c .\n:a :b \n", "bad.ttl, line [34] is not valid Turtle"),
    ("bad.nt", "<http://x/a> <http://x/b> <http://x/c> .\n<http://x/a> oops .\n", "bad.nt, line 2 is not valid N-Triples"),
    ("bad.owl", "<rdf:RDF", "bad.owl, line"), ("empty.ttl", "", "holds no statement"),
    ("bad.json", '{"Q1": "a",\n}', "bad.json, line [12] is not valid JSON"), ("bad2.json", "[1]", "holds a list"),
    ("bad3.json", '{"Q1": 7}', "the entry of 'Q1' is '7'"), ("bad.csv", "Q1,a\nQ2\n", "bad.csv, line 2 is 'Q2'"),
    ("bad.jsonl", '{"label": "a"}\n', "bad.jsonl, line 1 is no JSON object with an id"),
    ("graph.docx", "x", "is no kind of graph that is known")])
def test_what_does_not_parse_says_where(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(TablesError, match=message):
        made(tmp_path, text, name)
    assert not list((tmp_path / "graphs").glob("graph-*"))


def test_a_graph_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TablesError, match="does not exist; give a graph as RDF"):
        open_graph([tmp_path / "none.ttl"], tmp_path)


def test_other_formats(tmp_path: Path) -> None:
    statement = '<http://x/a> <http://www.w3.org/2000/01/rdf-schema#label> "Abc" <http://x/g> .\n'
    assert Lookup(made(tmp_path, statement, "a.nq")).find("abc")
    (tmp_path / "b.nt.gz").write_bytes(gzip.compress(statement.replace(" <http://x/g>", "").encode()))
    assert Lookup(open_graph([tmp_path / "b.nt.gz"], tmp_path / "graphs")).find("abc")
    owl = ('<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:rdfs="http://www.w3.org/2000/01/rdf-schema#">'
           '<rdf:Description rdf:about="http://x/a"><rdfs:label>Abc</rdfs:label></rdf:Description></rdf:RDF>')
    assert Lookup(made(tmp_path, owl, "a.owl")).find("abc")


@pytest.mark.parametrize(("name", "text"), [
    ("labels.json", json.dumps({"Q42": ["Douglas Adams", "Adams"], "P31": {"label": "instance of", "description": "kind"}})),
    ("labels.jsonl", '{"id": "Q42", "label": "Douglas Adams", "aliases": ["Adams"]}\n'),
    ("labels.csv", "id,label\nQ42,Douglas Adams\nQ42,Adams\n"), ("labels.tsv", "Q42\tDouglas Adams\tauthor\n")])
def test_label_files(tmp_path: Path, name: str, text: str) -> None:
    graph = made(tmp_path, text, name)
    assert Lookup(graph).find("douglas adams")[0].entity == "http://www.wikidata.org/entity/Q42"
    assert "labels alone" in graph.facts["notes"][0]
    assert not Lookup(graph).find("instance of")


def test_a_graph_without_labels_is_known_by_its_addresses(tmp_path: Path) -> None:
    graph = made(tmp_path, "<http://x/New_York> <http://x/in> <http://x/USA> .\n", "a.nt")
    assert Lookup(graph).find("new york")[0].entity == "http://x/New_York"
    assert "no labels" in graph.facts["notes"][0]
