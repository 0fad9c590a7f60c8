"""Questions answered in words: greedy text, judged in three tiers."""

from __future__ import annotations

import re
from typing import Any

from tsotsallm.evaluation.significance import Measure, ratio
from tsotsallm.evaluation.tasks import Item, Task
from tsotsallm.lab.exam import ENGLISH_ARTICLES, WORLD_ARTICLES, normalise

TIERS = ("exact", "contained", "most_words")
WORDS_SHARE = 0.8
TIER_MEASURES = (Measure("right", ("right", "items"), ratio, share=True, binary=True),
                 *(Measure(f"of which {name.replace('_', ' ')}", (name, "items"), ratio, share=True) for name in TIERS))
RIGHT_MEASURES = (Measure("right", ("right", "items"), ratio, share=True, binary=True),)


def measures(task: Task) -> tuple[Measure, ...]:
    """The measures of a task of answers."""
    return TIER_MEASURES if task.judge == "tiers" else RIGHT_MEASURES


def tier(reply: str, aliases: tuple[str, ...], *, french: bool = False) -> str | None:
    """How a reply is right: `exact` after normalising, an alias `contained` in it, `most_words` (at least 80% of an
    alias's words are in it), or None. The strictest that holds for any alias is reported."""
    articles = WORLD_ARTICLES if french else ENGLISH_ARTICLES

    def plain(text: str) -> str:
        return normalise(text, articles) or " ".join(text.casefold().split())       # an answer such as "A" or "+" stays

    given = plain(reply)
    wanted = [found for alias in aliases if (found := plain(alias))]
    words = set(given.split())
    if given in wanted:
        return "exact"
    if any(re.search(rf"(?<!\w){re.escape(alias)}(?!\w)", given) for alias in wanted):
        return "contained"
    for alias in wanted:
        parts = alias.split()
        if sum(part in words for part in parts) >= WORDS_SHARE * len(parts):
            return "most_words"
    return None


def last_number(text: str) -> str | None:
    """The last number of a text without separators, sign kept: 1,200.50 -> 1200.5."""
    found = re.findall(r"(?<![\d.])-?(?:\d[\d,]*\.?\d*|\.\d+)", text.replace("$", ""))
    return _plain(found[-1]) if found else None


def first_integer(text: str) -> str | None:
    """The first integer of a text."""
    found = re.search(r"\d+", text)
    return found[0].lstrip("0") or "0" if found else None


def _plain(number: str) -> str:
    whole, _, fraction = number.replace(",", "").lstrip("-").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    sign = "-" if number.startswith("-") and (whole, fraction) != ("0", "") else ""
    return f"{sign}{whole}.{fraction}" if fraction else sign + whole


def judge(task: Task, item: Item, reply: str) -> dict[str, float]:
    """One item's part in the measures of its task."""
    if task.judge == "tiers":
        found = tier(reply, item.answers, french=bool(task.world))
        return {"right": float(found is not None), "items": 1.0} | {name: float(found == name) for name in TIERS}
    read: Any = last_number if task.judge == "number" else first_integer
    given = read(reply)
    return {"right": float(given is not None and given in {read(answer) for answer in item.answers}), "items": 1.0}
