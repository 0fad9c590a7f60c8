"""Annotated tables on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsotsallm.console.lines import table

if TYPE_CHECKING:
    from tsotsallm.tables.jobs import Annotations
    from tsotsallm.tables.scoring import Score


def print_annotations(found: Annotations) -> None:
    """What was annotated, what was noted, what failed."""
    from tsotsallm.machine import peak_rss_bytes
    from tsotsallm.units import human_bytes, human_seconds

    names = {"cea": "cells", "cta": "columns", "cpa": "pairs of columns"}
    print(f"{found.tables} tables: " + ", ".join(f"{count:,} {names[task]}" for task, count in found.answers.items())
          + f"; {human_seconds(found.seconds)}, peak memory {human_bytes(peak_rss_bytes())}")
    print("decided by " + ", ".join(f"{'the graph alone' if model == 'none' else model} ({count} tables)"
                                    for model, count in found.models.items()))
    for note in found.graph_notes:
        print(f"note   graph: {note}")
    counted: dict[str, list[str]] = {}
    for name, notes in found.notes.items():
        for note in notes:
            counted.setdefault(note.partition(" (")[0] if "lines are" in note else note, []).append(name)
    for note, tables in counted.items():
        print(f"note   {tables[0] if len(tables) == 1 else f'{len(tables)} tables, such as {tables[0]}'}: {note}")
    for name, error in found.failed.items():
        print(f"failed {name}: {error}")
    print(f"result {found.folder}")


def print_table_scores(folders: list[str], scores: list[Score]) -> None:
    """One row a task, measure and domain; differences to the first submission with their paired intervals."""
    rows = []
    for one in scores:
        cells = [f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
                 for value, error in zip(one.values, one.errors, strict=True)]
        cells += [f"{'≈ ' if other.within_noise else ''}{100 * other.value:+.1f} [{100 * other.low:+.1f}, "
                  f"{100 * other.high:+.1f}]" for other in one.differences if other is not None]
        rows.append([one.task.upper() + (f" ({one.domain})" if one.domain else ""), one.measure, str(one.targets), *cells])
    table("Scores, %", ["task", "measure", "targets", *map(str, range(1, len(folders) + 1)),
                        *(f"{number} - 1" for number in range(2, len(folders) + 1))], rows)
    for number, folder in enumerate(folders, 1):
        print(f"{number}  {folder}")
    print("CTA is the approximate score (types above and below the right one count in part); ± is one standard error, "
          "intervals are 95%, over whole tables")
