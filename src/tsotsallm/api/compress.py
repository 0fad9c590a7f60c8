"""A model made smaller by a recipe."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from tsotsallm import compression
from tsotsallm.analysis import pictures
from tsotsallm.errors import MissingExtraError
from tsotsallm.run.run import Result

Given = ParamSpec("Given")


def _draw(out: Path) -> None:
    """A picture beside the curve of every training and beside every decision; without matplotlib the numbers alone."""
    try:
        for path in sorted(out.glob("training-*.json")):
            pictures.training_curve(json.loads(path.read_text("utf-8")), path.with_suffix(".png"))
        for path in sorted(out.glob("decision-*.json")):
            decision = json.loads(path.read_text("utf-8"))
            draw = next((kind for key, kind in (("ranks", pictures.ranks), ("grids", pictures.grids)) if key in decision),
                        pictures.selection)
            draw(decision, path.with_suffix(".png"))
    except MissingExtraError:
        return


def _drawn(compress: Callable[Given, Result]) -> Callable[Given, Result]:
    """The same, with pictures of what was learned and decided in the result."""
    @functools.wraps(compress)
    def drawn(*args: Given.args, **settings: Given.kwargs) -> Result:
        result = compress(*args, **settings)
        _draw(result.path)
        return result
    return drawn


compress = _drawn(compression.compress)
