"""Amounts as people write and read them: bytes and seconds."""

from __future__ import annotations

import re

from tsotsallm.errors import RecipeError, TsotsallmError


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
