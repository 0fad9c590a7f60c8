"""Where the seconds of a run go: named parts of the work, each without the parts inside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

PARTS = ("forward passes", "backward passes", "head and loss", "Grams", "factors", "rounding", "disk")
"""The parts in the order in which they are shown; what is left is the rest."""
OF_OPERATIONS = PARTS[:5]
"""The parts that grow with the operations of a pass; the others grow with its weights."""

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
_One = TypeVar("_One")


class _Running(threading.local):
    """The parts that a thread is in, innermost last, and the seconds of the parts that it has ended."""

    def __init__(self) -> None:
        self.inside: list[list[float]] = []
        self.seconds: dict[str, float] = {}


_running = _Running()


@contextmanager
def part(name: str) -> Iterator[None]:
    """Count the seconds of a block towards a part, except those of parts inside it."""
    if name not in PARTS:
        raise KeyError(f"{name} is not one of {', '.join(PARTS)}")
    running, nested = _running, [0.0]
    running.inside.append(nested)
    began = time.perf_counter()
    try:
        yield
    finally:
        spent = time.perf_counter() - began
        running.inside.pop()
        running.seconds[name] = running.seconds.get(name, 0.0) + spent - nested[0]
        if running.inside:
            running.inside[-1][0] += spent


def counted(name: str) -> Callable[[Callable[_Given, _Made]], Callable[_Given, _Made]]:
    """Count the seconds of every call of a function towards a part."""
    def of(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
        @wraps(function)
        def within(*args: _Given.args, **named: _Given.kwargs) -> _Made:
            with part(name):
                return function(*args, **named)
        return within
    return of


@contextmanager
def shared_with_threads() -> Iterator[Callable[[Callable[[_One], _Made]], Callable[[_One], _Made]]]:
    """Count what other threads do inside the block: each part gets the share of the block's seconds that it has of theirs.

    Yields what makes work measurable: the threads call `measured(work)` instead of `work`.
    """
    spent: list[dict[str, float]] = []

    def measured(work: Callable[[_One], _Made]) -> Callable[[_One], _Made]:
        def within(item: _One) -> _Made:
            watch = Stopwatch()
            try:
                return work(item)
            finally:
                spent.append(watch.seconds())
        return within

    began = time.perf_counter()
    try:
        yield measured
    finally:
        share = (time.perf_counter() - began) / max(sum(sum(one.values()) for one in spent), 1e-9)
        for name in PARTS:
            seconds = share * sum(one[name] for one in spent)
            _running.seconds[name] = _running.seconds.get(name, 0.0) + seconds
            if _running.inside:
                _running.inside[-1][0] += seconds


class Stopwatch:
    """Measures what this thread spends on each part from now on."""

    def __init__(self) -> None:
        self._began, self._before = time.perf_counter(), dict(_running.seconds)

    def seconds(self) -> dict[str, float]:
        """Seconds of every part since the beginning, and of the rest."""
        spent = {name: _running.seconds.get(name, 0.0) - self._before.get(name, 0.0) for name in PARTS}
        return spent | {"rest": time.perf_counter() - self._began - sum(spent.values())}
