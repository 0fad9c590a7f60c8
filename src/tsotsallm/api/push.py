"""Results on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from tsotsallm.export.publish import push as push_result
from tsotsallm.files import JsonObject


def push(result: str | Path, repository: str, *, upload: bool = False, public: bool = False) -> JsonObject:
    """Upload a result with its model card to the hub; without `upload` only list what would be sent."""
    return push_result(Path(result), repository, upload=upload, public=public)
