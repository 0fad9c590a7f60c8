"""Hand-made and invented worlds: annotated by the graph, by a model where it is silent, and in jobs that resume."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

import tsotsallm
from tests.tables.towns import TURTLE, dump, made
from tsotsallm.api.tables import write_world_tables
from tsotsallm.errors import ResumeError, TablesError
from tsotsallm.lab.graph import BASE, gold_files, world_tables, world_turtle
from tsotsallm.lab.world import build_world
from tsotsallm.streaming.likelihood import Likelihood
from tsotsallm.tables.annotate import Annotated, annotate_tables
from tsotsallm.tables.decide import Decider, relative
from tsotsallm.tables.lookup import Lookup
from tsotsallm.tables.reading import Table
from tsotsallm.tables.scoring import read_gold


def table(*rows: tuple[str, ...], header: tuple[str, ...] = ()) -> Table:
    return Table("t", header or ("",) * len(rows[0]), rows, 1, tuple(range(len(rows[0]))))


def chosen(found: Annotated, task: str) -> dict[tuple[int, ...], str]:
    return {one.place: one.chosen for one in found.answers if one.task == task}


class Oracle:
    """A model that knows some sentences: 0.9 for an end that it knows after its beginning, 0.001 for any other."""

    def __init__(self, *known: str) -> None:
        self.known, self.asked = known, 0

    def likelihoods(self, asked: Sequence[tuple[str, Sequence[str]]]) -> Iterable[tuple[int, list[Likelihood]]]:
        for index, (prompt, ends) in enumerate(asked):
            self.asked += len(ends)
            yield index, [Likelihood((math.log(0.9 if any(one.startswith(prompt + end) for one in self.known)
                                               else 0.001),), True) for end in ends]


def test_the_row_tells_equal_names_apart(tmp_path: Path) -> None:
    graph = made(tmp_path, TURTLE)
    found = annotate_tables([table(("Paris", "United States"), ("Rome", "Italy")), table(("Paris", "Frnace"),
                                                                                         ("Rome", "Italie"))],
                            graph, Lookup(graph), ("cea", "cta", "cpa"))
    assert chosen(found[0], "cea") == {(1, 0): "http://x/texas", (1, 1): "http://x/usa", (2, 0): "http://x/rome",
                                       (2, 1): "http://x/italy"}
    assert chosen(found[1], "cea")[1, 0] == "http://x/paris"
    assert chosen(found[1], "cea")[1, 1] == "http://x/france"
    assert chosen(found[0], "cta")[0,] == "http://x/City"
    assert chosen(found[0], "cpa") == {(0, 1): "http://x/in"}
    cell = next(one for one in found[0].answers if one.place == (1, 0))
    assert 0.5 < cell.confidence <= 1
    assert {one for one, _, _ in cell.candidates} == {"http://x/texas", "http://x/paris"}


def test_a_model_decides_where_the_graph_is_silent(tmp_path: Path) -> None:
    silent = TURTLE.replace(':texas a :City ; rdfs:label "Paris"@en ; :in :usa',
                            ':texas a :City ; rdfs:label "Parys"@en ; skos:altLabel "Paris"').replace(":in :france ; ", "")
    silent += ':oslo a :City ; rdfs:label "Oslo" ; :in :norway . :norway rdfs:label "Norway" .\n'
    graph = made(tmp_path, silent)
    lookup = Lookup(graph)
    asked = [table(("Paris", "United States"), ("Rome", "Italy"), ("Oslo", "Norway"))]
    alone = annotate_tables(asked, graph, lookup, ("cea",))[0]
    decider = Decider(Oracle("Parys lies in United States."), graph)
    found = annotate_tables(asked, graph, lookup, ("cea",), decider)[0]
    assert chosen(found, "cea")[1, 0] == "http://x/texas"
    assert decider.questions > 0
    sure = {one.place: one.confidence for one in found.answers}
    assert sure[1, 0] > {one.place: one.confidence for one in alone.answers}[1, 0]
    other = annotate_tables(asked, graph, lookup, ("cea",), Decider(Oracle("Paris lies in United States."), graph))[0]
    assert chosen(other, "cea")[1, 0] == "http://x/paris"


def test_without_properties_the_row_is_read_with_every_candidate(tmp_path: Path) -> None:
    labels = {"Q1": {"label": "Paris", "description": "capital of France"},
              "Q2": {"label": "Paris", "description": "Texan city"}}
    graph = made(tmp_path, json.dumps(labels), "labels.json")

    class Reader(Oracle):
        def likelihoods(self, asked: Sequence[tuple[str, Sequence[str]]]) -> Iterable[tuple[int, list[Likelihood]]]:
            for index, (prompt, ends) in enumerate(asked):
                yield index, [Likelihood((-1.0 if "Dallas" in prompt and "Texan" in end else -5.0,), True) for end in ends]

    rows = table(("Paris", "Dallas x"), ("Paris", "Lyon x"))
    alone = annotate_tables([rows], graph, Lookup(graph), ("cea",))[0]
    found = annotate_tables([rows], graph, Lookup(graph), ("cea",), Decider(Reader(), graph))[0]
    assert chosen(alone, "cea")[1, 0].endswith("Q1")            # of equals the older
    assert chosen(found, "cea")[1, 0].endswith("Q2")
    assert chosen(found, "cea")[2, 0].endswith("Q1")


def test_only_open_questions_are_asked(tmp_path: Path) -> None:
    graph = made(tmp_path, TURTLE)
    model = Oracle()
    annotate_tables([table(("Rome", "Italy"), ("Paris", "France"), ("Rome", "Italy"), ("Paris", "United States"))], graph,
                    Lookup(graph), ("cea",), Decider(model, graph))
    assert model.asked == 0


def test_what_a_model_says_is_relative_to_the_best_candidate() -> None:
    assert relative({"a": -1.0, "b": -3.0}) == pytest.approx({"a": -0.7, "b": -2.1})
    assert relative({"a": -100.0, "b": -101.0, "c": -200.0}) == pytest.approx({"a": -2.5, "b": -3.2, "c": -7.5})


def test_a_table_without_entities_is_noted(tmp_path: Path) -> None:
    graph = made(tmp_path, TURTLE)
    found = annotate_tables([table(("1", "2.5"), ("3", "4"))], graph, Lookup(graph), ("cea", "cta", "cpa"))[0]
    assert found.answers == ()
    assert "no column names entities" in found.notes[0]


# -- the invented world ------------------------------------------------------------------------------------------------

def test_the_worlds_graph_and_tables_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    assert world_turtle() == world_turtle()
    assert world_tables(5, 3) == world_tables(5, 3)
    assert world_tables(5, 3) != world_tables(5, 4)
    graph = made(tmp_path, world_turtle())
    home = {name for name, names in ((one, graph.statements(f"{BASE}person/{number}").entities)
                                     for number, one in enumerate(build_world().people, 1)) for names in [names] if
            any(f"{BASE}property/home" in names_ for names_ in names.values())}
    assert 0.25 < len(home) / 960 < 0.42                    # a third of the facts


def test_gold_of_the_world_is_consistent(tmp_path: Path) -> None:
    tables = world_tables(20, 2)
    for name, text in gold_files(tables).items():
        (tmp_path / name).write_text(text, "utf-8")
    gold = read_gold(tmp_path)
    assert gold.tasks == ("cea", "cta", "cpa")
    for one in tables:
        rows = [line.split(",") for line in one.csv.splitlines()]
        assert all(rows[row][column] for row, column, _ in one.cea)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("world")
    source = write_world_tables(folder / "source", count=20)
    for name, model in (("graph", None), ("model", "embedded")):
        tsotsallm.annotate(source / "tables", source / "world.ttl", folder / name, model=model)
    return {"source": source, "graph": folder / "graph", "model": folder / "model"}


def test_the_embedded_model_knows_what_the_graph_lacks(done: dict[str, Path]) -> None:
    found = {(one.task, one.measure): one for one in tsotsallm.score_tables([done["graph"], done["model"]],
                                                                           done["source"] / "gold")}
    cells = found["cea", "F1"]
    assert cells.values[0] > 0.8
    assert cells.differences[1] is not None
    assert cells.differences[1].value > 0.02
    assert found["cta", "F1"].values[0] > 0.9
    assert found["cpa", "F1"].values[1] > 0.9


def test_what_is_written(done: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in (done["model"] / "annotations.jsonl").read_text("utf-8").splitlines()]
    for task, width in (("cea", 4), ("cta", 3), ("cpa", 4)):
        rows = [line.split(",") for line in (done["model"] / f"{task}.csv").read_text("utf-8").splitlines()]
        assert {len(row) for row in rows} == {width}
        assert len({tuple(row[:-1]) for row in rows}) == len(rows)
        assert len(rows) == sum(line["task"] == task for line in lines)
    assert {"table", "task", "place", "text", "chosen", "confidence", "candidates"} == set(lines[0])
    facts = json.loads((done["model"] / "tables.json").read_text("utf-8"))
    assert facts["models"] == {"embedded": 20}


def test_a_table_that_fails_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "small.ttl").write_text(TURTLE, "utf-8")
    tables = tmp_path / "tables"
    tables.mkdir()
    for name, content in {"good": b"city,country\nParis,United States\nRome,Italy\n", "bad": b"city\nZo\xeb\x81\n",
                          "ragged": b"city,country\nParis\nRome,Italy,x y\n", "numbers": b"a,b\n1,2\n3,4\n",
                          "latin": "city,country\nRome,Italy\nZoë,Italy\n".encode("cp1252"), "empty": b""}.items():
        (tables / f"{name}.csv").write_bytes(content)
    found = tsotsallm.annotate(tables, tmp_path / "small.ttl", tmp_path / "out")
    assert set(found.failed) == {"bad", "empty"}
    assert "is not UTF-8" in found.failed["bad"]
    assert "ragged" in found.notes
    assert "Windows-1252" in found.notes["latin"][0]
    assert "no column names entities" in found.notes["numbers"][-1]
    assert found.answers["cea"] >= 8
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("given", "message"), [
    ({"tasks": ["cea", "cda"]}, "no task 'cda'; did you mean 'c[et]a'"), ({"tasks": []}, "no task is given"),
    ({"graph": []}, "no graph is given"), ({"smaller_model": "none"}, "a smaller model is for workers"),
    ({"graph": "nowhere.ttl"}, "nowhere.ttl does not exist"), ({"tables": "nowhere.csv"}, "nowhere.csv does not exist")])
def test_what_cannot_be_done_is_refused_first(tmp_path: Path, given: dict[str, object], message: str) -> None:
    settings = {"tables": "embedded", "graph": "embedded", "out": tmp_path / "out"} | given
    with pytest.raises(TablesError, match=message):
        tsotsallm.annotate(**settings)      # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_result_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(TablesError, match="out exists"):
        tsotsallm.annotate("embedded", "embedded", tmp_path / "out")


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(done: dict[str, Path], tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from tsotsallm.tables import jobs

    begun: list[int] = []
    real = jobs.annotate_group

    def group(paths: Sequence[Path], *more: object) -> list[Annotated]:
        begun.append(len(paths))
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(paths, *more)       # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "annotate_group", group)
    source = done["source"]
    with pytest.raises(KeyboardInterrupt):
        tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ResumeError, match=r"tasks: \[.*\] then, \[\"cea\"\] now"):
        tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "out", tasks=["cea"])
    lines: list[str] = []
    tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "out", say=lines.append)
    assert "8 of 20 tables are done already" in lines
    assert begun == [8, 8, 8, 4]
    for path in done["graph"].iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_long_table(tmp_path: Path) -> None:
    """Every row is annotated, though columns are decided by some; equal cells are looked up once."""
    graph = tmp_path / "small.ttl"
    graph.write_text(TURTLE, "utf-8")
    rows = [("Paris", "United States"), ("Rome", "Italy"), ("Paris", "France"), ("Roma", "Italie"), ("Pairs", "France")]
    (tmp_path / "long.csv").write_text("city,country\n" + "".join(f"{','.join(rows[number % 5])}\n"
                                                                  for number in range(100_000)), "utf-8")
    started = time.monotonic()
    found = tsotsallm.annotate(tmp_path / "long.csv", graph, tmp_path / "out")
    assert time.monotonic() - started < 240
    assert found.answers["cea"] == 200_000
    lines = (tmp_path / "out" / "cea.csv").read_text("utf-8").splitlines()
    right = ["texas", "rome", "paris", "rome", "paris"]
    cells = {tuple(line.split(",")[1:3]): line.rpartition("/")[2] for line in lines}
    assert all(cells[str(row + 1), "0"] == right[row % 5] for row in range(100_000))


test_a_long_table = pytest.mark.slow(test_a_long_table)


def test_the_command_line(done: dict[str, Path], tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tsotsallm", *arguments], capture_output=True, text=True,
                              check=False)

    source = done["source"]
    asked = ("annotate", str(source / "tables"), "--graph", str(source / "world.ttl"), "-o")
    found = run(*asked, str(tmp_path / "out"), "--gold", str(source / "gold"), "--json")
    assert found.returncode == 0, found.stderr
    assert {one["task"] for one in json.loads(found.stdout)["scores"]} == {"cea", "cta", "cpa"}
    shown = run("tables", "score", str(tmp_path / "out"), str(done["model"]), "--gold", str(source / "gold"), "--tasks",
                "cea")
    assert "CEA" in shown.stdout
    assert "model − out" in shown.stdout
    bad = run(*asked, str(tmp_path / "o2"), "--tasks", "cells")
    assert bad.returncode == 1
    assert "Traceback" not in bad.stderr
    assert "no task 'cells'" in bad.stderr


def test_bad_statements_are_told_at_the_end_and_refused_by_strict(tmp_path: Path) -> None:
    (tmp_path / "dump.nt").write_text(dump(300, '<http://x/a b> <http://x/p> "x" .'), "utf-8")
    (tmp_path / "cells.csv").write_text("sep=;\nname;day\nthing 7;April 15, 2023\n", "utf-8")

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tsotsallm", "annotate", "cells.csv", "--graph", "dump.nt", "-o", "out",
                               *more], capture_output=True, text=True, check=False, cwd=tmp_path)

    for attempt in range(2):                    # loaded now, and found in the cache
        refused = run("--strict")
        assert refused.returncode == 1
        assert "line 5" in refused.stderr
        assert "leave out --strict" in refused.stderr
        assert not (tmp_path / "out").exists()
        shown = run()
        assert "note   graph: dump.nt, line 5: Invalid IRI code point ' '" in shown.stdout.splitlines()
        assert (tmp_path / "out" / "cea.csv").read_text("utf-8") == "cells,1,0,http://x/e7\n"
        kept = json.loads((tmp_path / "out" / "tables.json").read_text("utf-8"))
        assert kept["graph"]["notes"][0] == "dump.nt: 1 of 301 statements are not valid N-Triples and were skipped:"
        (tmp_path / "out").rename(tmp_path / f"kept-{attempt}")
