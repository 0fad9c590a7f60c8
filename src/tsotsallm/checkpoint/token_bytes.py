"""The bytes that a vocabulary takes in a GGUF file: a close upper bound, from tokenizer.json alone."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
NUMBER = 4
"""Bytes of a token's kind, and of its score."""
LENGTH = 8
"""Bytes of the length before every string."""
UNNAMED = 24
"""Bytes of the name of a row that no token has."""


def vocabulary_bytes(directory: Path, size: int) -> int:
    """An upper bound on the bytes of a model's `size` tokens, with merges or scores, and of the chat template.

    Of a larger vocabulary the longest tokens and the longest merges are counted. A tokenizer that is not in tokenizer.json
    is assumed to have ordinary words and a merge for every token.
    """
    path = directory / "tokenizer.json"
    try:
        facts = path.stat()
        tokens, merges = _lengths(path, facts.st_mtime_ns, facts.st_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        tokens, merges = (UNNAMED,) * size, (UNNAMED + LENGTH,) * size
    named = sum(tokens[:size]) + UNNAMED * max(0, size - len(tokens))
    template = sum(file.stat().st_size for name in ("chat_template.jinja", "tokenizer_config.json")
                   if (file := directory / name).exists())
    return size * (LENGTH + NUMBER) + named + max(NUMBER * size, sum(merges[:size])) + template


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json works like SentencePiece: spaces are symbols of their own, and unknown text becomes bytes."""
    return bool(content["model"].get("byte_fallback")) and SPACE in json.dumps(
        [content.get("normalizer"), content.get("pre_tokenizer")], ensure_ascii=False)


@lru_cache(maxsize=8)
def _lengths(path: Path, _changed: int, _size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of every token, and of all merges that make a token (none in SentencePiece), both longest first."""
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    model = content["model"]
    listed = model["vocab"] if isinstance(model["vocab"], dict) else [token for token, _score in model["vocab"]]
    names = {*listed, *(token["content"] for token in content.get("added_tokens") or ())}
    merges: Counter[str] = Counter()
    if not is_sentencepiece(content):
        for merge in model.get("merges") or ():
            left, right = merge if isinstance(merge, list) else merge.split(" ", 1)
            merges[left + right] += len(f"{left} {right}".encode()) + LENGTH
    return tuple(sorted((len(name.encode()) for name in names), reverse=True)), tuple(sorted(merges.values(), reverse=True))
