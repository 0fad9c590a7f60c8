"""Judge free-text answers, generated greedily: in three tiers, or by a number."""

from __future__ import annotations

import re

from tsotsallm.evaluation.significance import Measure, ratio
from tsotsallm.evaluation.tasks import Item, Task
from tsotsallm.lab.exam import ENGLISH_ARTICLES, WORLD_ARTICLES, normalise

TIERS = ("exact", "contained", "most_words")
WORDS_SHARE = 0.8
TIER_MEASURES = (Measure("right", ("right", "items"), ratio, share=True, binary=True),
                 *(Measure(f"of which {name.replace('_', ' ')}", (name, "items"), ratio, share=True) for name in TIERS))
RIGHT_MEASURES = (Measure("right", ("right", "items"), ratio, share=True, binary=True),)


def measures(task: Task) -> tuple[Measure, ...]:
    """Measures of a task of kind `answers`: the three tiers, or right and wrong alone where a number is judged."""
    return TIER_MEASURES if task.judge == "tiers" else RIGHT_MEASURES


def tier(reply: str, aliases: tuple[str, ...], *, french: bool = False) -> str | None:
    """The strictest tier in which a reply is right for any alias, or None where it is wrong.

    `exact`: equal after normalising; `contained`: an alias stands in the reply; `most_words`: at least 80% of an alias's
    words do. `french` chooses the articles that normalising drops.
    """
    articles = WORLD_ARTICLES if french else ENGLISH_ARTICLES

    def plain(text: str) -> str:
        return normalise(text, articles) or " ".join(text.casefold().split())       # an answer such as "A" or "+" stays

    given = plain(reply)
    wanted = [normalised for alias in aliases if (normalised := plain(alias))]
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
    """The last number of a text, its sign kept, without separators or trailing zeros: 1,200.50 -> 1200.5."""
    numbers = re.findall(r"(?<![\d.])-?(?:\d[\d,]*\.?\d*|\.\d+)", text.replace("$", ""))
    return _plain(numbers[-1]) if numbers else None


def first_integer(text: str) -> str | None:
    """The first run of digits in a text, without leading zeros; None where there is none."""
    digits = re.search(r"\d+", text)
    return digits[0].lstrip("0") or "0" if digits else None


def _plain(number: str) -> str:
    whole, _, fraction = number.replace(",", "").lstrip("-").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    sign = "-" if number.startswith("-") and (whole, fraction) != ("0", "") else ""
    return f"{sign}{whole}.{fraction}" if fraction else sign + whole


def judge(task: Task, item: Item, reply: str) -> dict[str, float]:
    """What one reply adds to the measures of its task: feature -> 0 or 1."""
    if task.judge == "tiers":
        reached = tier(reply, item.answers, french=bool(task.world))
        return {"right": float(reached is not None), "items": 1.0} | {name: float(reached == name) for name in TIERS}
    read = last_number if task.judge == "number" else first_integer
    given = read(reply)
    return {"right": float(given is not None and given in {read(answer) for answer in item.answers}), "items": 1.0}
