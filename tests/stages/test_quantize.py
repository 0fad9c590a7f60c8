"""Codes of every width as transformers unpacks them, GPTQ against rounding, and groups that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tsotsallm
from tests.compressing import SMALL, tensors_of, unpacked_by_transformers
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import RecipeError


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_every_width_of_codes_loads_exactly(tiny: Path, tmp_path: Path, bits: int, symmetric: bool) -> None:
    out = tmp_path / "small"
    recipe = [{"quantize": {"method": "rtn", "bits": bits, "group": 32, "symmetric": symmetric}}]
    tsotsallm.compress(tiny, recipe, out)
    state = unpacked_by_transformers(out)
    for name, weight in Checkpoint.open(out).layer(0).items():
        assert torch.equal(state[f"model.layers.0.{name}"].float(), weight), name


def test_sequential_calibration_runs_and_differs(tiny: Path, text: Path, tmp_path: Path) -> None:
    for name, sequential in (("one", False), ("two", True)):
        recipe = [{"quantize": {"bits": 3, "group": 32, "sequential": sequential}}]
        tsotsallm.compress(tiny, recipe, tmp_path / name, calibration=text, **SMALL)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    first = "model.layers.0.self_attn.q_proj.weight_packed"
    assert torch.equal(one[first], two[first])
    assert not torch.equal(one[first.replace("q_proj", "o_proj")], two[first.replace("q_proj", "o_proj")])


def test_gptq_leaves_less_error_than_rounding_on_every_linear_of_a_real_model(stories: Path, prose: Path,
                                                                              tmp_path: Path) -> None:
    from tsotsallm.calibration import Calibration, calibration_corpus
    from tsotsallm.checkpoint.view import View
    from tsotsallm.stages.quantize import IntegerQuantize
    from tsotsallm.streaming.sweep import TwoStates, embed_corpus, sweep

    checkpoint = Checkpoint.open(stories)
    view = View.of(checkpoint)
    corpus = calibration_corpus(checkpoint, Calibration(str(prose), windows=16, window=256))
    states = TwoStates(tmp_path, [256] * 16, view.spec.hidden)
    embed_corpus(view, corpus, states.inputs_of(0))
    stages = {method: IntegerQuantize(method=method, bits=4, group="channel") for method in ("gptq", "rtn")}  # type: ignore[arg-type]
    for visit in sweep(view, states, observe=True, device=torch.device("cpu")):
        for name in visit.names:
            gram = visit.gram_of(name)
            matrix = gram.matrix.double()
            errors = {}
            for method, stage in stages.items():
                linear = visit.linear(name)
                stage.edit(linear, gram, visit.index, last=False)
                difference = (linear.effective() - linear.reference).double()
                errors[method] = float((difference @ matrix * difference).sum())
            assert errors["gptq"] <= errors["rtn"], (visit.index, name, errors)


def test_an_awkward_width_is_a_clear_error_for_a_group_and_none_by_default(stories: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"group 128 must divide.*mlp.down_proj has 172; usable groups: 2, 4, or channel"):
        tsotsallm.compress(stories, "rtn:4:128", tmp_path / "out")
    tsotsallm.compress(stories, "rtn:4", tmp_path / "out")
    assert {grid.plain()["group"] for grid in map(Checkpoint.open(tmp_path / "out").grid_of, (
        "model.layers.0.mlp.down_proj", "model.layers.4.self_attn.q_proj"))} == {None}
