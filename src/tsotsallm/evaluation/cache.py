"""What every item of an evaluation added, kept on disk, so that a stopped evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tsotsallm.version import __version__


def cache_root() -> Path:
    """The folder of evaluation caches: $TSOTSALLM_CACHE, else ~/.cache/tsotsallm."""
    chosen = os.environ.get("TSOTSALLM_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "tsotsallm"


class ItemCache:
    """Item -> what it added to the measures, one JSON line each; a torn last line is ignored.

    A cache belongs to one model (by the hash of its weights), one task as it is asked, and one version of this package.
    """

    def __init__(self, model: str, asked: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps([model, asked, __version__], sort_keys=True).encode()).hexdigest()[:32]
        self.path = cache_root() / "evaluations" / f"{asked['name']}-{key}.jsonl"
        self.entries: dict[str, dict[str, Any]] = {}
        self.torn = False
        if self.path.exists():
            content = self.path.read_bytes()
            self.torn = bool(content) and not content.endswith(b"\n")
            for line in content.splitlines():
                try:
                    entry = json.loads(line)
                    self.entries[entry["id"]] = entry
                except (ValueError, KeyError, TypeError):
                    continue

    def add(self, item: str, features: dict[str, Any], **more: Any) -> None:
        """Keep one item's features and, for people, its reply."""
        entry = {"id": item, "features": features, **more}
        self.entries[item] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        start, self.torn = b"\n" if self.torn else b"", False
        with self.path.open("ab") as file:
            file.write(start + json.dumps(entry, ensure_ascii=False).encode() + b"\n")
