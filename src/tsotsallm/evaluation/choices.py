"""Multiple choice by log-likelihood: the answer is the choice that the model finds likeliest after the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from tsotsallm.evaluation.significance import Measure, ratio
from tsotsallm.evaluation.tasks import Item
from tsotsallm.streaming.likelihood import Likelihood

MEASURES = (Measure("acc", ("right", "items"), ratio, share=True, binary=True),
            Measure("acc_norm", ("right_norm", "items"), ratio, share=True, binary=True),
            Measure("acc_bytes", ("right_bytes", "items"), ratio, share=True, binary=True))


def judge(item: Item, scores: Sequence[Likelihood]) -> dict[str, float]:
    """Right or wrong by the sum of log p, by log p per character (`acc_norm`) and per UTF-8 byte, as lm-eval does.

    Lengths are those of the choice's text without the delimiter before it; the first of equal choices wins.
    """
    totals = [score.total for score in scores]
    lengths = [max(len(choice), 1) for choice in item.choices]
    sizes = [max(len(choice.encode()), 1) for choice in item.choices]
    return {"right": float(likeliest(totals) == item.gold),
            "right_norm": float(likeliest([total / length for total, length in zip(totals, lengths, strict=True)])
                                == item.gold),
            "right_bytes": float(likeliest([total / size for total, size in zip(totals, sizes, strict=True)]) == item.gold),
            "items": 1.0}


def likeliest(scores: Sequence[float]) -> int:
    """Index of the highest score, the first one of equals."""
    return max(range(len(scores)), key=lambda index: scores[index])
