"""tsotsallm tables: annotated tables scored, and the embedded world's tables written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsotsallm.cli.common import AsJson, answers, print_json

if TYPE_CHECKING:
    from tsotsallm.tables.scoring import AnnotationScore

app = typer.Typer(name="tables", rich_markup_mode=None,
                  help="Score annotated tables, or write the embedded world's tables.")
Gold: Any = typer.Option(help="Correct annotations: a folder with cea_gt.csv and the like, or of tables with X__URI "
                              "columns, or 'embedded'.")


@app.command("score")
def score(submissions: Annotated[list[str], typer.Argument(help="Folders that `annotate` wrote; differences are to the "
                                                                "first.")],
          gold: Annotated[str, Gold],
          tasks: Annotated[str | None, typer.Option(help="What to score, separated by commas: cea, cta, cpa (default: all "
                                                         "that the gold standard has).")] = None,
          as_json: AsJson = False) -> None:
    """Report precision, recall and F1 by SemTab's definitions, by domain.

    Several submissions are compared in pairs, with intervals.
    """
    with answers(as_json):
        from tsotsallm.api.tables import score_tables

        scores = score_tables(submissions, gold, by_domain=True, tasks=None if tasks is None else tasks.split(","))
        print_json([one.plain() for one in scores]) if as_json else print_table_scores(submissions, scores)


@app.command("world")
def world(out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")],
          count: Annotated[int, typer.Option(help="Number of tables.")] = 60,
          seed: Annotated[int, typer.Option(help="Random seed of the tables.")] = 0) -> None:
    """Write the embedded world's graph, tables, and correct annotations."""
    with answers():
        from tsotsallm.api.tables import write_world_tables

        print(write_world_tables(out, count=count, seed=seed))


def print_table_scores(folders: list[str], scores: list[AnnotationScore]) -> None:
    """Print one row per task, measure and domain; differences to the first submission with their paired intervals."""
    from tsotsallm.cli.lines import short_names, table

    rows = []
    for one in scores:
        cells = [f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
                 for value, error in zip(one.values, one.errors, strict=True)]
        cells += [f"{'≈ ' if other.within_noise else ''}{100 * other.value:+.1f} [{100 * other.low:+.1f}, "
                  f"{100 * other.high:+.1f}]" for other in one.differences if other is not None]
        rows.append([one.task.upper() + (f" ({one.domain})" if one.domain else ""), one.measure, str(one.targets), *cells])
    names = short_names(folders)
    table("Scores, %", ["task", "measure", "targets", *names, *(f"{name} − {names[0]}" for name in names[1:])], rows)
    print("CTA is the approximate score (types above and below the right one count partly); ± is one standard error, "
          "intervals are 95%, over whole tables")
