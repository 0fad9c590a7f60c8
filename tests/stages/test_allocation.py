"""A grid for every matrix within a budget: against all combinations, and on a model."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import tsotsallm
from tests.conftest import build
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.errors import ExportError, RecipeError
from tsotsallm.export.gguf import export_gguf
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.stages.allocation import ACTIVATIONS, activation_error, allocate, candidates
from tsotsallm.streaming.statistics import Gram

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


def test_candidates_are_all_sizes_of_blocks_and_hold_zeros_where_asked() -> None:
    def names(d_in: int, **options: bool) -> list[str]:
        return [grid.type for grid in candidates(d_in, **options)]

    assert names(512) == ["q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"]
    assert names(96) == ["iq4_nl", "q5_0", "q5_1", "q8_0"]
    assert names(512, zeros=True) == ["q3_k", "q4_0", "q5_0", "q6_k", "q8_0"]
    assert names(96, zeros=True) == ["q4_0", "q5_0", "q8_0"]
    assert names(172) == []


@pytest.mark.parametrize(("grid", "why"), [("iq4_nl", "no level at zero"), ("q4_1", "a minimum of its own")])
def test_a_pruned_model_keeps_its_zeros(tiny: Path, grid: str, why: str) -> None:
    """What replaces a grid whose blocks are too long holds zeros as well."""
    pruned = {"sparsity": {"method": "magnitude", "prune": 2, "group": 4}}
    with pytest.raises(RecipeError, match=f"{grid} .*{why} and does not hold the zeros"):
        tsotsallm.plan(tiny, [pruned, {"quantize": {"grid": grid}}])
    tsotsallm.plan(tiny, [pruned, {"quantize": {"grid": grid, "lose_zeros": True}}])
    for stages, kind in (([pruned], "q4_0"), ([], "iq4_nl")):
        found = tsotsallm.plan(tiny, [*stages, {"quantize": {"grid": "q3_k"}}])
        assert any(f"which will lie on {kind}" in note for note in found.warnings)


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
                           ({"bits_per_weight": 1.5}, "the smallest grids take .*give more"),
                           ({"file_bytes": "10kB"}, "the smallest grids take"), ({"file_bytes": "many"}, "file_bytes"),
                           ({"grid": "q4_k", "bits": 3}, "its own bits"),
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


def test_given_grids_are_those_of_the_survey_that_chose_them(tiny: Path, text: Path, tmp_path: Path) -> None:
    """The decision of a mixture, written into a recipe, gives the same weights without a survey."""
    mixture = [{"quantize": {"bits_per_weight": 6.5, "passes": 0}}]
    tsotsallm.compress(tiny, mixture, tmp_path / "mixture", calibration=text, **SMALL)
    grids = json.loads((tmp_path / "mixture" / "decision-1-quantize.json").read_text())["grids"]
    tsotsallm.compress(tiny, [{"quantize": {"grids": grids, "passes": 0}}], tmp_path / "given", calibration=text, **SMALL)
    given, mixed = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("given", "mixture"))
    assert given == mixed
    assert not list((tmp_path / "given").glob("decision-*"))


def test_grids_that_do_not_suit_the_model(tiny: Path) -> None:
    spec = Checkpoint.open(tiny).spec
    good = {f"{layer}.{name}": "q8_0" for layer in range(spec.layers) for name in linear_shapes(spec, layer)}
    good["model.embed_tokens"] = "f16"
    tsotsallm.plan(tiny, [{"quantize": {"grids": good, "method": "rtn"}}])
    for stage, message in (
            ({"grids": good | {"9.mlp.up_proj": "q8_0"}}, r"'9.mlp.up_proj', which is no matrix"),
            ({"grids": good | {"0.mlp.upproj": "q8_0"}}, r"did you mean '0.mlp.up_proj'"),
            ({"grids": good | {"lm_head": "q8_0"}}, r"'lm_head', which is no matrix"),
            ({"grids": {"0.mlp.up_proj": "q8_0"}}, r"no grid for 0.self_attn.q_proj, .* and others; name one for every"),
            ({"grids": good | {"0.mlp.up_proj": "q4k"}}, r"0.mlp.up_proj is 'q4k'; did you mean 'q4_k'"),
            ({"grids": good | {"0.mlp.up_proj": 4}}, r"0.mlp.up_proj is 4; it takes q8_0 or"),
            ({"grids": good | {"0.mlp.up_proj": "q4_k"}}, r"blocks of 256 do not divide its 64 columns; .*iq4_nl"),
            ({"grids": good, "file_bytes": "1MB"}, "one of them"), ({"grids": good, "bits_per_weight": 4}, "one of them"),
            ({"grids": good, "ends": "q8_0"}, "leave ends and keep out"), ({"grids": {}}, "one of them"),
            ({"grids": ["q8_0"]}, "grids is")):
        with pytest.raises(RecipeError, match=message):
            tsotsallm.plan(tiny, [{"quantize": stage}])
    for grid in ("q4_1", "iq4_nl"):
        with pytest.raises(RecipeError, match="does not hold the zeros"):
            tsotsallm.plan(tiny, [{"sparsity": {"prune": 2, "group": 4}},
                                  {"quantize": {"grids": good | {"0.mlp.up_proj": grid}}}])


def test_a_model_that_no_gguf_file_can_hold_has_no_budget_of_bytes(text: Path, tmp_path: Path) -> None:
    """Refused before anything is measured."""
    model = build(tmp_path / "model", "llama3")
    content = json.loads((model / "tokenizer.json").read_text("utf-8"))
    content["model"]["merges"] = []
    (model / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    steps: list[Any] = []
    with pytest.raises(ExportError, match="without merges"):
        tsotsallm.compress(model, [{"quantize": {"file_bytes": "200kB"}}], tmp_path / "out", calibration=text,
                           progress=steps.append, **SMALL)
    assert not any("editing" in one.step for one in steps)


@pytest.mark.parametrize("grid", ["q8_0", "q6_k"])
def test_rounding_of_inputs_costs_what_rounding_them_does(grid: str) -> None:
    """Against inputs that are really rounded to whole numbers of −127 to 127, with the largest of each block at an end."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1500, 512, generator=generator)
    inputs[:, 300] *= 40                        # an outlier spoils the block that it is in
    weights, matrix = torch.rand(1500, generator=generator), torch.randn(24, 512, generator=generator)
    gram, block = Gram(512, torch.device("cpu"), peaks=True), GgmlGrid(grid).layout.block
    for part in range(0, 1500, 500):
        gram.add(inputs[part:part + 500], weights[part:part + 500])
    rounded = inputs.clone()
    for first in range(0, 512, block):
        scale = inputs[:, first:first + block].abs().amax(1, keepdim=True) / 127
        rounded[:, first:first + block] = (inputs[:, first:first + block] / scale).round() * scale
    expected = (weights[:, None] * ((rounded - inputs) @ matrix.mT).square()).sum(0)
    found = activation_error(matrix, gram, GgmlGrid(grid))
    assert float((found / expected).mean()) == pytest.approx(1, abs=0.03)
    assert float((found / expected - 1).abs().max()) < 0.35


def test_a_mixture_counts_what_the_engine_rounds(tiny: Path, text: Path, tmp_path: Path) -> None:
    """The prediction stays that of float32; grids are chosen by the sum."""
    recipe = [{"quantize": {"bits_per_weight": 6.0, "passes": 0}}]
    tsotsallm.compress(tiny, recipe, tmp_path / "out", calibration=text, **SMALL)
    decision = json.loads((tmp_path / "out" / "decision-1-quantize.json").read_text())
    losses, inputs = decision["losses"], decision["losses_of_activations"]
    assert {key: list(of) for key, of in losses.items()} == {key: list(of) for key, of in inputs.items()}
    assert all(0 < value < 0.01 for of in inputs.values() for value in of.values())
    for name, table in (("predicted_loss", losses), ("predicted_loss_of_activations", inputs)):
        assert decision[name] == pytest.approx(sum(
            0.0 if grid == "f16" else table[key][grid] for key, grid in decision["grids"].items()))
    shapes = {f"{layer}.{name}": shape for layer in range(4) for name, shape in linear_shapes(Checkpoint.open(tiny).spec,
                                                                                                layer).items()}
    assert shapes.keys() <= losses.keys()
    assert not any(key.endswith(ACTIVATIONS) for key in losses)
