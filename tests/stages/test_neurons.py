"""Narrower layers: plain shapes that transformers runs, the least-squares update, what is propagated is what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.conftest import build
from tsotsallm.calibration import Calibration, calibration_corpus
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import RecipeError
from tsotsallm.stages.neurons import Neurons, updated

SMALL: dict[str, Any] = {"windows": 6, "window": 64}


def test_the_update_is_the_least_squares_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 20, generator=generator) @ torch.randn(20, 20, generator=generator)
    weight, kept = torch.randn(7, 20, generator=generator), torch.tensor([0, 2, 3, 7, 11, 19])
    found = updated(weight, inputs.mT @ inputs, kept, 0.0, "")
    best = torch.linalg.lstsq(inputs[:, kept].double(), inputs.double() @ weight.double().mT).solution.mT
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-3)


def test_every_family_becomes_narrower_and_runs_in_transformers(family_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = Checkpoint.open(family_checkpoint).spec
    gone = before.kv_heads // 2
    recipe = [{"neurons": {"feed_forward": 0.34, "kv_groups": gone, "multiple": 32}}]
    result = tsotsallm.compress(family_checkpoint, recipe, out, calibration=text, **SMALL)
    after = Checkpoint.open(out).spec
    assert (after.feed_forward, after.kv_heads, after.head_dim) == (64, before.kv_heads - gone, before.head_dim)
    assert after.heads == after.kv_heads * (before.heads // before.kv_heads)
    assert result.result_bytes <= tsotsallm.plan(family_checkpoint, recipe, tmp_path / "x", **SMALL).result_bytes
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        ours = tsotsallm.load(out)[0](ids).logits
    torch.testing.assert_close(ours, theirs)


def test_it_is_the_naive_algorithm_layer_by_layer(tiny: Path, text: Path, tmp_path: Path) -> None:
    """The same with a whole model in memory: neurons by saliency, least squares, the narrowed layer's outputs go on."""
    tsotsallm.compress(tiny, [{"neurons": {"feed_forward": 0.34}}], tmp_path / "out", calibration=text, **SMALL)
    model, _ = tsotsallm.load(tiny)
    ids = torch.stack(calibration_corpus(Checkpoint.open(tiny), Calibration(str(text), 6, 64)).windows)
    for index, layer in enumerate(model.model.layers):
        seen: list[torch.Tensor] = []
        hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(ids)
        hook.remove()
        inputs = seen[0].flatten(0, 1)
        down = layer.mlp.down_proj.weight.data
        kept = (down.square().sum(0) * inputs.square().sum(0)).topk(64).indices.sort().values
        gram = inputs.mT @ inputs
        damp = 0.01 * gram.diagonal().mean() * torch.eye(64)
        gone = torch.tensor([place for place in range(96) if place not in kept.tolist()])
        new = down[:, kept] + down[:, gone] @ gram[gone][:, kept] @ torch.linalg.inv(gram[kept][:, kept] + damp)
        new = new.to(torch.bfloat16).float()
        found = Checkpoint.open(tmp_path / "out").layer(index)
        torch.testing.assert_close(found["mlp.down_proj.weight"], new, rtol=2e-2, atol=2e-3)
        assert torch.equal(found["mlp.up_proj.weight"], layer.mlp.up_proj.weight.data[kept])
        down.zero_()[:, kept] = new


def test_the_update_helps_and_later_stages_see_the_narrow_model(tiny: Path, text: Path, tmp_path: Path) -> None:
    found = []
    for name, stages in (("with", [{"neurons": {"feed_forward": 0.34}}]),
                         ("without", [{"neurons": {"feed_forward": 0.34, "damp": 1e6}}])):
        tsotsallm.compress(tiny, stages, tmp_path / name, calibration=text, **SMALL)
        kl = tsotsallm.evaluate(tmp_path / name, text, reference=tiny, context=64, limit=8).kl
        assert kl is not None
        found.append(kl)
    assert found[0] < found[1]
    depth = {"remove": 1, "importance": "magnitude", "protect": {"first": 0, "last": 0}}
    stages = [{"depth": depth}, {"neurons": {"feed_forward": 0.34}},
              {"quantize": {"grid": "q8_0"}}]
    tsotsallm.compress(tiny, stages, tmp_path / "all", calibration=text, **SMALL)
    checkpoint = Checkpoint.open(tmp_path / "all")
    assert (checkpoint.spec.layers, checkpoint.spec.feed_forward) == (3, 64)
    assert checkpoint.is_packed("model.layers.2.mlp.down_proj")


def test_sizes_and_bad_input(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="usable: 2"):
        tsotsallm.plan(build(tmp_path / "four", "llama2"), [{"neurons": {"kv_groups": 1}}])
    spec = Checkpoint.open("embedded").spec
    assert Neurons(0.33).kept_neurons(spec) == 512
    assert Neurons(0.2, multiple=32).kept_neurons(spec) == 608
    for stages, message in (([{"neurons": {}}], "give a share"),
                            ([{"neurons": {"feed_forward": 0.1}}], "leaves all of them"),
                            ([{"neurons": {"kv_groups": 2}}], "needs one"),
                            ([{"sparsity": {"prune": 2, "group": 4}}, {"neurons": {"kv_groups": 1}}], "zeros"),
                            ([{"quantize": {"group": 32}}, {"neurons": {"kv_groups": 1}}], "dense again")):
        with pytest.raises(RecipeError, match=message):
            tsotsallm.plan(tiny if "kv" in str(stages) else "embedded", stages)
