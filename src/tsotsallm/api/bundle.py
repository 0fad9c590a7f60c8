"""A folder for a USB stick with everything that runs models offline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tsotsallm.serve import bundle as bundles
from tsotsallm.serve.bundle import Bundled


def make_bundle(models: Sequence[str | Path], out: str | Path, *, platform: str | None = None, python: str | None = None,
                index: str | None = None, say: Callable[[str], None] = print) -> Bundled:
    """Write a folder with everything that a computer without a connection needs to run models.

    `platform` (such as linux-x86_64) and `python` (such as 3.12) are those of that computer, `index` is a further package
    index.
    """
    return bundles.bundle([str(model) for model in models], Path(out), platform=platform, python=python, index=index,
                          say=say)


def verify_bundle(folder: str | Path) -> int:
    """Check every file of a bundle against its checksum; returns their number. Raises ServeError for one that differs."""
    return bundles.verify(Path(folder))
