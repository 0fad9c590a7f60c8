"""Text of cells and labels: one form for comparing, trigrams for finding, and how to recognise numbers and dates."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from types import ModuleType

from tsotsallm.errors import MissingExtraError

NOTHING = frozenset({"", "-", "–", "—", "?", "nan", "none", "null", "n/a", "na", "nil"})
_NUMBER = re.compile(r"[<>~±≈]?\s*[-+−]?[$€£]?\s*\d[\d .,'’]*(?:\s*[±x×]\s*\d[\d.,]*)?(?:e[-+]?\d+)?\s*"
                     r"(?:%|[a-zµ°/²³]{1,5})?", re.IGNORECASE)
_DATE = re.compile(r"[-+]?\d{1,4}[-/.]\d{1,2}(?:[-/.]\d{1,4})?(?:[T ]\d{1,2}:\d{2}(?::\d{2})?(?:\.\d+)?Z?)?")
_LETTERS = {"ß": "ss", "ø": "o", "æ": "ae", "œ": "oe", "đ": "d", "ð": "d", "ł": "l", "þ": "th", "ı": "i"}


@lru_cache(maxsize=65536)
def normalise(text: str) -> str:
    """Lower case without accents and punctuation, with single spaces: the same for all spellings of one name."""
    apart = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(_LETTERS.get(letter, letter) for letter in apart if not unicodedata.combining(letter))
    words = " ".join(re.sub(r"[^\w]+|_+", " ", plain).split())
    return words or " ".join(text.split())


def trigrams(normal: str) -> list[str]:
    """The distinct trigrams of a normalised text, in order."""
    return list(dict.fromkeys(normal[place:place + 3] for place in range(len(normal) - 2)))


def is_missing(cell: str) -> bool:
    """Whether a cell is empty or holds a mark for a missing value."""
    return cell.strip().casefold() in NOTHING


def is_literal(cell: str) -> bool:
    """Whether a cell is a number, a quantity or a date, which name no entity."""
    text = cell.strip()
    return bool(_NUMBER.fullmatch(text) or _DATE.fullmatch(text))


def same_literal(cell: str, value: str) -> bool:
    """Whether a cell gives a literal of the graph: the same text, number (within 0.5%), date, or year of a date."""
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


def fuzz() -> tuple[ModuleType, ModuleType]:
    """rapidfuzz's (fuzz, DamerauLevenshtein), which have no types here; MissingExtraError where it is not installed."""
    try:
        from rapidfuzz import fuzz as rapidfuzz
        from rapidfuzz.distance import DamerauLevenshtein
    except ImportError:
        raise MissingExtraError("rapidfuzz", "tables", "finding misspelt names") from None
    return rapidfuzz, DamerauLevenshtein


def similarity(asked: str, label: str) -> float:
    """Similarity of a normalised text to a normalised label, 0 to 1.

    1 − edits/length (Damerau and Levenshtein), or 0.97 of that after sorting the words; initials that stand for words give
    at least 0.9, and a text whose words are all among the label's, or the reverse, at least 0.6 to 0.85 by their lengths.
    """
    fuzz_, damerau = fuzz()
    plain = float(damerau.normalized_similarity(asked, label))
    words, others = asked.split(), label.split()
    best = max(plain, 0.97 * float(fuzz_.token_sort_ratio(asked, label)) / 100)
    if len(words) > 1 and len(words) == len(others) and any(len(word) == 1 for word in words) and all(
            word == other or (len(word) == 1 and other.startswith(word)) for word, other in zip(words, others, strict=True)):
        best = max(best, 0.9)
    if min(len(asked), len(label)) > 2 and (set(words) <= set(others) or set(others) <= set(words)):
        best = max(best, 0.6 + 0.25 * min(len(asked), len(label)) / max(len(asked), len(label)))
    return best
