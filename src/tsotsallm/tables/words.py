"""Text of cells and labels: one form for comparing, trigrams for finding, and what is a number or a date."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Any

from tsotsallm.errors import MissingExtraError

NOTHING = frozenset({"", "-", "–", "—", "?", "nan", "none", "null", "n/a", "na", "nil"})
_NUMBER = re.compile(r"[<>~±≈]?\s*[-+−]?[$€£]?\s*\d[\d .,'’]*(?:\s*[±x×]\s*\d[\d.,]*)?(?:e[-+]?\d+)?\s*"
                     r"(?:%|[a-zµ°/²³]{1,5})?", re.IGNORECASE)
_DATE = re.compile(r"[-+]?\d{1,4}[-/.]\d{1,2}(?:[-/.]\d{1,4})?(?:[T ]\d{1,2}:\d{2}(?::\d{2})?(?:\.\d+)?Z?)?")
_LETTERS = {"ß": "ss", "ø": "o", "æ": "ae", "œ": "oe", "đ": "d", "ð": "d", "ł": "l", "þ": "th", "ı": "i"}


@lru_cache(maxsize=65536)
def normalise(text: str) -> str:
    """Small letters without accents and punctuation, single spaces: equal for ways of writing one name."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(_LETTERS.get(letter, letter) for letter in apart if not unicodedata.combining(letter))
    found = " ".join(re.sub(r"[^\w]+|_+", " ", plain).split())
    return found or " ".join(text.split())


def trigrams(normal: str) -> list[str]:
    """The different trigrams of a normalised text, in order."""
    return list(dict.fromkeys(normal[place:place + 3] for place in range(len(normal) - 2)))


def is_missing(cell: str) -> bool:
    return cell.strip().casefold() in NOTHING


def is_literal(cell: str) -> bool:
    """True for numbers, quantities and dates, which name no entity."""
    text = cell.strip()
    return bool(_NUMBER.fullmatch(text) or _DATE.fullmatch(text))


def same_literal(cell: str, value: str) -> bool:
    """True where a cell says a literal of the graph: the same text, number, date, or year of a date."""
    if normalise(cell) == normalise(value):
        return True
    left, right = _as_number(cell), _as_number(value)
    if left is not None and right is not None:
        return abs(left - right) <= 0.005 * max(abs(left), abs(right))
    short = cell.strip()
    return len(short) >= 4 and bool(_DATE.fullmatch(value.strip())) and value.strip().lstrip("+").startswith(short)


def _as_number(text: str) -> float | None:
    try:
        return float(text.strip().replace(" ", "").replace("−", "-").lstrip("+").replace(",", ""))
    except ValueError:
        return None


def fuzz() -> Any:
    """The library of edit distances."""
    try:
        from rapidfuzz import fuzz as found
        from rapidfuzz.distance import DamerauLevenshtein, JaroWinkler
    except ImportError:
        raise MissingExtraError("rapidfuzz", "tables", "finding misspelt names") from None
    return found, DamerauLevenshtein, JaroWinkler


def similarity(asked: str, label: str) -> float:
    """How well a normalised text says a normalised label, 0 to 1.

    1 − edits/length (Damerau and Levenshtein), or a little less than that of the words in another order; initials that stand
    for words count 0.9, and a text whose words are all among the label's counts 0.6 to 0.85 by the share of it that it says.
    """
    fuzz_, damerau, _ = fuzz()
    plain = float(damerau.normalized_similarity(asked, label))
    words, others = asked.split(), label.split()
    best = max(plain, 0.97 * float(fuzz_.token_sort_ratio(asked, label)) / 100)
    if len(words) > 1 and len(words) == len(others) and any(len(word) == 1 for word in words) and all(
            one == other or (len(one) == 1 and other.startswith(one)) for one, other in zip(words, others, strict=True)):
        best = max(best, 0.9)
    if min(len(asked), len(label)) > 2 and (set(words) <= set(others) or set(others) <= set(words)):
        best = max(best, 0.6 + 0.25 * min(len(asked), len(label)) / max(len(asked), len(label)))
    return best
