"""Data sets on the Hugging Face hub: whether they can be reached, and their rows."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tsotsallm.errors import MissingExtraError, TsotsallmError, install_command
from tsotsallm.files import JsonObject, one_line

SECONDS = 3.0
"""How long the hub may take to answer before it counts as unreachable."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def is_name(source: str) -> bool:
    """Whether a source names a data set of the hub, as owner/name, and is not a file or folder."""
    return not Path(source).exists() and source.count("/") == 1 and not Path(source).suffix and source[0] not in ".~"


def obstacle() -> str | None:
    """What the user must do before a data set of the hub can be read; None where nothing seems to be in the way."""
    try:
        version("datasets")
    except PackageNotFoundError:
        return install_command("hub")
    for name in OFFLINE:
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"unset {name}"
    obstacles = [f"no answer within {SECONDS:.0f} s"]

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=SECONDS).close()
        except urllib.error.HTTPError:
            pass                        # the hub answers
        except (OSError, ValueError) as error:
            obstacles.append(one_line(getattr(error, "reason", error)))
            return
        obstacles.clear()

    asking = threading.Thread(target=ask, daemon=True)      # resolving a name has no time limit of its own
    asking.start()
    asking.join(SECONDS)
    return f"connect to the internet ({obstacles[-1]})" if obstacles else None


def rows(repository: str, configuration: str | None = None, *, split: str, kind: type[TsotsallmError],
         instead: str) -> Iterator[JsonObject]:
    """Yield the rows of a data set as they are downloaded.

    Raises `kind` where the data set cannot be reached or read, with the remedy `instead`, and MissingExtraError without the
    package `datasets`.
    """
    what = f"the data set {repository} of the hub"
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise MissingExtraError("datasets", "hub", f"reading {what}") from None
    if (first := obstacle()) is not None:       # its library would try for half a minute
        raise kind(f"{what} is out of reach: {first}, or {instead}")
    try:
        yield from load_dataset(repository, configuration, split=split, streaming=True)
    except GeneratorExit:
        raise
    except Exception as error:  # the hub client raises many types
        raise kind(f"{what} cannot be read ({type(error).__name__}: {one_line(error)}); {instead}") from None
