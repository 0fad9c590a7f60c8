"""Faulty RDF: what is read is exactly what the file says apart from the faulty statements, with true lines."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import Any

import pyoxigraph
import pytest

from tsotsallm.errors import TablesError
from tsotsallm.lab.graph import world_turtle
from tsotsallm.rdf import BLOCK, Statements

BAD = {
    "space": "<http://x/a b>", "hash": "<http://x/a#b#c>", "percent": "<http://x/50%>", "quote": '<http://x/a"b>',
    "brace": "<http://x/{a}>", "bar": "<http://x/a|b>", "backslash": "<http://x/a\\b>", "caret": "<http://x/^>",
    "escaped space": "<http://x/\\u0020>", "language": '"x"@zh-classical', "no language": '"x"@', "hyphen": '"x"@en-',
    "language string": '"x"^^<http://www.w3.org/1999/02/22-rdf-syntax-ns#langString>', "escape": '"a \\q"',
    "half": '"\\uD800"', "open string": '"open', "open string, then more": '"open , "b', "open address": "<http://x/a",
    "bytes": '"\udcff"', "nothing": "", "two": '"a" "b"', "type": '"2"^^<xsd int>'}
LABEL = "<http://www.w3.org/2000/01/rdf-schema#label>"


def good(number: int) -> str:
    return f'<http://x/good{number}> {LABEL} "v{number}. It\'s <b> # \\" good"@en .\n'


def statements(folder: Path, text: str, name: str, *, strict: bool = False) -> tuple[list[Any], Statements]:
    path = folder / name
    content = text.encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = Statements(path, TablesError, "tables", strict=strict)
    return list(found), found


@pytest.mark.parametrize(("name", "bad"), [
    (name, bad) for bad in BAD for name in ("a.nt", "a.nq", "a.ttl", "a.trig", "a.n3", "a.nt.gz")
    if (name, bad) != ("a.n3", "language string")])       # N3 has no such rule
def test_only_the_bad_statement_is_lost(tmp_path: Path, name: str, bad: str) -> None:
    lines = [good(number) for number in range(300)]
    lines.insert(200, f"<http://x/bad> <http://x/p> {BAD[bad]} .\n")
    quads, found = statements(tmp_path, "".join(lines), name)
    assert [quad.subject.value for quad in quads] == [f"http://x/good{number}" for number in range(300)]
    assert found.skipped.count == 1
    assert found.skipped.notes[1].startswith(f"{name}, line 201: ")
    with pytest.raises(TablesError, match=f"{name}, line 201 is not valid"):
        statements(tmp_path, "".join(lines), name, strict=True)


def test_what_a_block_of_turtle_says_beside_its_fault_is_kept(tmp_path: Path) -> None:
    """Prefixes in both notations, comments, long strings, lists, numbers with dots, names with dots, several lines."""
    text = """PREFIX : <http://x/>
@prefix r: <http://www.w3.org/2000/01/rdf-schema#> . # . a comment " with marks <
@base <http://y/> .
:a r:label "A"@en, "B"@zh-classical,
   "C"@fr ;      # . and more
   :p <http://x/b d> ; :q 5.5 , .5, -1.e3, 5.
:b.c :p \"\"\"long . text
 with "quotes" . and <http://x> \"\"\" , 'it' .
:d :p ( :a "x"@en <z> ) , [ :q <bad iri> ; :r 5 ] , [ :q :ok ] ; a :D.
[] :s <http://x/50%> ; :t :u .
<e>:p<f>.<g>:p"h"@en.
"""
    quads, found = statements(tmp_path, text + "".join(map(good, range(700))), "a.ttl")
    said = [f"{quad.subject} {quad.predicate.value.rpartition('/')[2]} {quad.object}" for quad in quads[:-700]
            if not isinstance(quad.subject, pyoxigraph.BlankNode) and not isinstance(quad.object, pyoxigraph.BlankNode)]
    number = "^^<http://www.w3.org/2001/XMLSchema#"
    assert said == [
        '<http://x/a> rdf-schema#label "A"@en', '<http://x/a> rdf-schema#label "C"@fr',
        f'<http://x/a> q "5.5"{number}decimal>', f'<http://x/a> q ".5"{number}decimal>',
        f'<http://x/a> q "-1.e3"{number}double>', f'<http://x/a> q "5"{number}integer>',
        '<http://x/b.c> p "long . text\\n with \\"quotes\\" . and <http://x> "', '<http://x/b.c> p "it"',
        "<http://x/d> 22-rdf-syntax-ns#type <http://x/D>", "<http://y/e> p <http://y/f>", '<http://y/g> p "h"@en']
    assert [note.partition(":")[0] for note in found.skipped.notes[1:]] == [
        f"a.ttl, line {line}" for line in (4, 6, 9, 10)]
    assert sum(isinstance(quad.object, pyoxigraph.BlankNode) for quad in quads) == 4        # a list, and [ :q :ok ]


@pytest.mark.parametrize("text", [
    ':a :comment "First line\nsecond :x , :y ; 1990 , 1991 .\nthird" ; :label "L" .\n',
    ":a :b :c\n:d :e :f ; :g :h .\n", ":a :b :c :d ; :g :h .\n", ":a :b ; :c , :d .\n", ":a :b [ :c :d ; :e :f .\n",
    ":a :b :c ] ; :g :h .\n", ':a :b "x ; :c "y" , :d .\n', ":a :b <http://x/y ; :c :d , :e .\n", ":a ( :b :c :d .\n"])
def test_nothing_is_read_that_was_not_said(tmp_path: Path, text: str) -> None:
    """After an open quotation mark prose looks like statements, after a missing dot predicates belong to another subject."""
    prefix = "@prefix : <http://x/> .\n"
    quads, found = statements(tmp_path, prefix + text + "".join(map(good, range(700))), "a.ttl")
    assert len(quads) == 700
    assert 1 <= found.skipped.count <= 3
    assert found.skipped.notes[1].startswith("a.ttl, line ")


def test_graphs_of_trig_are_kept_and_left(tmp_path: Path) -> None:
    text = ("@prefix : <http://x/> .\n:g { :a :b <http://x y> . :c :d :e }\n{ :h :i :j . }\nGRAPH :k {\n"
            ':l :m "n"@zh-classical ; :o :p\n}\n:q :r :s .\n')
    quads, found = statements(tmp_path, text + "".join(map(good, range(300))), "a.trig")
    assert [(str(quad.graph_name), quad.subject.value[-1], quad.predicate.value[-1]) for quad in quads[:-300]] == [
        ("<http://x/g>", "c", "d"), ("DEFAULT", "h", "i"), ("<http://x/k>", "l", "o"), ("DEFAULT", "q", "r")]
    assert [note.partition(":")[0] for note in found.skipped.notes[1:]] == ["a.trig, line 2", "a.trig, line 5"]


RDF_XML = """<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:x="http://x/">
<rdf:Description rdf:about="http://x/a b"><x:l>lost</x:l><x:m>lost</x:m></rdf:Description>
<rdf:Description rdf:about="http://x/c"><x:l xml:lang="zh-classical">lost</x:l><x:l>kept</x:l>
  <x:p rdf:resource="http://x/50%"/><x:p rdf:resource="http://x/y?a&amp;b c"/><x:l xml:lang="fr">kept too</x:l>
  </rdf:Description>
"""


def test_rdf_xml_keeps_what_is_valid_and_nothing_else(tmp_path: Path) -> None:
    """The strict parser would go on with types and blank nodes that the file does not have."""
    rest = "".join(f'<rdf:Description rdf:about="http://x/g{number}"><x:l>v</x:l></rdf:Description>\n'
                   for number in range(600))
    quads, found = statements(tmp_path, f"\ufeff{RDF_XML}{rest}</rdf:RDF>", "a.owl")
    assert [str(quad.object) for quad in quads[:2]] == ['"kept"', '"kept too"@fr']
    assert len(quads) == 602
    assert found.skipped.notes == [
        "a.owl: 5 of 607 statements are not valid RDF/XML and were skipped:",
        "a.owl, line 2: Invalid IRI code point ' ' in 'http://x/a b'",
        "a.owl, line 3: A subtag may be eight characters in length at maximum in 'zh-classical'",
        "a.owl, line 4: Invalid IRI percent encoding '%' in 'http://x/50%'",
        "a.owl, line 4: Invalid IRI code point ' ' in 'http://x/y?a&b c'"]
    with pytest.raises(TablesError, match="line 2 is not valid RDF/XML"):
        statements(tmp_path, f"{RDF_XML}{rest}</rdf:RDF>", "a.owl", strict=True)
    with pytest.raises(TablesError, match=r"a.owl, line 606 is not valid RDF/XML \(mismatched tag\), and nothing after it"):
        statements(tmp_path, f"{RDF_XML}{rest}<x:l></rdf:RDF>", "a.owl")


def sorted_quads(quads: Any) -> list[str]:
    return sorted(str(quad) for quad in quads)


@pytest.mark.parametrize("size", [64, 1000, BLOCK])
def test_blocks_of_any_size_say_the_same(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may end within a comment, a string, a list; the faults then have the same lines."""
    monkeypatch.setattr("tsotsallm.rdf.BLOCK", size)
    tricky = ":t :p \"\"\"a .\n:x :y :z .\n b\"\"\" , 'c .' ; # d .\n :q [ :r :s ;\n :t 1.5 ] .\n"
    world = world_turtle()
    text = f"{world}\n@prefix : <http://x/> .\n{tricky * 3}"
    whole = [str(quad) for quad in pyoxigraph.parse(input=text.encode(), format=pyoxigraph.RdfFormat.TURTLE)]
    quads, found = statements(tmp_path, text, "a.ttl")
    assert len(quads) == len(whole)
    assert sorted(one for one in whole if "_:" not in one and "BlankNode" not in one) == [
        one for one in sorted_quads(quads) if "_:" not in one and "BlankNode" not in one]
    assert not found.skipped.notes
    quads, found = statements(tmp_path, text.replace("'c .'", "'c .'@zh-classical", 1), "a.ttl")
    assert (len(quads), found.skipped.count) == (len(whole) - 1, 1)
    assert found.skipped.notes[1].startswith(f"a.ttl, line {world.count(chr(10)) + 5}: ")


def test_faults_anywhere_lose_themselves_and_add_nothing(tmp_path: Path) -> None:
    """Random statements with random damage: all quads are of the undamaged file, those of other statements all there."""
    for seed in range(40):
        rng = random.Random(seed)
        blocks = []
        for number in range(150):
            objects = [rng.choice([f":o{number}", f'"text {number}. <a> # b"@en', f'"""long\n. {number}"""', "[ :i :j ]",
                                   "( :x :y )", f"{number}.5", f"<http://x/{number}#f>", f'"{number}"^^:t'])
                       for _ in range(4)]
            blocks.append(f":s{number} :p {objects[0]} , {objects[1]} ;{rng.choice([' ', chr(10)])}:q {objects[2]} ;"
                          f" # note . {number}\n :r {objects[3]} .\n")
        damaged = rng.sample(range(150), 3)
        prefix = "@prefix : <http://x/> .\n"
        reference = {str(quad) for quad in pyoxigraph.parse(input=(prefix + "".join(blocks)).encode(),
                                                            format=pyoxigraph.RdfFormat.TURTLE)}
        for place in damaged:
            cut = rng.randrange(len(blocks[place]) - 8)
            while '"""' in blocks[place][max(cut - 3, 0):cut + 6]:      # a long string that ends elsewhere is another one
                cut = rng.randrange(len(blocks[place]) - 8)
            end = cut + rng.choice([0, 0, 1, 3])
            blocks[place] = blocks[place][:cut] + rng.choice(['"', "<", " ", "@zh-classical", ";", ",", "[", "%", "'", ""]) \
                + blocks[place][end:]
        path = tmp_path / "a.ttl"
        path.write_text(prefix + "".join(blocks), "utf-8")
        found = Statements(path, TablesError, "tables")
        quads: list[Any] = []
        refused = ""
        try:
            quads.extend(found)
        except TablesError as error:
            refused = str(error)
        lost = {f"<http://x/s{number}>" for place in damaged for number in (place, place + 1)}
        kept = {one for one in map(str, quads) if "_:" not in one}
        expected = {one for one in reference if "_:" not in one}
        missing = {one for one in expected - kept if one.split()[0] not in lost}
        assert not missing or "more than the 1%" in refused, seed       # where a fault hides that a long string begins
        strange = {one for one in kept - expected if not one.startswith("<http://x/")}
        assert not strange, (seed, strange)


@pytest.mark.parametrize(("content", "message"), [
    ("<http://x/a> <http://x/b> <http://x/c> .\n".encode("utf-16"), "is UTF-16, but RDF is written in UTF-8"),
    (b"\x1f\x8b\x08", "cannot be unpacked"), (b"x" * 5000, "is not valid N-Triples"),
    (b"<http://x/a> <http://x/b> \"\xe9\" .\n", "line 1 is not valid N-Triples .Invalid UTF-8")])
def test_what_is_no_graph_says_so(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / ("a.nt.gz" if content.startswith(b"\x1f") else "a.nt")
    path.write_bytes(content)
    with pytest.raises(TablesError, match=message):
        list(Statements(path, TablesError, "tables"))


def test_a_statement_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsotsallm.rdf.LONGEST", 1 << 16)
    monkeypatch.setattr("tsotsallm.rdf.BLOCK", 1 << 12)
    for name, text in (("a.nt", "x" * 200_000), ("a.ttl", ":a :b :c ; " * 20_000), ("b.ttl", '"""' + "x" * 200_000)):
        with pytest.raises(TablesError, match="line 1 begins a statement of more than"):
            statements(tmp_path, text, name)
