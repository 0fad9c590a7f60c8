"""The layer-order study: the rule of rescaling, and its numbers against models that are really written."""

from __future__ import annotations

from pathlib import Path

import pytest

import tsotsallm
from tests.conftest import build, shared
from tsotsallm.evaluation.franken import published, rescale


def test_the_published_orders_are_all_there() -> None:
    import yaml

    reference = yaml.safe_load(shared("reference", "franken_layer_orders.yaml").read_text())
    layers, orders = published()
    assert layers == reference["layers"]
    assert [(one.name, list(one.order), one.hellaswag, one.seconds) for one in orders] == [
        (one["name"], one["order"], one["hellaswag"], one["seconds"]) for one in reference["configurations"]]


@pytest.mark.parametrize("layers", [14, 16, 32, 64, 80])
def test_rescaling_keeps_shares_and_depths(layers: int) -> None:
    source, orders = published()
    for one in orders:
        order = rescale(one.order, source, layers)
        assert all(0 <= layer < layers for layer in order)
        assert abs(len(order) - len(one.order) * layers / source) <= 1
        depth, original = sum(order) / len(order) / layers, sum(one.order) / len(one.order) / source
        assert depth == pytest.approx(original, abs=0.06 + 0.5 / layers)
        if len(one.order) == source and len(set(one.order)) == source:
            assert order == list(range(layers))
        elif len(one.order) < source:
            assert len(order) < layers
    assert [rescale(one.order, source, source) for one in orders] == [list(one.order) for one in orders]


def test_repeats_stay_repeats() -> None:
    assert rescale([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], 8, 4) == [0, 0, 0, 1, 1, 1]
    assert rescale([0, 2, 4, 6], 8, 4) in ([0, 2], [1, 3])


def test_the_study_measures_what_a_written_model_shows(tmp_path: Path, text: Path) -> None:
    source = build(tmp_path / "source", "llama3", num_hidden_layers=6)
    names = ["baseline", "0-7r3", "only_odd_layers"]
    found = {one.name: one for one in tsotsallm.franken(source, text, limit=3, only=names)}
    assert found["baseline"].order == list(range(6))
    assert found["baseline"].kl == pytest.approx(0, abs=1e-6)
    for name in ("0-7r3", "only_odd_layers"):
        one = found[name]
        tsotsallm.compress(source, [{"layers": {"order": one.order}}], tmp_path / name)
        written = tsotsallm.examine([tmp_path / name], ["wikitext-2"], data=text, limit=3, reference=source).results[0][0]
        scores = {score.measure: score.value for score in written.scores}
        assert one.perplexity == pytest.approx(scores["perplexity"], rel=1e-6)
        assert one.kl == pytest.approx(scores["KL from reference"], rel=1e-4)
        assert one.decode_tokens_per_s > 0
