"""What a vocabulary takes in a file: a bound that is near, from tokenizer.json alone."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

NUMBER = 4
"""Bytes of a token's kind, and of its score."""
LENGTH = 8
"""Bytes of the length before every string."""
UNNAMED = 24
"""Bytes of the name of a row that no token has."""


def vocabulary_bytes(directory: Path, size: int) -> int:
    """At most so many bytes do the `size` tokens of a model take in a GGUF file, with merges and chat template.

    Of a larger vocabulary the longest tokens and merges are counted. A tokenizer that is not in tokenizer.json is taken to
    have a merge for every token, and ordinary words.
    """
    path = directory / "tokenizer.json"
    try:
        facts = path.stat()
        tokens, merges = _lengths(path, facts.st_mtime_ns, facts.st_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        tokens = merges = (UNNAMED,) * size
    named = sum(tokens[:size]) + UNNAMED * max(0, size - len(tokens))
    template = sum(file.stat().st_size for name in ("chat_template.jinja", "tokenizer_config.json")
                   if (file := directory / name).exists())
    scores_or_merges = max(NUMBER * size, sum(length + LENGTH for length in merges[:size]))
    return size * (LENGTH + NUMBER) + named + scores_or_merges + template


@lru_cache(maxsize=8)
def _lengths(path: Path, _changed: int, _size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of every token and of every merge, the longest first."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    model = content["model"]
    listed = model["vocab"] if isinstance(model["vocab"], dict) else [token for token, _score in model["vocab"]]
    names = {*listed, *(one["content"] for one in content.get("added_tokens") or ())}
    merges = (len(" ".join(pair if isinstance(pair, list) else [pair]).encode()) for pair in model.get("merges") or ())
    return tuple(sorted((len(name.encode()) for name in names), reverse=True)), tuple(sorted(merges, reverse=True))
