"""Commands: annotate, tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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

app = typer.Typer(rich_markup_mode=None)


tables_app = typer.Typer(rich_markup_mode=None, help="Score annotated tables; write the embedded world's tables.")


app.add_typer(tables_app, name="tables")


Gold = Annotated[str | None, typer.Option(help="Folder with cea_gt.csv and the like, or of tables with X__URI columns, or "
                                               "'embedded'.")]


@app.command()
def annotate(tables: Annotated[list[str], typer.Argument(help="CSV files, folders of them, or 'embedded'.")],
             graph: Annotated[list[str], typer.Option(help="RDF or label file, or 'embedded'; may be given several times.")],
             out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")],
             model: Annotated[str | None, typer.Option(help="Model that decides where the graph is silent (default: the "
                                                            "graph alone).")] = None,
             tasks: Annotated[str, typer.Option(help="Of cea (cells), cta (columns), cpa (pairs of columns), with commas "
                                                     "between.")] = "cea,cta,cpa",
             gold: Gold = None,
             smaller_model: Annotated[str | None, typer.Option(help="For workers without the memory for --model: a smaller "
                                                                    "one, or 'none'.")] = None,
             strict: Annotated[bool, typer.Option("--strict", help="Refuse a graph with a statement that does not parse "
                                                                   "(default: skip up to 1% and name them).")] = False,
             workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
             device: Device = "cpu", threads: Threads = None, as_json: AsJson = False) -> None:
    """Annotate tables with a knowledge graph.

    Cells with entities, columns with types, pairs of columns with properties.
    """
    with answers(as_json):
        from tsotsallm.api import annotating
        from tsotsallm.console.annotating import print_annotations, print_table_scores

        right = annotating.gold_tasks(gold) if gold is not None else ()        # refused before the work begins
        found = annotating.annotate(tables, graph, out, model=model, smaller_model=smaller_model,
                                    tasks=[task.strip() for task in tasks.split(",") if task.strip()], device=device,
                                    strict=strict, workers=computers_from(workers, tls_ca, tls_cert, tls_key),
                                    say=progress(workers))
        scored = [task for task in found.answers if task in right]
        scores = annotating.score_tables([out], gold, by_domain=True, tasks=scored) if gold is not None and scored else []
        if as_json:
            print_json(found.plain() | ({"scores": [one.plain() for one in scores]} if scores else {}))
            return
        print_annotations(found)
        if scores:
            print_table_scores([str(out)], scores)


@tables_app.command("score")
def tables_score(submissions: Annotated[list[str], typer.Argument(help="Folders that `annotate` wrote; differences are to "
                                                                       "the first.")],
                 gold: Annotated[str, typer.Option(help="Folder with cea_gt.csv and the like, or of tables with X__URI "
                                                        "columns, or 'embedded'.")],
                 tasks: Annotated[str | None, typer.Option(help="Of cea, cta, cpa (default: all that the gold "
                                                                "has).")] = None,
                 as_json: AsJson = False) -> None:
    """Precision, recall and F1 as SemTab takes them, by domain.

    Several submissions are compared in pairs, with intervals.
    """
    with answers(as_json):
        from tsotsallm.api import annotating
        from tsotsallm.console.annotating import print_table_scores

        scores = annotating.score_tables(submissions, gold, by_domain=True,
                                         tasks=None if tasks is None else tasks.split(","))
        print_json([one.plain() for one in scores]) if as_json else print_table_scores(submissions, scores)


@tables_app.command("world")
def tables_world(out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")],
                 count: Annotated[int, typer.Option(help="Tables.")] = 60,
                 seed: Annotated[int, typer.Option(help="Seed of the tables.")] = 0) -> None:
    """Write the embedded world's graph, tables, and their gold."""
    with answers():
        from tsotsallm.api import annotating

        print(annotating.write_world_tables(out, count=count, seed=seed))
