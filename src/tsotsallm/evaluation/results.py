"""What models scored on a task, and results of one task side by side, with the errors of scores and of differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tsotsallm.errors import TsotsallmError
from tsotsallm.evaluation.significance import Array, Difference, Measure, finite, paired_difference, standard_error

TOKENIZER_FREE = ("bits per byte",)
"""Measures that compare between models which cut a text into different tokens."""


@dataclass(frozen=True)
class TaskScore:
    """A measure of one model on one task, or on one group of its items."""

    measure: str
    value: float
    standard_error: float | None
    items: int
    group: str = ""

    def plain(self) -> dict[str, Any]:
        return finite(self.__dict__)


@dataclass(frozen=True)
class TaskResult:
    """What one model scored on one task; rows of `features` belong to `ids`."""

    task: str
    kind: str
    model: str
    protocol: dict[str, Any]
    measures: tuple[Measure, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    features: dict[str, Array] = field(repr=False)
    notes: tuple[str, ...] = ()

    def items_of(self, measure: Measure, group: str = "") -> Array:
        """The rows of a measure's features, (items, features)."""
        chosen = np.array([not group or one == group for one in self.groups])
        return np.stack([self.features[name][chosen] for name in measure.features], -1)

    @property
    def scores(self) -> list[TaskScore]:
        """All measures on all items, then on every group where there are several."""
        kinds = sorted(set(self.groups))
        found = []
        for group in ("", *(kinds if len(kinds) > 1 else ())):
            for measure in self.measures:
                items = self.items_of(measure, group)
                found.append(TaskScore(measure.name, measure.of(items), standard_error(measure, items), len(items), group))
        return found

    def plain(self) -> dict[str, Any]:
        return {"task": self.task, "kind": self.kind, "model": self.model, "protocol": self.protocol,
                "scores": [score.plain() for score in self.scores], "notes": list(self.notes)}


@dataclass(frozen=True)
class Comparison:
    """One measure of several models on the same items; differences are to the first model."""

    task: str
    measure: str
    group: str
    items: int
    share: bool
    higher_is_better: bool
    scores: tuple[TaskScore, ...]
    differences: tuple[Difference | None, ...]

    def plain(self) -> dict[str, Any]:
        return {**self.__dict__, "scores": [score.plain() for score in self.scores],
                "differences": [None if one is None else one.plain() for one in self.differences]}


def compare(results: Sequence[TaskResult], *, seed: int = 0) -> list[Comparison]:
    """Put results of one task side by side, the first one the base; refuse what was taken in different ways."""
    first = results[0]
    names = [comparable(first.task, first.protocol, other.protocol) for other in results[1:]]
    kinds = sorted(set(first.groups))
    found = []
    for group in ("", *(kinds if len(kinds) > 1 else ())):
        for measure in first.measures:
            if any(allowed is not None and measure.name not in allowed for allowed in names) or any(
                    measure.name not in {one.name for one in other.measures} for other in results):
                continue
            rows = [result.items_of(measure, group) for result in results]
            scores = tuple(TaskScore(measure.name, measure.of(items), standard_error(measure, items), len(items), group)
                           for items in rows)
            differences = (None, *(_difference(measure, rows[0], items, seed, paired=allowed is None)
                                   for items, allowed in zip(rows[1:], names, strict=True)))
            found.append(Comparison(first.task, measure.name, group, len(rows[0]), measure.share, measure.higher_is_better,
                                    scores, differences))
    return found


def _difference(measure: Measure, first: Array, second: Array, seed: int, *, paired: bool) -> Difference:
    if paired:
        return paired_difference(measure, first, second, seed=seed)
    # windows of another tokenizer hold other text: no pairs, so the errors add
    value = measure.of(second) - measure.of(first)
    spread = [standard_error(measure, items) for items in (first, second)]
    width = 1.96 * math.hypot(*(math.inf if one is None else one for one in spread))
    return Difference(value, value - width, value + width)


def comparable(task: str, first: dict[str, Any], other: dict[str, Any]) -> set[str] | None:
    """None where two protocols are the same; the names of the measures that compare nevertheless; raise where none does.

    Perplexities of other tokenizers compare by bits per byte of the whole text.
    """
    differing = {key for key in {**first, **other} if first.get(key) != other.get(key)} - {"truncated_prompts"}
    if not differing:
        return None
    if first.get("kind") == "perplexity" and differing <= {"tokenizer", "bos"} and first["limit"] is None:
        return set(TOKENIZER_FREE)
    told = "; ".join(f"{key}: {first.get(key)!r} and {other.get(key)!r}" for key in sorted(differing))
    more = ", and without a limit, since windows hold other text then" if "tokenizer" in differing else ""
    raise TsotsallmError(f"{task}: the models would be asked in different ways ({told}); numbers compare only under one "
                         f"protocol: evaluate all with the same options{more}, or one by one")
