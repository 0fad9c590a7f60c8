"""Tables, notes and progress on the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn, TaskID

    from tsotsallm.fit.rounds import Round
    from tsotsallm.run.work import Progress


PROSE = 28
"""Longest text that a cell keeps on one line; longer ones are wrapped between words."""
_MEASURED = re.compile(r"[\s≈+−-]*[\d(]")


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table: numbers to the right, everything else to the left.

    Where the terminal is too narrow for it, each row becomes a paragraph: nothing is cut, and no word is broken.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    columns = [[row[number] for row in rows if number < len(row)] for number in range(len(header))]
    prose = [any(len(line) > PROSE and " " in line for cell in cells for line in cell.splitlines()) for cells in columns]
    shown = Table(title=Text(title), title_justify="left", title_style="bold", header_style="bold")
    for name, cells, wraps in zip(header, columns, prose, strict=True):
        numbers = bool(cells) and all(_MEASURED.match(cell) for cell in cells if cell)
        shown.add_column(Text(name), justify="right" if numbers and not wraps else "left", no_wrap=not wraps,
                         min_width=PROSE if wraps else None)
    for row in rows:
        shown.add_row(*map(Text, row))
    needed = (PROSE if wraps else max(len(line) for cell in (name, *cells) for line in (cell.splitlines() or [""]))
              for name, cells, wraps in zip(header, columns, prose, strict=True))
    if sum(needed) + 3 * len(header) + 1 <= console.width:
        console.print(shown)
    else:
        _paragraphs(title, header, rows)


def _paragraphs(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print rows one below the other, each cell with its heading; the first cell heads the paragraph."""
    from rich.console import Console

    console = Console(soft_wrap=False)
    console.print(title, style="bold", markup=False, highlight=False)
    width = max(map(len, header[1:]), default=0)
    for first, *others in rows:
        console.print(first or "-", markup=False, highlight=False, overflow="fold")
        for name, cell in zip(header[1:], others, strict=False):
            for line in cell.splitlines():
                for number, part in enumerate(textwrap.wrap(line, max(console.width - width - 4, 20),
                                                            break_long_words=False, break_on_hyphens=False) or [""]):
                    print(f"  {'' if number else name:{width}}  {part}".rstrip())
                name = ""


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr, so that they reach whoever keeps only the table."""
    import sys

    for note in notes:
        print(f"note    {note}", file=sys.stderr)


class _Lines:
    """Progress without a terminal: `report` prints what `text` makes of it, wherever that says something new."""

    def __init__(self, text: Callable[..., str | None]) -> None:
        self.text = text

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def report(self, step: str, share: float, **parts: object) -> None:
        import sys

        if (line := self.text(step, share, **parts)) is not None:
            print(line, file=sys.stderr, flush=True)


def _for_programs() -> Callable[..., str | None] | None:
    """What makes lines of JSON of progress and of the parts of its step, a few a second, where a program reads it."""
    import json
    import os
    import time

    from tsotsallm.machine import PROGRESS

    last = 0.0

    def text(step: str, share: float, **parts: object) -> str | None:
        nonlocal last
        if (now := time.monotonic()) - last <= 0.2 and share < 1:
            return None
        last = now
        return json.dumps({"step": step, "share": round(share, 4)} | parts)
    return text if os.environ.get(PROGRESS) else None


def candidate_line(one: Round) -> None:
    """Print a candidate of a fit as a line of JSON, where a program reads the progress."""
    import json
    import os
    import sys

    from tsotsallm.machine import PROGRESS

    if os.environ.get(PROGRESS):
        found = {"number": one.number, "name": one.name, "bytes": one.bytes, "kl": one.measured, "error": one.error}
        print(json.dumps({"candidate": found}), file=sys.stderr, flush=True)


def _for_a_log() -> Callable[..., str | None]:
    """What makes lines of progress for a file or a pipe: one for each layer, else one for each quarter of a step."""
    last: tuple[str, str, int] = ("", "", 0)

    def text(step: str, share: float, **_parts: object) -> str | None:
        nonlocal last
        layer = _LAYER.match(step)
        now = (layer[0], "", 0) if layer else ("", re.split(r"[\s\d]", step)[0], int(4 * share))
        if now == last:
            return None
        last = now
        return layer[0] if layer else f"{step} {share:.0%}"
    return text


_LAYER = re.compile(r".*? \d+/\d+")


def _clock(minutes: float | None) -> ProgressColumn:
    """The time since now, and the limit where there is one; it ticks whatever the work does."""
    import time

    from rich.progress import ProgressColumn
    from rich.text import Text

    began, limit = time.monotonic(), "" if minutes is None else f" of {minutes:g}:00"

    class Clock(ProgressColumn):
        max_refresh = None

        def render(self, _task: object) -> Text:
            gone = int(time.monotonic() - began)
            return Text(f"{gone // 60}:{gone % 60:02d}{limit}")

    return Clock()


class _Walks:
    """Which walk over the layers a run is in: a pass makes several (a survey, a sweep back, the edits), one after another.

    Within a walk, the share that is done never falls.
    """

    def __init__(self) -> None:
        self.number, self.done = -1, 1.0
        self.place: tuple[int, bool, int] = (-2, False, 0)

    def of(self, now: Progress) -> tuple[int, str, float]:
        """(number of the walk, what the run is doing, the share of the walk that is done)."""
        done = min((now.layer + 0.9 * now.share) / now.layers if now.layers else now.share, 1.0)
        place = (now.sweep, bool(now.layers), now.layer)
        again = now.layer < self.place[2] if now.layers else self.done > 0.99 and done < 0.5
        if place[:2] != self.place[:2] or again:
            self.number, self.done = self.number + 1, 0.0
        self.place, self.done = place, max(self.done, done)
        where = f" {min(now.layer + 1, now.layers)}/{now.layers}" if now.layers else ""
        return self.number, f"{now.stages}{where} {now.step}", self.done


def _bar(*columns: ProgressColumn, quiet: bool, transient: bool = False) -> Bar:
    """A bar on stderr that is as wide as the terminal; what does not fit is cut from the description alone."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = Console(stderr=True)
    whole = Column(no_wrap=True)
    return Bar(TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
               BarColumn(bar_width=10), TextColumn("{task.percentage:>3.0f}%", table_column=whole),
               TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=7)), *columns,
               console=console, disable=quiet or not console.is_terminal, expand=True, transient=transient)


def _reporter(quiet: bool) -> _Lines | None:
    """What takes progress where there is no bar; None where stderr is a terminal, or nothing is to be seen."""
    import sys

    if (text := _for_programs()) is not None:
        return _Lines(text)
    return None if quiet or sys.stderr.isatty() else _Lines(_for_a_log())


def progress_bar(quiet: bool, minutes: float | None = None) -> tuple[Bar | _Lines, Callable[[Progress], None]]:
    """A progress bar with layer, stage, remaining time, a clock (with its limit in minutes) and peak memory, and what moves
    it."""
    walks = _Walks()
    if (lines := _reporter(quiet)) is not None:
        def report(now: Progress) -> None:
            _, step, done = walks.of(now)
            lines.report(step, min(1.0, (now.sweep + done) / max(now.sweeps, 1)) if now.sweep >= 0 else 0.0,
                         stage=now.stages.removesuffix(":"), layer=min(now.layer + 1, now.layers), layers=now.layers,
                         done=round(done, 4))
        return lines, report

    from rich.progress import TextColumn
    from rich.table import Column

    from tsotsallm.machine import peak_rss_bytes
    from tsotsallm.units import human_bytes

    bar = _bar(_clock(minutes), TextColumn("{task.fields[memory]}", table_column=Column(no_wrap=True)), quiet=quiet)
    tasks: dict[int, TaskID] = {}

    def show(now: Progress) -> None:
        number, step, done = walks.of(now)
        if number not in tasks:
            tasks[number] = bar.add_task("", total=1.0, memory="")
        bar.update(tasks[number], completed=done, description=step, memory=f"peak {human_bytes(peak_rss_bytes())}")
    return bar, show


def step_bar(quiet: bool) -> tuple[Bar | _Lines, Callable[[str, float], None]]:
    """A progress bar for passes over a model, one after another, and what moves it."""
    if (lines := _reporter(quiet)) is not None:
        return lines, lines.report

    bar = _bar(quiet=quiet, transient=True)
    tasks: dict[str, TaskID] = {}

    def show(step: str, share: float) -> None:
        if step not in tasks:
            tasks[step] = bar.add_task(step, total=1.0)
        bar.update(tasks[step], completed=share)
    return bar, show


def short_names(models: Sequence[str]) -> list[str]:
    """The last part of every model's name, or the whole where two would be the same."""
    short = [Path(model).name or model for model in models]
    return short if len(set(short)) == len(short) else list(models)
