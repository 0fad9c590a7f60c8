"""Amounts as people write and read them: bytes and seconds."""

from __future__ import annotations

import math
import re

from tsotsallm.errors import RecipeError, TsotsallmError

MOST_PLACES = 6
"""Places after the point beyond which numbers are written with a power of ten."""


def bytes_from_text(text: str, where: str, kind: type[TsotsallmError] = RecipeError) -> int:
    """The number of bytes in a text such as 700MB, 1.5 GB or 2000: decimal units, or binary ones written as MiB.

    Raises `kind`, naming `where`, for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kMGT]?)(i?)B?)\s*", text, re.IGNORECASE)
    if match is None:
        raise kind(f"{where} is {text!r}; it takes bytes, such as 700MB or 1.5GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def human_bytes(count: float) -> str:
    """Bytes for people, in decimal units: 2.5 GB, 13.1 MB, 820 B."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def human_seconds(seconds: float) -> str:
    """Seconds for people: 1 h 32 min, 4 min 10 s, 3.2 s."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def with_error(value: float, error: float | None) -> tuple[str, str]:
    """A value and its standard error as text: two significant digits of the error, and the value to the same place.

    0.03031, 0.00142 -> ("0.0303", "0.0014"); without an error, four significant digits of the value and "".
    """
    if error is None or not math.isfinite(value) or not math.isfinite(error):
        return f"{value:.4g}", "" if error is None else f"{error:.2g}"
    if error == 0:
        return f"{value:.4g}", "0"
    last = math.floor(math.log10(float(f"{abs(error):.1e}"))) - 1       # the power of ten of the last digit
    if last >= -MOST_PLACES:
        places = max(-last, 0)
        return f"{value:.{places}f}", f"{error:.{places}f}"
    first = math.floor(math.log10(abs(value))) if value else last
    return f"{value:.{max(first - last, 0)}e}", f"{error:.1e}"


def plus_minus(value: float, error: float | None) -> str:
    """A value with its standard error, such as 0.0303 ± 0.0014."""
    shown, deviation = with_error(value, error)
    return f"{shown} ± {deviation}" if deviation else shown
