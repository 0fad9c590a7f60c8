"""Annotate many tables in jobs of a few tables each, journaled, each exactly once, here or on the workers of a cluster."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.checkpoint.writer import partial_path, write_json
from tsotsallm.cluster.client import Cluster
from tsotsallm.cluster.inputs import Bundle
from tsotsallm.cluster.worker import MEMORY, Failure, library
from tsotsallm.errors import ResourceError, TablesError, TsotsallmError
from tsotsallm.evaluation.cost import bytes_of
from tsotsallm.evaluation.task_run import open_examinee
from tsotsallm.journal import held_work, remove_work
from tsotsallm.machine import cache_root, free_ram_bytes
from tsotsallm.tables.annotate import Annotated, annotate_tables, check_tasks
from tsotsallm.tables.decide import Decider
from tsotsallm.tables.graph import Graph, open_graph
from tsotsallm.tables.lookup import Lookup
from tsotsallm.tables.reading import find_tables, read_table
from tsotsallm.tables.world import world_graph, world_tables_folder
from tsotsallm.units import human_bytes, human_seconds
from tsotsallm.version import __version__

TOGETHER, TOGETHER_BYTES = 8, 1 << 20
"""Most tables of one job, which run through the model together, and most bytes of them."""
ROOM = 400_000_000
"""Bytes of memory that a job takes besides its model: candidates, the graph's caches, hidden states of a batch."""
NO_MODEL = "none"


@dataclass(frozen=True)
class AnnotationSettings:
    """What all jobs of a run share: everything that the result depends on besides the tables."""

    graph: tuple[str, ...]
    model: str | None
    smaller: str | None             # for workers without the memory for `model`: a model, 'none', or None to wait for others
    tasks: tuple[str, ...]
    device: str = "cpu"
    strict: bool = False            # a statement of the graph that does not parse ends the run


@dataclass
class Annotations:
    """The result of a run: its folder, the number of annotations of each task, tables that failed, and notes."""

    folder: Path
    tables: int
    answers: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    models: dict[str, int] = field(default_factory=dict)
    graph_notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def plain(self) -> dict[str, object]:
        """The fields as plain data for JSON."""
        return {"folder": str(self.folder), **{name: value for name, value in self.__dict__.items() if name != "folder"}}


def annotate(tables: Sequence[str | Path], work: AnnotationSettings, out: Path, *, cluster: Cluster | None = None,
             say: Callable[[str], None] = lambda _line: None) -> Annotations:
    """Annotate tables and write `out`: cea.csv, cta.csv and cpa.csv as SemTab takes them, annotations.jsonl and tables.json.

    Jobs of a few tables each run one after another, or on a cluster; what an interrupted run finished is kept in
    `OUT.partial`. The files are the same wherever the jobs ran, as long as every worker has the memory for the same model.
    Raises TablesError where the graph, the tables or the options are wrong.
    """
    started = time.monotonic()
    work = replace(work, tasks=check_tasks(work.tasks))
    if not work.graph:
        raise TablesError("no graph is given; give RDF or label files, or 'embedded'")
    if work.smaller is not None and (work.model is None or cluster is None):
        raise TablesError("a smaller model is for workers of a cluster that have no memory for the model; give both, or "
                          "leave it out")
    if out.exists():
        raise TablesError(f"{out} exists; choose another name with -o, or delete it first")
    paths = _paths(tables)
    for source in (work.model, work.smaller):
        if source not in (None, NO_MODEL):
            Checkpoint.open(source)
    opened = open_sources(work.graph, cache_root() / "graphs", say, strict=work.strict)
    try:
        partial = partial_path(out)
        with held_work(partial, _identity(work, opened, paths)):
            _run(work, opened, paths, partial, cluster, say)
            annotations = _publish(work, opened, paths, partial / "result", out)
        remove_work(partial)
    finally:
        opened.close()
    annotations.seconds = time.monotonic() - started
    return annotations


def _paths(tables: Sequence[str | Path]) -> list[Path]:
    return find_tables([world_tables_folder() / "tables" if str(table) == EMBEDDED else table for table in tables])


def open_sources(sources: Sequence[str], root: Path, say: Callable[[str], None], *, strict: bool) -> Graph:
    """Open the graph of some files, of which `embedded` is the embedded world's; see `graph.open_graph`."""
    return open_graph([world_graph(root) if source == EMBEDDED else source for source in sources], root, say, strict=strict)


def _identity(work: AnnotationSettings, graph: Graph, paths: Sequence[Path]) -> dict[str, object]:
    def fingerprint(model: str | None) -> str:
        return model or "" if model in (None, NO_MODEL) else Bundle.of(str(model)).key

    return {"version": __version__, "graph": graph.key, "model": fingerprint(work.model),
            "smaller model": fingerprint(work.smaller), "tasks": list(work.tasks),
            "tables": [[path.stem, path.stat().st_size] for path in paths]}


def groups_of(paths: Sequence[Path]) -> list[list[Path]]:
    """Split tables into jobs in the order of their names, so that a job is the same wherever it runs."""
    groups: list[list[Path]] = []
    room = 0
    for path in paths:
        size = path.stat().st_size
        if not groups or len(groups[-1]) >= TOGETHER or size > room:
            groups.append([])
            room = TOGETHER_BYTES
        groups[-1].append(path)
        room -= size
    return groups


def _run(work: AnnotationSettings, graph: Graph, paths: Sequence[Path], partial: Path, cluster: Cluster | None,
         say: Callable[[str], None]) -> None:
    groups = groups_of(paths)
    result = partial / "result"
    result.mkdir(exist_ok=True)
    left = [number for number in range(len(groups)) if not _part(result, number).exists()]
    before = sum(len(groups[number]) for number in range(len(groups)) if number not in left)
    if before:
        say(f"{before} of {len(paths)} tables are done already")
    jobs = _here(work, graph, groups, left, partial) if cluster is None else _there(cluster, work, groups, left)
    started, done, lost = time.monotonic(), 0, dict[str, str]()
    for number, annotated in jobs:
        if isinstance(annotated, Failure):
            lost |= {path.stem: annotated.error for path in groups[number]}
            continue
        _keep(_part(result, number), annotated)
        done += len(groups[number])
        rest = (len(paths) - before - done) * (time.monotonic() - started) / done
        say(f"{before + done} of {len(paths)} tables" + (f", about {human_seconds(rest)} left" if rest >= 1 else ""))
    if lost:
        name, error = next(iter(lost.items()))
        raise TablesError(f"{len(lost)} tables could not be annotated, such as {name}: {error}; run the same command to try "
                          "them again: the others are kept")


def _part(result: Path, number: int) -> Path:
    return result / f"job-{number:06}.jsonl"


def _keep(path: Path, annotated: Sequence[Annotated]) -> None:
    """Write a job's result, which appears whole or not at all."""
    draft = path.with_suffix(".new")
    with draft.open("w", encoding="utf-8", newline="\n") as file:
        for table in annotated:
            facts = {"table": table.table, "notes": list(table.notes), "error": table.error, "model": table.model}
            file.write(json.dumps(facts | {"answers": len(table.answers)}, ensure_ascii=False) + "\n")
            for answer in table.answers:
                file.write(json.dumps({"table": table.table} | answer.plain(), ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


# -- one job ----------------------------------------------------------------------------------------------------------

def annotate_group(paths: Sequence[Path], graph: Graph, lookup: Lookup, tasks: Sequence[str], decider: Decider | None,
                   model: str) -> list[Annotated]:
    """Annotate the tables of a job; one that cannot be read is reported in its `error`, and the others are annotated."""
    by_name: dict[str, Annotated] = {}
    tables = []
    for path in paths:
        try:
            tables.append(read_table(path))
        except TsotsallmError as error:
            by_name[path.stem] = Annotated(path.stem, error=str(error))
    for annotated in annotate_tables(tables, graph, lookup, tasks, decider):
        by_name[annotated.table] = replace(annotated, model=model)
    return [by_name[path.stem] for path in paths]


@contextlib.contextmanager
def _deciding(model: str | None, graph: Graph, device: str, scratch: Path | None) -> Iterator[Decider | None]:
    if model in (None, NO_MODEL):
        yield None
        return
    with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        yield Decider(open_examinee(str(model), Path(folder), device=device), graph)


def memory_of(model: str | None) -> int:
    """Bytes of memory that a job takes with a model, or without one."""
    return ROOM + (0 if model in (None, NO_MODEL) else bytes_of(View.of(Checkpoint.open(str(model)))))


def _here(work: AnnotationSettings, graph: Graph, groups: Sequence[Sequence[Path]], left: Sequence[int],
          partial: Path) -> Iterator[tuple[int, list[Annotated]]]:
    if work.model is not None:
        view = View.of(Checkpoint.open(work.model))
        needed = ROOM + 4 * max(sum(math.prod(record.shape) for record in view.layer_records(index).values())
                                for index in range(view.spec.layers))
        if needed > free_ram_bytes():
            raise ResourceError(f"a layer of {work.model} and the graph take {human_bytes(needed)} of memory, but only "
                                f"{human_bytes(free_ram_bytes())} are free; give a smaller model, or none")
    lookup = Lookup(graph)
    with _deciding(work.model, graph, work.device, partial) as decider:
        for number in left:
            yield number, annotate_group(groups[number], graph, lookup, work.tasks, decider, work.model or "")


def _there(cluster: Cluster, work: AnnotationSettings, groups: Sequence[Sequence[Path]],
           left: Sequence[int]) -> Iterator[tuple[int, list[Annotated] | Failure]]:
    shared = [Bundle.of(source) for source in (*work.graph, work.model, work.smaller)
              if source is not None and source != NO_MODEL
              and not (source == EMBEDDED and source in work.graph and source != work.model)]
    needs = {model: memory_of(model) for model in (work.model, work.smaller) if model is not None}
    least = needs[work.smaller] if work.smaller is not None else memory_of(work.model)
    for number in left:
        tables = [str(path) for path in groups[number]]
        cluster.submit(number, annotate_there, (tables, work, needs), [*shared, *map(Bundle.of, tables)], least)
    waiting = set(left)
    while waiting:
        for number, annotated in cluster.finished():
            waiting.discard(number)
            yield number, annotated


def annotate_there(tables: Sequence[str], work: AnnotationSettings, needs: Mapping[str, int], places: Mapping[str, str],
                   folder: Path) -> list[Annotated]:
    """Annotate the tables of a job on a worker, with the model that the worker has memory for."""
    model = work.model
    if work.smaller is not None and model is not None:
        offered = library().get_worker().state.total_resources.get(MEMORY, 0)
        model = model if offered >= needs[model] else work.smaller
    sources = [EMBEDDED if source == EMBEDDED else places.get(source, source) for source in work.graph]
    with contextlib.closing(open_sources(sources, folder / "graphs", lambda _line: None, strict=work.strict)) as graph, \
            _deciding(None if model is None else places.get(model, model), graph, work.device, folder) as decider:
        paths = [Path(places.get(table, table)) for table in tables]
        return annotate_group(paths, graph, Lookup(graph), work.tasks, decider, model or "")


# -- the result -------------------------------------------------------------------------------------------------------

def _publish(work: AnnotationSettings, graph: Graph, paths: Sequence[Path], result: Path, out: Path) -> Annotations:
    """Join the jobs' results into the submission, and give it its final name."""
    annotations = Annotations(out, len(paths), dict.fromkeys(work.tasks, 0), graph_notes=list(graph.facts["notes"]))
    models: Counter[str] = Counter()
    draft = result.with_name("submission")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    with contextlib.ExitStack() as stack:
        def opened(name: str) -> TextIO:
            return stack.enter_context((draft / name).open("w", encoding="utf-8", newline="\n"))

        submissions = {task: opened(f"{task}.csv") for task in work.tasks}
        kept = opened("annotations.jsonl")
        for part in sorted(result.glob("job-*.jsonl")):
            with part.open(encoding="utf-8") as file:
                for line in file:
                    entry = json.loads(line)
                    if "task" not in entry:
                        if entry["error"]:
                            annotations.failed[entry["table"]] = entry["error"]
                        else:
                            models[entry["model"] or NO_MODEL] += 1
                        if entry["notes"]:
                            annotations.notes[entry["table"]] = entry["notes"]
                        continue
                    kept.write(line)
                    place = ",".join(map(str, entry["place"]))
                    submissions[entry["task"]].write(f"{_quoted(entry['table'])},{place},{_quoted(entry['chosen'])}\n")
                    annotations.answers[entry["task"]] += 1
    annotations.models = dict(sorted(models.items()))
    write_json(draft / "tables.json", {
        "version": __version__, "graph": {name: graph.facts[name] for name in ("sources", "key", "entities", "labels",
                                                                               "statements", "notes")},
        "tables": annotations.tables, "answers": annotations.answers, "models": annotations.models,
        "failed": annotations.failed, "notes": annotations.notes})
    draft.replace(out)
    return annotations


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\n') else text
