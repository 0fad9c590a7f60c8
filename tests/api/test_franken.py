"""franken: the unchanged order first, then the others as `layers` would make them."""

from __future__ import annotations

from pathlib import Path

import pytest

import tsotsallm
from tsotsallm.errors import CorpusError


def test_an_order_is_measured_as_the_model_that_it_makes(tiny: Path, text: Path, tmp_path: Path) -> None:
    results = tsotsallm.franken(tiny, text, limit=2, only=["baseline", "only_odd_layers"])
    first, odd = results
    assert first.order == [0, 1, 2, 3]
    assert first.kl == pytest.approx(0, abs=1e-6)
    tsotsallm.compress(tiny, [{"layers": {"order": odd.order}}], tmp_path / "odd")
    written = tsotsallm.evaluate(tmp_path / "odd", text, context=256, limit=2, reference=tiny)
    assert odd.perplexity == pytest.approx(written.perplexity, rel=1e-5)
    assert odd.kl == pytest.approx(written.kl, rel=1e-4)
    with pytest.raises(CorpusError, match="give a text"):
        next(tsotsallm.franken(tiny))
