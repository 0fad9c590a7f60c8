"""What models scored on a task, and results of one task side by side, with the errors of scores and of differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tsotsallm.errors import TsotsallmError
from tsotsallm.evaluation.significance import Array, Difference, Measure, finite, paired_difference, standard_error

TOKENIZER_FREE = ("bits per byte",)
"""Measures that compare models whose tokenizers split a text differently."""


@dataclass(frozen=True)
class TaskScore:
    """A measure of one model on one task, or on one group of its items, with its standard error."""

    measure: str
    value: float
    standard_error: float | None
    items: int
    group: str = ""

    def plain(self) -> dict[str, object]:
        """The fields as plain data for JSON; what is not finite becomes None."""
        return finite(self.__dict__)


@dataclass(frozen=True)
class Exchange:
    """An instruction, what a model answered, and what that added to the measures."""

    group: str
    prompt: str
    reply: str
    features: Mapping[str, float | list[float]]


@dataclass(frozen=True)
class TaskResult:
    """What one model scored on one task; `features` holds one number per item, in the order of `ids`."""

    task: str
    kind: str
    model: str
    protocol: Mapping[str, object]
    measures: tuple[Measure, ...]
    ids: tuple[str, ...]
    groups: tuple[str, ...]
    features: dict[str, Array] = field(repr=False)
    notes: tuple[str, ...] = ()
    exchanges: tuple[Exchange, ...] = field(default=(), repr=False)

    def items_of(self, measure: Measure, group: str = "") -> Array:
        """The rows of a measure's features, (items, features)."""
        chosen = np.array([not group or of_item == group for of_item in self.groups])
        return np.stack([self.features[name][chosen] for name in measure.features], -1)

    @property
    def scores(self) -> list[TaskScore]:
        """All measures on all items, then on every group where there are several."""
        groups = sorted(set(self.groups))
        scores = []
        for group in ("", *(groups if len(groups) > 1 else ())):
            for measure in self.measures:
                items = self.items_of(measure, group)
                scores.append(TaskScore(measure.name, measure.of(items), standard_error(measure, items), len(items), group))
        return scores

    def plain(self) -> dict[str, object]:
        """Task, protocol, scores and notes as plain data for JSON; features of single items are left out."""
        found = {"task": self.task, "kind": self.kind, "model": self.model, "protocol": self.protocol,
                 "scores": [score.plain() for score in self.scores], "notes": list(self.notes)}
        return found | ({"answers": [dict(one.__dict__) for one in self.exchanges]} if self.exchanges else {})


@dataclass(frozen=True)
class Comparison:
    """One measure of several models on the same items; differences are from the first model."""

    task: str
    measure: str
    group: str
    items: int
    share: bool
    higher_is_better: bool
    scores: tuple[TaskScore, ...]
    differences: tuple[Difference | None, ...]

    def plain(self) -> dict[str, object]:
        """The fields as plain data for JSON."""
        return {**self.__dict__, "scores": [score.plain() for score in self.scores],
                "differences": [None if difference is None else difference.plain() for difference in self.differences]}


def compare(results: Sequence[TaskResult], *, seed: int = 0) -> list[Comparison]:
    """Put results of one task side by side, with differences from the first one.

    Raises TsotsallmError where two results were taken under different protocols; `seed` is that of the bootstrap.
    """
    first = results[0]
    names = [comparable(first.task, first.protocol, other.protocol) for other in results[1:]]
    groups = sorted(set(first.groups))
    comparisons = []
    for group in ("", *(groups if len(groups) > 1 else ())):
        for measure in first.measures:
            if any(allowed is not None and measure.name not in allowed for allowed in names) or any(
                    measure.name not in {own.name for own in other.measures} for other in results):
                continue
            rows = [result.items_of(measure, group) for result in results]
            scores = tuple(TaskScore(measure.name, measure.of(items), standard_error(measure, items), len(items), group)
                           for items in rows)
            differences = (None, *(_difference(measure, rows[0], items, seed, paired=allowed is None)
                                   for items, allowed in zip(rows[1:], names, strict=True)))
            comparisons.append(Comparison(first.task, measure.name, group, len(rows[0]), measure.share,
                                          measure.higher_is_better, scores, differences))
    return comparisons


def _difference(measure: Measure, first: Array, second: Array, seed: int, *, paired: bool) -> Difference:
    if paired:
        return paired_difference(measure, first, second, seed=seed)
    # another tokenizer's windows hold other text, so items do not pair up, and the errors add
    value = measure.of(second) - measure.of(first)
    spread = [standard_error(measure, items) for items in (first, second)]
    width = 1.96 * math.hypot(*(math.inf if error is None else error for error in spread))
    return Difference(value, value - width, value + width)


def comparable(task: str, first: Mapping[str, object], other: Mapping[str, object]) -> set[str] | None:
    """None where two protocols are the same, else the names of the measures that can be compared all the same.

    Models with different tokenizers compare by bits per byte of the whole text. Raises TsotsallmError where no measure can
    be compared.
    """
    differing = {key for key in {**first, **other} if first.get(key) != other.get(key)} - {"truncated_prompts"}
    if not differing:
        return None
    if first.get("kind") == "perplexity" and differing <= {"tokenizer", "bos"} and first["limit"] is None:
        return set(TOKENIZER_FREE)
    listed = "; ".join(f"{key}: {first.get(key)!r} and {other.get(key)!r}" for key in sorted(differing))
    more = ", and without a limit, since their windows hold different text" if "tokenizer" in differing else ""
    raise TsotsallmError(f"{task}: the models would be evaluated in different ways ({listed}); numbers compare only under "
                         f"one protocol: evaluate all with the same options{more}, or one by one")
