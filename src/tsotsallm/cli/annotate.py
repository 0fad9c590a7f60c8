"""tsotsallm annotate: tables annotated with a knowledge graph."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsotsallm.cli.common import (
    AsJson,
    Device,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    Workers,
    answers,
    computers_from,
    print_json,
    progress,
)
from tsotsallm.cli.tables import Gold, print_table_scores

if TYPE_CHECKING:
    from tsotsallm.tables.jobs import Annotations


def annotate(tables: Annotated[list[str], typer.Argument(help="Tables to annotate: CSV files, folders of them, or "
                                                              "'embedded'.")],
             graph: Annotated[list[str], typer.Option(help="Knowledge graph: an RDF or label file, or 'embedded'; may be "
                                                           "given several times.")],
             out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write the result to; must not exist.")],
             model: Annotated[str | None, typer.Option(help="Model that decides where the graph is silent (default: the "
                                                            "graph alone).")] = None,
             tasks: Annotated[str, typer.Option(help="What to annotate, separated by commas: cea (cells), cta (columns), "
                                                     "cpa (pairs of columns).")] = "cea,cta,cpa",
             gold: Annotated[str | None, Gold] = None,
             smaller_model: Annotated[str | None, typer.Option(help="Model for workers without the memory for --model: a "
                                                                    "smaller one, or 'none'.")] = None,
             strict: Annotated[bool, typer.Option("--strict", help="Refuse a graph with a statement that does not parse "
                                                                   "(default: skip up to 1% and list them).")] = False,
             workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
             device: Device = "cpu", threads: Threads = None, as_json: AsJson = False) -> None:
    """Annotate tables with a knowledge graph.

    Cells with entities, columns with types, pairs of columns with properties.
    """
    with answers(as_json):
        from tsotsallm.api.annotate import annotate
        from tsotsallm.api.tables import gold_tasks, score_tables

        right = gold_tasks(gold) if gold is not None else ()        # refused before the work begins
        done = annotate(tables, graph, out, model=model, smaller_model=smaller_model,
                        tasks=[task.strip() for task in tasks.split(",") if task.strip()], device=device, strict=strict,
                        workers=computers_from(workers, tls_ca, tls_cert, tls_key), say=progress(workers))
        scored = [task for task in done.answers if task in right]
        scores = score_tables([out], gold, by_domain=True, tasks=scored) if gold is not None and scored else []
        if as_json:
            print_json(done.plain() | ({"scores": [one.plain() for one in scores]} if scores else {}))
            return
        print_annotations(done)
        if scores:
            print_table_scores([str(out)], scores)


def print_annotations(done: Annotations) -> None:
    """Print what was annotated, what was noted, what failed."""
    from tsotsallm.machine import peak_rss_bytes
    from tsotsallm.units import human_bytes, human_seconds

    names = {"cea": "cells", "cta": "columns", "cpa": "pairs of columns"}
    print(f"{done.tables} tables: " + ", ".join(f"{count:,} {names[task]}" for task, count in done.answers.items())
          + f"; {human_seconds(done.seconds)}, peak memory {human_bytes(peak_rss_bytes())}")
    print("decided by " + ", ".join(f"{'the graph alone' if model == 'none' else model} ({count} tables)"
                                    for model, count in done.models.items()))
    for note in done.graph_notes:
        print(f"note   graph: {note}")
    counted: dict[str, list[str]] = {}
    for name, notes in done.notes.items():
        for note in notes:
            counted.setdefault(note.partition(" (")[0] if "lines are" in note else note, []).append(name)
    for note, tables in counted.items():
        print(f"note   {tables[0] if len(tables) == 1 else f'{len(tables)} tables, such as {tables[0]}'}: {note}")
    for name, error in done.failed.items():
        print(f"failed {name}: {error}")
    print(f"result {done.folder}")
