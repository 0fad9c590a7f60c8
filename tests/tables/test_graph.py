"""A graph on disk: what is loaded, what is found in it, and what is said when it does not parse."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest

from tests.tables.towns import TURTLE, dump, made
from tsotsallm.errors import TablesError
from tsotsallm.lab.graph import slip, world_turtle
from tsotsallm.lab.world import build_world
from tsotsallm.tables.graph import Graph, Label, open_graph
from tsotsallm.tables.lookup import Lookup, naive


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    return made(tmp_path, TURTLE)


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
    ("bad.json", '{"Q1": "a",\n}', r"bad.json is not valid JSON \(.*line [12]"), ("bad2.json", "[1]", "holds a list"),
    ("bad3.json", '{"Q1": 7}', "the entry of 'Q1' is 7"), ("bad.csv", "Q1,a\nQ2\n", "bad.csv, line 2 is .*'Q2'"),
    ("bad.jsonl", '{"label": "a"}\n', "bad.jsonl, line 1 is .*no object with an id"),
    ("half.jsonl", '{"id": "Q1", "label": "\\ud800"}\n', "half.jsonl, line 1 .* half of a surrogate pair"),
    ("half.json", '{"Q1": "\\ud800"}', "half.json holds half of a surrogate pair"),
    ("half.nt", '<http://x/a> <http://x/b> "\\ud800" .\n', "half.nt, line 1 is not valid N-Triples"),
    ("quote.csv", 'Q1,"' + "a" * 200_000, "quote.csv, line 1 has a cell of 200001 characters, .*quotation mark"),
    ("graph.docx", "x", "is not a graph of a known kind")])
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


@pytest.mark.parametrize(("name", "content"), [
    ("mark.ttl", b"\xef\xbb\xbf" + TURTLE.encode()),
    ("mark.nt", b'\xef\xbb\xbf<http://x/a> <http://www.w3.org/2000/01/rdf-schema#label> "Rome" .\n'),
    ("mark.json", b'\xef\xbb\xbf{"Q1": "Rome"}'), ("mark.jsonl", b'\xef\xbb\xbf{"id": "Q1", "label": "Rome"}\r\n'),
    ("mark.csv", b"\xef\xbb\xbfQ1,Rome\r\n"), ("a 100% #1.ttl", TURTLE.encode())])
def test_marks_and_strange_names_are_no_faults(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    found = open_graph([tmp_path / name], tmp_path / "a folder, 50% #2?")
    assert [one.name for one in Lookup(found).find("Rome")] == ["Rome"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c"])
def test_separators_inside_labels_are_no_line_ends(tmp_path: Path, mark: str) -> None:
    line = json.dumps({"id": "Q1", "label": f"New{mark}York"}, ensure_ascii=False)
    for name, text in (("a.jsonl", f"{line}\n"), ("a.csv", f"Q1,New{mark}York\n"), ("a.tsv", f"Q1\tNew{mark}York\n")):
        assert made(tmp_path, text, name).facts["labels"] == 1


def test_a_bad_statement_is_skipped_and_noted(tmp_path: Path) -> None:
    text = dump(1000, '<http://x/a b> <http://www.w3.org/2000/01/rdf-schema#label> "lost" .', "<http://x/a> oops .")
    graph = made(tmp_path, text, "dump.nt")
    assert graph.facts["statements"] == 1000
    assert graph.facts["notes"][:2] == ["dump.nt: 2 of 1,002 statements are not valid N-Triples and were skipped:",
                                        "dump.nt, line 5: Invalid IRI code point ' '"]
    assert graph.facts["notes"][2].startswith("dump.nt, line 15: ")
    assert not Lookup(graph).find("lost")


@pytest.mark.parametrize("loaded_before", [False, True])
def test_strict_refuses_the_first_bad_statement(tmp_path: Path, loaded_before: bool) -> None:
    (tmp_path / "dump.nt").write_text(dump(1000, "<http://x/a> oops ."), "utf-8")
    if loaded_before:
        open_graph([tmp_path / "dump.nt"], tmp_path / "graphs").close()
    with pytest.raises(TablesError, match=r"line 5.*leave out strict"):
        open_graph([tmp_path / "dump.nt"], tmp_path / "graphs", strict=True)


@pytest.mark.parametrize(("bad", "refused"), [(10, False), (11, True)])
def test_more_than_a_hundredth_is_too_much(tmp_path: Path, bad: int, refused: bool) -> None:
    text = dump(990, *["<http://x/a b> <http://x/c> <http://x/d> ."] * bad)
    if refused:
        with pytest.raises(TablesError, match=r"line 5 is not valid N-Triples .*; 11 of 1,001 .* more than the 1%"):
            made(tmp_path, text, "dump.nt")
    else:
        assert len(made(tmp_path, text, "dump.nt").facts["skipped"]) == 11


def test_bad_rows_of_label_files_are_skipped_too(tmp_path: Path) -> None:
    rows = [f"Q{number},thing {number}" for number in range(200)]
    graph = made(tmp_path, "\n".join([*rows[:7], "Q7", *rows[8:]]), "labels.csv")
    assert graph.facts["skipped"] == ["labels.csv: 1 of 200 statements are not valid CSV of labels and were skipped:",
                                      "labels.csv, line 8: 'Q7'; each line takes an identifier, a label and optionally a "
                                      "description"]
