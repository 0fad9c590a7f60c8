"""A graph of a few towns, and graphs written to files and opened."""

from __future__ import annotations

from pathlib import Path

from tsotsallm.tables.graph import Graph, open_graph

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


def made(folder: Path, text: str, name: str = "small.ttl") -> Graph:
    path = folder / name
    path.write_text(text, "utf-8")
    return open_graph([path], folder / "graphs")


def dump(statements: int, *bad: str) -> str:
    lines = [f'<http://x/e{number}> <http://www.w3.org/2000/01/rdf-schema#label> "thing {number}" .\n'
             for number in range(statements)]
    for place, line in enumerate(bad):
        lines.insert(10 * place + 4, line + "\n")
    return "".join(lines)
