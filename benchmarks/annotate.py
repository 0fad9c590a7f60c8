"""Tables annotated with a knowledge graph: what a model adds, what its reduction costs, how fast it goes, how large a graph.

    python benchmarks/annotate.py world OUT --model half=PATH --model quarter=PATH --model eighth=PATH
    python benchmarks/annotate.py semtab SEMTAB OUT [--model NAME=PATH]
    python benchmarks/annotate.py workers OUT [--count 3]
    python benchmarks/annotate.py large OUT [--triples 5000000]
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import tsotsallm
from tsotsallm.api.tables import write_world_tables
from tsotsallm.evaluation.cost import bytes_of
from tsotsallm.tables.load import label_from_address
from tsotsallm.tables.reading import find_tables, read_table
from tsotsallm.tables.scoring import AnnotationScore


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(line: str) -> None:
    print(f"  {line}", flush=True)


def named(text: str) -> tuple[str, str]:
    name, mark, path = text.partition("=")
    if not mark:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def row(one: AnnotationScore) -> str:
    cells = [f"{100 * value:6.2f}" for value in one.values]
    differences = [f"{100 * other.value:+6.2f} [{100 * other.low:+.2f}, {100 * other.high:+.2f}]"
                   for other in one.differences if other is not None]
    return f"{one.task} {one.domain:16} {one.measure:9} {one.targets:6} | {' '.join(cells)} | {'; '.join(differences)}"


# -- the embedded world ------------------------------------------------------------------------------------------------

def world(out: Path, models: list[tuple[str, str]], count: int, seed: int) -> None:
    """Graph alone, original and reduced models on the same tables; how much of the gain each reduced model keeps."""
    from tsotsallm.checkpoint.reader import Checkpoint
    from tsotsallm.checkpoint.view import View

    out.mkdir(parents=True, exist_ok=True)
    source = out / f"tables-{seed}-{count}"
    if not source.exists():
        write_world_tables(source, count=count, seed=seed)
    folders = []
    for name, model in [("graph", None), ("original", "embedded"), *models]:
        folder = out / f"{name}-{seed}-{count}"
        if not folder.exists():
            found = tsotsallm.annotate(source / "tables", "embedded", folder, model=model)
            size = 0 if model is None else bytes_of(View.of(Checkpoint.open(model)))
            print(f"{name}: {size / 1e6:.2f} MB of weights, {found.seconds:.1f} s, peak {peak_bytes() / 1e6:.0f} MB so far",
                  flush=True)
        folders.append(folder)
    scores = tsotsallm.score_tables(folders, source / "gold")
    print(f"{count} tables, seed {seed}: graph, original, {', '.join(name for name, _ in models)}; differences to the graph")
    for one in scores:
        print(row(one))
    for one in scores:
        if one.measure == "F1":
            gain = one.values[1] - one.values[0]
            kept = [f"{name} {100 * (value - one.values[0]) / gain:.0f}%" if gain else "no gain"
                    for (name, _), value in zip(models, one.values[2:], strict=True)]
            print(f"{one.task}: of the original's gain of {100 * gain:.2f} points, {', '.join(kept)} kept")
    (out / f"scores-{seed}-{count}.json").write_text(json.dumps([one.plain() for one in scores], indent=1), "utf-8")
    against = tsotsallm.score_tables(folders[1:], source / "gold")
    print("differences to the original model:")
    for one in against:
        if one.measure == "F1":
            print(row(one))


# -- SemTab ------------------------------------------------------------------------------------------------------------

def collected_labels(tough: Path, out: Path) -> Path:
    """A label file of the DBpedia entities that the gold of ToughTables names, the label read from the address: what the
    given label graph is for the other tables. Entities that no table means are not in it, which makes it easy."""
    labels: dict[str, str] = {}
    for path in find_tables([tough]):
        for _, _, entities in read_table(path).gold:
            for iri in entities.split():
                if iri.startswith("http"):
                    labels[iri] = label_from_address(iri)
    file = out / "dbpedia_labels.json"
    file.write_text(json.dumps(dict(sorted(labels.items())), ensure_ascii=False), "utf-8")
    return file


def tsotsa_gold(source: Path, out: Path) -> Path:
    """The gold of TSOTSATable with the tables at hand."""
    have = {path.stem for path in find_tables([source / "tables"])}
    folder = out / "tsotsa-gold"
    folder.mkdir(exist_ok=True)
    for task in ("cea", "cta"):
        with (source / "wikidata" / f"TSOTSATable_{task}.csv").open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
        with (folder / f"{task}_gt.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([lines[0], *(line for line in lines[1:] if line[0] in have)])
    return folder


def semtab(source: Path, out: Path, models: list[tuple[str, str]]) -> None:
    """All tables in one run with the label graph given there."""
    out.mkdir(parents=True, exist_ok=True)
    tables = [source / "HardTablesR1-valid" / "tables", source / "toughtables-dbpedia", source / "TSOTSATable" / "tables"]
    graph = [source / "kg" / name for name in ("entity_labels.json", "extra_entity_labels.json",
                                               "wikidata_property_labels.json", "dbpedia.owl")]
    graph.append(collected_labels(source / "toughtables-dbpedia", out))
    folders = []
    for name, model in [("graph", None), *models]:
        folder = out / name
        if not folder.exists():
            found = tsotsallm.annotate(tables, graph, folder, model=model, say=say)
            print(f"{name}: {found.tables} tables, {found.answers}, {found.seconds / 60:.2f} min, "
                  f"peak {peak_bytes() / 1e6:.0f} MB, failed {found.failed}", flush=True)
        folders.append(folder)
    for title, gold in (("HardTables R1", source / "HardTablesR1-valid" / "gt"),
                        ("ToughTables", source / "toughtables-dbpedia"),
                        ("TSOTSATable", tsotsa_gold(source / "TSOTSATable", out))):
        print(title)
        for one in tsotsallm.score_tables(folders, gold, by_domain=title == "ToughTables"):
            print(" ", row(one))


# -- several workers ---------------------------------------------------------------------------------------------------

def workers(out: Path, count: int, tables: int, model: str | None) -> None:
    """The same tables with one worker and with several, on this machine: seconds, and whether the bytes are the same."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.cluster.computers import computers
    from tsotsallm.api.computers import Computers

    out.mkdir(parents=True, exist_ok=True)
    source = out / "tables"
    if not source.exists():
        write_world_tables(source, count=tables)
    started = time.monotonic()
    tsotsallm.annotate(source / "tables", "embedded", out / "alone", model=model)
    print(f"single process: {time.monotonic() - started:.1f} s", flush=True)
    for number in range(1, count + 1):
        place = out / f"computers-{number}"
        place.mkdir()
        with computers(place, number, spaces=False) as there:
            for worker in range(number):
                there.start(f"w{worker}", "--memory", "2GB")
            time.sleep(12)
            started = time.monotonic()
            tsotsallm.annotate(source / "tables", "embedded", out / f"by-{number}", model=model,
                               workers=Computers(there.address), say=lambda _line: None)
            seconds = time.monotonic() - started
        same = all((out / f"by-{number}" / name.name).read_bytes() == name.read_bytes()
                   for name in (out / "alone").iterdir())
        print(f"{number} workers: {seconds:.1f} s, {'the same bytes' if same else 'OTHER BYTES'}", flush=True)


# -- a large graph -----------------------------------------------------------------------------------------------------

SYLLABLES = ("ba be bi bo bu da de di do du fa fe fi fo ka ke ki ko la le li lo ma me mi mo na ne ni no pa pe pi po ra re "
             "ri ro").split()


def triples(count: int, seed: int = 0) -> Iterator[str]:
    """N-Triples about people: label, type and three relations to others each."""
    rng = random.Random(seed)
    base, made = "http://example.org/large/", 0
    number = 0
    while made < count:
        words = ["".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4))).capitalize() for _ in range(2)]
        me = f"<{base}e{number}>"
        yield f'{me} <http://www.w3.org/2000/01/rdf-schema#label> "{" ".join(words)}" .\n'
        yield f"{me} <http://www.w3.org/1999/02/22-rdf-syntax-ns#type> <{base}c{number % 50}> .\n"
        for _ in range(3):
            yield f"{me} <{base}p{rng.randrange(20)}> <{base}e{rng.randrange(max(1, count // 5))}> .\n"
        made += 5
        number += 1


def large(out: Path, count: int, asked: int) -> None:
    """Load time, memory, disk, and candidates a second of exact names and of names with a slip."""
    from tsotsallm.lab.graph import slip
    from tsotsallm.tables.graph import open_graph
    from tsotsallm.tables.lookup import Lookup

    out.mkdir(parents=True, exist_ok=True)
    file = out / f"large-{count}.nt"
    if not file.exists():
        with file.open("w", encoding="utf-8") as target:
            target.writelines(triples(count))
    print(f"{count:,} triples, {file.stat().st_size / 1e6:.0f} MB of N-Triples", flush=True)
    before = peak_bytes()
    graph = open_graph([file], out / "graphs", say)
    size = sum(one.stat().st_size for one in graph.folder.rglob("*") if one.is_file())
    print(f"loaded in {graph.facts['seconds']:.1f} s, peak {peak_bytes() / 1e6:.0f} MB ({before / 1e6:.0f} MB before), "
          f"{size / 1e6:.0f} MB on disk", flush=True)
    rng = random.Random(1)
    with file.open(encoding="utf-8") as lines:
        names = [line.split('"')[1] for line in islice(lines, 500_000) if '"' in line]
    asked_names = rng.sample(names, asked)
    for title, texts in (("exact names", asked_names), ("names with a slip", [slip(name, rng) for name in asked_names])):
        lookup = Lookup(graph)
        started = time.monotonic()
        found = [lookup.find(text) for text in texts]
        seconds = time.monotonic() - started
        right = sum(any(one.name == name for one in candidates) for name, candidates in zip(asked_names, found, strict=True))
        print(f"{title}: {asked / seconds:.0f} cells/s, {sum(map(len, found)) / seconds:.0f} candidates/s, the right name "
              f"among them for {100 * right / asked:.1f}%", flush=True)
    print(f"peak {peak_bytes() / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, more in (("world", ()), ("semtab", ("source",)), ("workers", ()), ("large", ())):
        one = kinds.add_parser(kind)
        for name in more:
            one.add_argument(name, type=Path)
        one.add_argument("out", type=Path)
        one.add_argument("--model", type=named, action="append", default=[])
        one.add_argument("--tables", type=int, default=120)
        one.add_argument("--seed", type=int, default=0)
        one.add_argument("--count", type=int, default=3)
        one.add_argument("--triples", type=int, default=5_000_000)
        one.add_argument("--asked", type=int, default=2000)
    given: Any = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(f"{given.kind}, commit {commit.stdout.strip()}", flush=True)
    if given.kind == "world":
        world(given.out, given.model, given.tables, given.seed)
    elif given.kind == "semtab":
        semtab(given.source, given.out, given.model)
    elif given.kind == "workers":
        workers(given.out, given.count, given.tables, given.model[0][1] if given.model else None)
    else:
        large(given.out, given.triples, given.asked)


if __name__ == "__main__":
    main()
