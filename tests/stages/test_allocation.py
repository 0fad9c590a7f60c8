"""A grid for every matrix within a budget: against all combinations, and on a model."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import RecipeError
from tsotsallm.export.gguf import export_gguf
from tsotsallm.stages.allocation import allocate

SMALL: dict[str, Any] = {"windows": 4, "window": 64}


def test_allocation_is_near_the_best_of_all_combinations() -> None:
    rng = random.Random(1)
    for _ in range(60):
        items = {f"item{place}": sorted(rng.sample(range(2, 40), 4)) for place in range(5)}
        losses = {name: sorted((rng.random() ** 3 for _ in sizes), reverse=True) for name, sizes in items.items()}
        budget = rng.randint(sum(min(sizes) for sizes in items.values()), sum(max(sizes) for sizes in items.values()))
        chosen = allocate(losses, items, budget)

        def total(choice: dict[str, int], table: dict[str, Any]) -> float:
            return sum(table[name][place] for name, place in choice.items())

        assert total(chosen, items) <= budget
        every = (dict(zip(items, places, strict=True)) for places in itertools.product(range(4), repeat=5))
        best = min(total(one, losses) for one in every if total(one, items) <= budget)
        # within the largest single step of the best
        step = max(losses[name][0] - losses[name][-1] for name in items)
        assert total(chosen, losses) <= best + step
    with pytest.raises(RecipeError, match="smallest grids take"):
        allocate({"a": [1.0]}, {"a": [10]}, 5)


def test_a_budget_is_kept_and_used(tiny: Path, text: Path, tmp_path: Path) -> None:
    for bits in (5.0, 7.5):
        recipe = [{"quantize": {"bits_per_weight": bits, "passes": 0}}]
        out = tmp_path / str(bits)
        result = tsotsallm.compress(tiny, recipe, out, calibration=text, **SMALL)
        decision = json.loads((out / "decision-1-quantize.json").read_text())
        assert 0.95 * bits < decision["bits_per_weight"] <= bits
        assert {"model.embed_tokens", "0.self_attn.q_proj", "3.mlp.down_proj"} <= decision["grids"].keys()
        assert result.result_bytes <= tsotsallm.plan(tiny, recipe, tmp_path / "x", **SMALL).result_bytes
        assert len(set(decision["grids"].values())) > 1
    losses = [tsotsallm.evaluate(tmp_path / str(bits), text, reference=tiny, context=64, limit=8).kl for bits in (5.0, 7.5)]
    assert losses[0] > 1.5 * losses[1]       # type: ignore[operator]
    tsotsallm.compress(tmp_path / "7.5", "", tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (tmp_path / "7.5" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_file_is_never_larger_than_asked(tmp_path: Path) -> None:
    tsotsallm.compress("embedded", [{"quantize": {"file_bytes": "6MB", "passes": 0}}], tmp_path / "out", **SMALL)
    found = export_gguf(Checkpoint.open(tmp_path / "out"), tmp_path / "model.gguf")
    assert 5.6e6 < found.bytes <= 6e6
    decision = json.loads((tmp_path / "out" / "decision-1-quantize.json").read_text())
    assert len(set(decision["grids"].values())) > 2


def test_embeddings_take_a_grid_of_their_own(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, [{"quantize": {"grid": "q8_0", "ends": "q8_0"}}], tmp_path / "out", calibration=text, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert checkpoint.is_packed("model.embed_tokens")
    kl = tsotsallm.evaluate(tmp_path / "out", text, reference=tiny, context=64, limit=8).kl
    assert kl is not None
    assert kl < 0.01
    rows, whole = checkpoint.rows("model.embed_tokens.weight", 5, 9), checkpoint.tensor("model.embed_tokens.weight")
    assert (rows == whole[5:9]).all()


def test_bad_budgets(tiny: Path) -> None:
    for stage, message in (({"bits_per_weight": 0.5}, "above 1"), ({"grid": "mixed"}, "spends a budget"),
                           ({"bits_per_weight": 4, "file_bytes": "1MB"}, "one of them"),
                           ({"bits_per_weight": 4, "method": "rtn"}, "chooses all grids"),
                           ({"file_bytes": "many"}, "file_bytes"), ({"grid": "q4_k", "bits": 3}, "its own bits"),
                           ({"grid": "q4_0", "follow": 2.0}, "0 to 1"), ({"grid": "q4_0", "passes": -1}, "0 or more")):
        with pytest.raises(RecipeError, match=message):
            tsotsallm.plan(tiny, [{"quantize": stage}])


def test_where_there_is_room_matrices_stay_in_16_bits(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, [{"quantize": {"bits_per_weight": 16}}], tmp_path / "all", calibration=text, **SMALL)
    decision = json.loads((tmp_path / "all" / "decision-1-quantize.json").read_text())
    assert set(decision["grids"].values()) == {"f16"}
    assert tsotsallm.evaluate(tmp_path / "all", text, reference=tiny, context=64, limit=8).kl == pytest.approx(0, abs=1e-9)
    tsotsallm.compress(tiny, [{"quantize": {"bits_per_weight": 12}}], tmp_path / "some", calibration=text, **SMALL)
    grids = json.loads((tmp_path / "some" / "decision-1-quantize.json").read_text())["grids"]
    checkpoint = Checkpoint.open(tmp_path / "some")
    assert checkpoint.is_packed("model.layers.1.mlp.up_proj") == (grids["1.mlp.up_proj"] != "f16")
    assert len(set(grids.values())) > 1
