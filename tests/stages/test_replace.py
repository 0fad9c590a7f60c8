"""Layers replaced by a linear map: the closed form against least squares, the written model against transformers' own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tsotsallm
from tests.conftest import build
from tsotsallm.calibration import Calibration, calibration_corpus
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import NumericsError, RecipeError
from tsotsallm.stages.replace import fitted_map

OPTIONS = {"windows": 6, "window": 64}


def test_the_map_is_the_least_squares_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (torch.randn(200, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = torch.linalg.lstsq(inputs, outputs).solution
    found = fitted_map(inputs.mT @ inputs, inputs.mT @ outputs, 0.0, "here")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ridge = 0.3 * float((inputs.mT @ inputs).diagonal().mean())
    eye = torch.eye(12, dtype=torch.float64)
    longer = torch.linalg.lstsq(torch.cat([inputs, ridge ** 0.5 * eye]), torch.cat([outputs, ridge ** 0.5 * eye])).solution
    torch.testing.assert_close(fitted_map(inputs.mT @ inputs, inputs.mT @ outputs, 0.3, "here"), longer, rtol=1e-5,
                               atol=1e-6)
    with pytest.raises(NumericsError, match=r"here: the Gram of 12 .* raise damp"):
        fitted_map(torch.zeros(12, 12, dtype=torch.float64), inputs.mT @ outputs, 0.0, "here")


def test_the_written_layer_holds_the_map_of_transformers_own_activations(tmp_path: Path, text: Path) -> None:
    """Layers 1 and 2 of four are removed; T comes from hooks on the whole model, by lstsq."""
    source = build(tmp_path / "source", "llama2", dtype=torch.float32)
    recipe = [{"replace": {"remove": 2, "damp": 0.0}}]
    tsotsallm.compress(source, recipe, tmp_path / "out", calibration=text, **OPTIONS)
    corpus = calibration_corpus(Checkpoint.open(source), Calibration(str(text), 6, 64))
    model, _ = tsotsallm.load(source)
    seen: dict[str, list[torch.Tensor]] = {"mlp": [], "before": [], "after": []}
    layers = model.model.layers
    layers[0].mlp.register_forward_hook(lambda _m, _i, output: seen["mlp"].append(output))
    layers[0].register_forward_hook(lambda _m, _i, output: seen["before"].append(output))
    layers[2].register_forward_hook(lambda _m, _i, output: seen["after"].append(output))
    with torch.no_grad():
        model(torch.stack(corpus.windows))
    mlp, before, after = (torch.cat(parts).reshape(-1, 64).double() for parts in seen.values())
    rows = after.square().mean(-1, keepdim=True).rsqrt()              # each token counts by its relative error
    fitted = torch.linalg.lstsq(rows * mlp, rows * (after - before + mlp)).solution
    written, _ = tsotsallm.load(tmp_path / "out")
    assert len(written.model.layers) == 2
    weight = layers[0].mlp.down_proj.weight.double()
    torch.testing.assert_close(written.model.layers[0].mlp.down_proj.weight.double(), fitted.mT @ weight, rtol=1e-3,
                               atol=1e-4)
    assert torch.equal(written.model.layers[1].mlp.up_proj.weight, layers[3].mlp.up_proj.weight)
    [choice] = json.loads((tmp_path / "out" / "tsotsallm.json").read_text())["choices"]
    assert choice["order"] == [0, 3]
    assert choice["removed"] == [1, 2]


def test_it_is_nearer_to_the_original_than_plain_removal(tmp_path: Path) -> None:
    recipes = {"replaced": [{"replace": {"remove": 3}}], "removed": None}
    result = tsotsallm.compress("embedded", recipes["replaced"], tmp_path / "replaced", windows=32, window=512)
    assert result.path == tmp_path / "replaced"
    [choice] = json.loads((tmp_path / "replaced" / "tsotsallm.json").read_text())["choices"]
    tsotsallm.compress("embedded", [{"layers": {"order": choice["order"]}}], tmp_path / "removed")
    losses = [tsotsallm.evaluate(tmp_path / name, reference="embedded", limit=8).kl for name in ("replaced", "removed")]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0] < losses[1]


@pytest.mark.parametrize(("fields", "message"), [
    ("remove: 0", "it takes a whole number, 1 or more"), ("damp: -1", "it takes a number, 0 or more"),
    ("remove: 4", "at most 2 can go"), ("remove: 1, protect: {first: 3, last: 1}", "at most 0 can go")])
def test_what_makes_no_sense_is_refused(tiny: Path, tmp_path: Path, fields: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        tsotsallm.plan(tiny, f"[{{replace: {{{fields}}}}}]", tmp_path / "x")
    with pytest.raises(RecipeError, match="put replace first"):
        tsotsallm.plan(tiny, "['rtn:4:32', 'replace:1']", tmp_path / "x")
