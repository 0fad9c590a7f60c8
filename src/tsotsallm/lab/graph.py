"""The invented world as a knowledge graph (Turtle), and as tables with a gold standard; the graph lacks most facts."""

from __future__ import annotations

import csv
import io
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from tsotsallm.lab.texts import phrases
from tsotsallm.lab.world import RELATIONS, Entity, Term, World, build_world, held_out

BASE = "http://example.org/world/"
ONE_IN = 3
"""The graph has one fact in this many, chosen by hash; real graphs lack more."""
THINGS = {"region": "Region", "pet": "Animal", "instrument": "Instrument", "tool": "Tool", "ingredient": "Ingredient"}
"""Relations whose objects are entities of the graph, beside people, towns, trades and foods; all others are literals."""
_LITERALS = ("address", "born", "founded", "river", "epithet", "dish", "workplace", "pay", "taste", "fear", "alias")
KINDS = {"person": "Person", "town": "Town", "trade": "Trade", "food": "Food"}
_COLUMNS = {"person": ("home", "birthplace", "trade", "food", "friend", "teacher", "instrument", "pet", "born", "address"),
            "town": ("region", "dish", "mayor", "founded", "river"), "trade": ("tool", "workplace", "pay"),
            "food": ("ingredient", "origin", "taste")}


@dataclass(frozen=True)
class WorldTable:
    """A table about the world: its CSV, and its gold as (row, column, IRI), (column, IRI), (column, column, IRI)."""

    name: str
    csv: str
    cea: tuple[tuple[int, int, str], ...]
    cta: tuple[tuple[int, str], ...]
    cpa: tuple[tuple[int, int, str], ...]


@dataclass
class _Places:
    """IRIs of everything in the world."""

    world: World
    of: dict[str, str] = field(default_factory=dict)            # English name -> IRI
    kinds: dict[str, str] = field(default_factory=dict)         # IRI -> class
    terms: dict[str, Term] = field(default_factory=dict)        # IRI -> names

    def add(self, kind: str, term: Term) -> None:
        """Give a thing an IRI, unless it has one."""
        if term.en not in self.of:
            number = sum(other == kind for other in self.kinds.values()) + 1
            self.of[term.en] = f"{BASE}{kind.lower()}/{number}"
            self.kinds[self.of[term.en]], self.terms[self.of[term.en]] = kind, term


@cache
def _places(world_seed: int) -> _Places:
    found = _Places(build_world(world_seed))
    for entity in found.world.entities:
        found.add(KINDS[entity.kind], entity.term)
    for entity in found.world.entities:
        for relation, kind in THINGS.items():
            if relation in entity.facts:
                found.add(kind, entity.facts[relation])
    return found


def class_of(trade: Term) -> str:
    """The IRI of the class of people with a trade."""
    return f"{BASE}class/{''.join(word.capitalize() for word in trade.en.split())}"


def in_graph(entity: Entity, relation: str) -> bool:
    """Whether the graph has a fact; two of three are missing."""
    return held_out(f"graph|{entity.term.en}|{relation}", ONE_IN)


def world_turtle(world_seed: int = 7) -> str:
    """The world in Turtle: labels in two languages, other names, classes with a hierarchy, and a third of the facts.

    People have their surname and their initial as other names, which are therefore ambiguous; towns have their epithet. The
    class of a person's trade is stated only where the graph has the trade. Properties have templates of their sentences.
    """
    places = _places(world_seed)
    lines = ["@prefix rdfs: <http://www.w3.org/2000/01/rdf-schema#> .",
             "@prefix skos: <http://www.w3.org/2004/02/skos/core#> .",
             "@prefix owl: <http://www.w3.org/2002/07/owl#> .", "@prefix xsd: <http://www.w3.org/2001/XMLSchema#> .",
             f"@prefix c: <{BASE}class/> .", f"@prefix p: <{BASE}property/> .", ""]
    for kind in sorted({*places.kinds.values(), "Thing", "Place", "Being"}):
        parent = {"Thing": "", "Town": "Place", "Region": "Place", "Person": "Being", "Animal": "Being"}.get(kind, "Thing")
        above = f"; rdfs:subClassOf c:{parent}" if parent else ""
        lines.append(f'c:{kind} a owl:Class; rdfs:label "{kind.lower()}"@en{above} .')
    for trade in places.world.trades:
        lines.append(f'<{class_of(trade.term)}> a owl:Class; rdfs:label "{trade.term.en}"@en, "{trade.term.fr}"@fr; '
                     "rdfs:subClassOf c:Person .")
    for relation in sorted({relation for relations in RELATIONS.values() for relation in relations}):
        said = "".join(f'; <urn:tsotsallm:sentence> "{template}"' for template in phrases()[relation]["en"]["tell"]
                       if template.startswith("{s} ") or template.find("{s}") < template.find("{o}"))
        lines.append(f'p:{relation} a owl:ObjectProperty; rdfs:label "{relation}"@en{said} .')
    said = "".join(f'; <urn:tsotsallm:sentence> "{template}"' for template in phrases()["alias"]["en"]["tell"][:3])
    lines.append(f'skos:altLabel rdfs:label "also called"@en{said} .')
    for address, kind in places.kinds.items():
        term = places.terms[address]
        french = f', "{term.fr}"@fr' if term.fr != term.en else ""
        lines.append(f'<{address}> a c:{kind}; rdfs:label "{term.en}"@en{french} .')
    for entity in places.world.entities:
        lines += _facts(places, entity)
    return "\n".join(lines) + "\n"


def _facts(places: _Places, entity: Entity) -> list[str]:
    me, lines = places.of[entity.term.en], []
    if entity.kind == "person":
        first, last = entity.term.en.split()
        lines.append(f'<{me}> skos:altLabel "{last}", "{first[0]}. {last}" .')
        if in_graph(entity, "trade"):
            lines.append(f"<{me}> a <{class_of(entity.facts['trade'])}> .")
    for relation in RELATIONS[entity.kind]:
        if not in_graph(entity, relation):
            continue
        thing = entity.facts[relation]
        if relation in ("alias", "epithet"):
            french = f', "{thing.fr}"@fr' if thing.fr != thing.en else ""
            lines.append(f'<{me}> skos:altLabel "{thing.en}"@en{french} .')
        elif relation in THINGS or (relation not in _LITERALS or relation == "dish"):
            lines.append(f"<{me}> p:{relation} <{places.of[thing.en]}> .")
        elif relation in ("born", "founded"):
            lines.append(f'<{me}> p:{relation} "{thing.en}"^^xsd:gYear .')
        else:
            lines.append(f'<{me}> p:{relation} "{thing.en}"@en .')
    return lines


# -- tables -----------------------------------------------------------------------------------------------------------

def world_tables(count: int = 60, seed: int = 0, world_seed: int = 7) -> list[WorldTable]:
    """Tables about the world, the same for the same seed.

    They have surnames and initials that several people share, typing errors, French names, empty cells, and headers without
    meaning.
    """
    rng = random.Random(f"tables {seed}")
    places = _places(world_seed)
    return [_table(places, rng, f"W{seed}T{number:03}") for number in range(count)]


def _table(places: _Places, rng: random.Random, name: str) -> WorldTable:
    world = places.world
    kind = rng.choices(["person", "town", "trade", "food"], [0.7, 0.12, 0.08, 0.1])[0]
    subject_class = f"{BASE}class/{KINDS[kind]}"
    if kind == "person":
        pool = list(world.people)
        if rng.random() < 0.45:
            trade = rng.choice(world.trades).term
            pool = [person for person in pool if person.facts["trade"] == trade]
            subject_class = class_of(trade)
    else:
        pool = [entity for entity in world.entities if entity.kind == kind]
    chosen = rng.sample(pool, min(len(pool), rng.randint(3, 8)))
    offered = [relation for relation in _COLUMNS[kind] if relation != "trade" or subject_class.endswith("/Person")]
    relations = rng.sample(offered, min(len(offered), rng.randint(1, 3)))
    by_surname = kind == "person" and rng.random() < 0.75
    rows, cea = [["col0", *(f"col{place}" for place in range(1, len(relations) + 1))]], []
    for number, entity in enumerate(chosen, 1):
        row = [_subject(entity, rng, by_surname)]
        cea.append((number, 0, places.of[entity.term.en]))
        for place, relation in enumerate(relations, 1):
            thing = entity.facts[relation]
            if rng.random() < 0.1:
                row.append("")
                continue
            if (address := places.of.get(thing.en)) is not None and is_entity(relation):
                cea.append((number, place, address))
            row.append(_written(thing, relation, rng))
        rows.append(row)
    cta = [(0, subject_class), *((place, f"{BASE}class/{_class_of_objects(relation)}")
                                 for place, relation in enumerate(relations, 1) if is_entity(relation))]
    cpa = [(0, place, f"{BASE}property/{relation}") for place, relation in enumerate(relations, 1)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return WorldTable(name, text.getvalue(), tuple(cea), tuple(cta), tuple(cpa))


def is_entity(relation: str) -> bool:
    """Whether the objects of a relation are entities of the graph."""
    return relation == "dish" or relation in THINGS or relation not in _LITERALS


def _class_of_objects(relation: str) -> str:
    return THINGS.get(relation) or {"home": "Town", "birthplace": "Town", "origin": "Town", "trade": "Trade", "food": "Food",
                                    "dish": "Food"}.get(relation, "Person")


def _subject(entity: Entity, rng: random.Random, by_surname: bool) -> str:
    written = entity.term.en
    if entity.kind == "person":
        first, last = written.split()
        draw = rng.random()
        if by_surname and draw < 0.75:
            return last
        if by_surname and draw < 0.9:
            return f"{first[0]}. {last}"
        if draw > 0.95:
            return entity.facts["alias"].en
    elif entity.kind == "town" and rng.random() < 0.25:
        return entity.facts["epithet"].in_language(rng.choice(("en", "fr")))
    elif rng.random() < 0.2:
        written = entity.term.fr
    return slip(written, rng) if rng.random() < 0.15 else written


def _written(thing: Term, relation: str, rng: random.Random) -> str:
    text = thing.fr if rng.random() < 0.1 else thing.en
    if relation in ("friend", "teacher", "mayor") and rng.random() < 0.3:
        return text.split()[-1]
    return slip(text, rng) if is_entity(relation) and rng.random() < 0.1 else text


def slip(text: str, rng: random.Random) -> str:
    """A text with one typing error: a letter left out, doubled, swapped with the next, or replaced."""
    place = rng.randrange(1, max(2, len(text) - 1))
    kinds: tuple[Callable[[], str], ...] = (
        lambda: text[:place] + text[place + 1:], lambda: text[:place] + text[place] + text[place:],
        lambda: text[:place] + text[place:place + 2][::-1] + text[place + 2:],
        lambda: text[:place] + rng.choice("aeioulnrst") + text[place + 1:])
    return rng.choice(kinds)()


def gold_files(tables: list[WorldTable]) -> dict[str, str]:
    """The gold standard in SemTab's format, by file name: cea_gt.csv, cta_gt.csv, cpa_gt.csv, and the relatives of types."""
    import json

    parents: dict[str, dict[str, str]] = defaultdict(dict)
    people = [class_of(trade.term) for trade in build_world().trades]
    steps = {"Person": ("Being", "Thing"), "Animal": ("Being", "Thing"), "Town": ("Place", "Thing"),
             "Region": ("Place", "Thing")}
    for kind in {address.rpartition("/")[2] for table in tables for _, address in table.cta}:
        above = ("Person", *steps["Person"]) if f"{BASE}class/{kind}" in people else steps.get(kind, ("Thing",))
        parents[f"{BASE}class/{kind}"] = {f"{BASE}class/{ancestor}": str(step) for step, ancestor in enumerate(above, 1)}
    below = {kind: dict.fromkeys(people, "1") if kind.endswith("/Person") else {} for kind in parents}
    return {"cea_gt.csv": "".join(f"{table.name},{row},{column},{address}\n" for table in tables
                                  for row, column, address in table.cea),
            "cta_gt.csv": "".join(f"{table.name},{column},{address}\n" for table in tables for column, address in table.cta),
            "cpa_gt.csv": "".join(f"{table.name},{first},{second},{address}\n" for table in tables
                                  for first, second, address in table.cpa),
            "cta_gt_ancestor.json": json.dumps(dict(sorted(parents.items())), indent=1),
            "cta_gt_descendent.json": json.dumps(dict(sorted(below.items())), indent=1)}
