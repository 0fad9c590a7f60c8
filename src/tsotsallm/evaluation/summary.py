"""Judge summaries by ROUGE (Lin 2004): overlap of words, word pairs and the longest common subsequence."""

from __future__ import annotations

from functools import cache
from typing import Any

from tsotsallm.errors import MissingExtraError
from tsotsallm.evaluation.significance import Measure, ratio
from tsotsallm.evaluation.tasks import Item

NAMES = ("rouge1", "rouge2", "rougeL")
MEASURES = tuple(Measure(name, (name, "items"), ratio, share=True) for name in NAMES)


@cache
def scorer() -> Any:
    """The scorer of the rouge-score library, with stemming, as in published results; MissingExtraError without it."""
    try:
        from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise MissingExtraError("rouge-score", "summary", "judging summaries") from None
    return RougeScorer(list(NAMES), use_stemmer=True)


def judge(item: Item, reply: str) -> dict[str, float]:
    """F1 of each ROUGE against the reference that fits best."""
    scores = [scorer().score(reference, reply.strip()) for reference in item.answers]
    return {name: max(score[name].fmeasure for score in scores) for name in NAMES} | {"items": 1.0}
