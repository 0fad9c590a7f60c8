"""Tables, notes and progress on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from tsotsallm.run.work import Progress


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table, its first column to the left and the others to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr, so that they reach whoever keeps only the table."""
    import sys

    for note in notes:
        print(f"note    {note}", file=sys.stderr)


class _Lines:
    """Progress as lines of JSON on stderr, a few a second."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console, self.last = Console(stderr=True), 0.0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def report(self, step: str, share: float) -> None:
        import json
        import sys
        import time

        if (now := time.monotonic()) - self.last > 0.2 or share >= 1:
            self.last = now
            print(json.dumps({"step": step, "share": round(share, 4)}), file=sys.stderr, flush=True)


def _for_programs() -> bool:
    """Whether a program reads the progress."""
    import os

    from tsotsallm.machine import PROGRESS

    return bool(os.environ.get(PROGRESS))


def _place(now: Progress) -> tuple[str, float]:
    """(what a run is doing, the share of the sweep that is done)."""
    done = (now.layer + 0.9 * now.share) / now.layers if now.layers else now.share
    where = f" {min(now.layer + 1, now.layers)}/{now.layers}" if now.layers else ""
    return f"{now.stages}{where} {now.step}", min(done, 1.0)


def progress_bar(quiet: bool) -> tuple[Bar | _Lines, Callable[[Progress], None]]:
    """A progress bar with layer, stage, remaining time, current and peak memory, and what moves it."""
    if _for_programs():
        lines = _Lines()

        def report(now: Progress) -> None:
            step, done = _place(now)
            lines.report(step, min(1.0, (now.sweep + done) / max(now.sweeps, 1)) if now.sweep >= 0 else 0.0)
        return lines, report

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from tsotsallm.machine import peak_rss_bytes, rss_bytes
    from tsotsallm.units import human_bytes

    console = Console(stderr=True)
    bar = Bar(TextColumn("{task.description}"), BarColumn(bar_width=10), TextColumn("{task.percentage:>3.0f}%"),
              TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.fields[memory]}"),
              console=console, disable=quiet or not console.is_terminal)
    tasks: dict[int, TaskID] = {}

    def show(now: Progress) -> None:
        if now.sweep not in tasks:
            tasks[now.sweep] = bar.add_task("", total=1.0, memory="")
        step, done = _place(now)
        bar.update(tasks[now.sweep], completed=done, description=step,
                   memory=f"{human_bytes(rss_bytes())}, peak {human_bytes(peak_rss_bytes())}")
    return bar, show


def step_bar(quiet: bool) -> tuple[Bar | _Lines, Callable[[str, float], None]]:
    """A progress bar for passes over a model, one after another, and what moves it."""
    if _for_programs():
        lines = _Lines()
        return lines, lines.report

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f}%"),
              TimeRemainingColumn(), console=console, transient=True, disable=quiet or not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def show(step: str, share: float) -> None:
        if step not in tasks:
            tasks[step] = bar.add_task(step, total=1.0)
        bar.update(tasks[step], completed=share)
    return bar, show
