"""What every item of an evaluation added to its measures, kept on disk, so that a stopped evaluation resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NotRequired, TypedDict

from tsotsallm.machine import cache_root
from tsotsallm.version import __version__


class CacheEntry(TypedDict):
    """One line of a cache: an item, its features (numbers, or a number per window), and for people what was answered."""

    id: str
    features: dict[str, float] | dict[str, list[float]]
    reply: NotRequired[str]
    log_likelihoods: NotRequired[list[float]]


class ItemCache:
    """Item -> what it added to the measures, one JSON line each; a torn last line is ignored.

    A cache belongs to one model (by the hash of its weights), one task with its protocol, and one version of this package.
    """

    def __init__(self, model: str, asked: Mapping[str, object]) -> None:
        key = hashlib.sha256(json.dumps([model, asked, __version__], sort_keys=True).encode()).hexdigest()[:32]
        self.path = cache_root() / "evaluations" / f"{asked['name']}-{key}.jsonl"
        self.entries: dict[str, CacheEntry] = {}
        self.torn = False
        if self.path.exists():
            content = self.path.read_bytes()
            self.torn = bool(content) and not content.endswith(b"\n")
            for line in content.splitlines():
                try:
                    entry: CacheEntry = json.loads(line)
                    self.entries[entry["id"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue

    def add(self, item: str, features: dict[str, float] | dict[str, list[float]], *, reply: str | None = None,
            log_likelihoods: list[float] | None = None) -> None:
        """Append one item's features and, for people, its reply or the log-likelihoods of its choices, in nats."""
        entry: CacheEntry = {"id": item, "features": features}
        if reply is not None:
            entry["reply"] = reply
        if log_likelihoods is not None:
            entry["log_likelihoods"] = log_likelihoods
        self.entries[item] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        start, self.torn = b"\n" if self.torn else b"", False
        with self.path.open("ab") as file:
            file.write(start + json.dumps(entry, ensure_ascii=False).encode() + b"\n")
