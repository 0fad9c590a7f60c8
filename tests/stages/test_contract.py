"""What every stage promises: a stage that is registered is covered by being registered."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.recipe import Recipe
from tsotsallm.stages import STAGES

PRUNED = {"sparsity": {"prune": 2, "group": 4}}
Q4 = {"quantize": {"bits": 4, "group": 32}}
GRIDS = {f"{layer}.{name}": grid for layer in range(4) for name, grid in {
    "self_attn.q_proj": "q4_0", "self_attn.k_proj": "q8_0", "self_attn.v_proj": "q5_1", "self_attn.o_proj": "f16",
    "mlp.gate_proj": "q4_1", "mlp.up_proj": "q5_0", "mlp.down_proj": "q4_0"}.items()} | {"model.embed_tokens": "q8_0"}
"""A grid for every matrix of the tiny model."""
CONFIGURATIONS: dict[str, list[list[dict[str, Any]]]] = {
    "vocabulary": [[{"vocabulary": {"keep": ["TEXT"]}}]],
    "layers": [[{"layers": {"order": [0, 2, 1, 3]}}], [{"layers": {"skip": [1]}}],
               [{"layers": {"repeat": {2: 2}, "shared": True}}]],
    "depth": [[{"depth": {"remove": 1, "importance": kind, "protect": {"first": 1, "last": 0}}}]
              for kind in ("perplexity", "taylor", "magnitude", "cosine")],
    "neurons": [[{"neurons": {"feed_forward": 0.34, "kv_groups": 1}}]],
    "replace": [[{"replace": {"remove": 1, "importance": kind}}] for kind in ("cosine", "perplexity")],
    "sparsity": [[PRUNED], [{"sparsity": {"method": "sparsegpt", "prune_fraction": 0.5}}]],
    "adapt": [[{"adapt": {"steps": 2, "batch": 2, "window": 48, "rank": 2}}],
              [Q4, {"adapt": {"steps": 2, "batch": 2, "window": 48, "rank": 2}}]],
    "distill": [[{"layers": {"skip": [2]}}, {"distill": {"steps": 2, "batch": 2, "window": 48, "samples": 6}}],
                [Q4, {"distill": {"mode": "logits", "steps": 2, "batch": 2, "window": 48, "rank": 2, "top": 8}}]],
    "quantize": [[Q4], [{"quantize": {"method": "rtn", "bits": 3, "group": 16, "symmetric": False}}],
                 [{"quantize": {"grid": "q4_0", "ends": "q8_0", "passes": 1}}], [{"quantize": {"grid": "nf4", "group": 32}}],
                 [{"quantize": {"bits": 4, "group": 32, "ends": "q8_0"}}],
                 [{"quantize": {"bits_per_weight": 6.5, "passes": 1}}], [{"quantize": {"grids": GRIDS, "passes": 1}}],
                 [{"quantize": {"grids": GRIDS, "method": "rtn"}}], [PRUNED, {"quantize": {"grid": "q8_0"}}],
                 [{"quantize": {"grid": "iq4_xs", "ends": "iq4_nl", "passes": 1}}],
                 [PRUNED, {"quantize": {"grid": "q3_k", "passes": 1}}],
                 [PRUNED, {"quantize": {"bits_per_weight": 6.5, "passes": 0}}], [PRUNED, Q4]],
    "compensate": [[Q4, {"compensate": {"rank": 4}}], [PRUNED, {"compensate": {"rank": 4, "merge": True}}],
                   [Q4, {"compensate": {"rank": "auto", "budget": "12kB", "method": "svd"}}]],
    "tune": [[Q4, {"tune": {"steps": 2, "batch": 2, "window": 48, "top": 8}}],
             [{"quantize": {"grid": "q4_0", "passes": 1}},
              {"tune": {"what": ["codes", "norms"], "steps": 2, "batch": 2, "window": 48, "samples": 6}}],
             [{"quantize": {"grid": "tq2_0", "passes": 1}},
              {"tune": {"what": ["scales", "norms"], "steps": 2, "batch": 2, "window": 48, "top": 8}}]],
}
"""Stage -> small recipes that end with it; TEXT stands for a file of text."""
WRONG: dict[str, dict[str, Any]] = {
    "vocabulary": {"keep": 3}, "layers": {"order": "many"}, "depth": {"remove": "one"}, "neurons": {"feed_forward": "half"},
    "replace": {"remove": "one"},
    "sparsity": {"prune": "two", "group": 4}, "adapt": {"steps": "many"}, "distill": {"samples": "all"},
    "quantize": {"bits": "four"}, "compensate": {"rank": [4]},
    "tune": {"what": "everything"}}
"""Stage -> fields of a wrong type."""
KEEP_WEIGHTS = {"layers", "depth", "vocabulary"}
"""Stages that change no matrix of a layer."""
SPARE_BYTES = 100_000
"""What a forecast of a tiny model may be above the file: fixed allowances for headers."""
CASES = [pytest.param(name, recipe, id=f"{name}-{place}") for name, recipes in CONFIGURATIONS.items()
         for place, recipe in enumerate(recipes)]
OPTIONS: dict[str, Any] = {"windows": 4, "window": 48}


def test_every_stage_is_covered() -> None:
    assert CONFIGURATIONS.keys() == STAGES.keys() == WRONG.keys()
    for name, recipes in CONFIGURATIONS.items():
        assert all(list(recipe[-1]) == [name] for recipe in recipes)


def filled(recipe: list[dict[str, Any]], text: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(json.dumps(recipe).replace("TEXT", str(text)))
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_stage_keeps_its_promises(tiny: Path, text: Path, tmp_path: Path, name: str, recipe: list[dict[str, Any]]) -> None:
    """Same bytes twice and after a stop; no more than forecast; shapes and names that load; named where it was done."""
    recipe = filled(recipe, text)
    forecast = tsotsallm.plan(tiny, recipe, tmp_path / "x", calibration=text, **OPTIONS)
    steps: list[object] = []
    result = tsotsallm.compress(tiny, recipe, tmp_path / "whole", calibration=text, progress=steps.append, **OPTIONS)
    written = content(tmp_path / "whole")
    assert result.result_bytes <= forecast.result_bytes + 1
    assert forecast.result_bytes <= 1.15 * result.result_bytes + SPARE_BYTES
    left = [max(1, len(steps) * 2 // 3)]

    def stop(_progress: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tsotsallm.compress(tiny, recipe, tmp_path / "cut", calibration=text, progress=stop, **OPTIONS)
    assert not (tmp_path / "cut").exists()
    tsotsallm.compress(tiny, recipe, tmp_path / "cut", calibration=text, **OPTIONS)
    assert content(tmp_path / "cut") == written
    provenance = json.loads((tmp_path / "whole" / "tsotsallm.json").read_text("utf-8"))
    assert [next(iter(stage)) for stage in provenance["recipe"]] == [next(iter(stage)) for stage in recipe]
    assert name in (tmp_path / "whole" / "README.md").read_text("utf-8")
    before, after = View.of(Checkpoint.open(tiny)), View.of(Checkpoint.open(tmp_path / "whole"))
    for layer in range(after.spec.layers):
        tensors = after.layer(layer)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
        assert tensors.keys() == before.layer(0).keys()
        if name != "neurons":
            assert {key: value.shape for key, value in tensors.items()} == {
                key: value.shape for key, value in before.layer(0).items()}
        if PRUNED in recipe:
            weight = tensors["mlp.up_proj.weight"]
            assert bool((weight.reshape(len(weight), -1, 4) == 0).sum(-1).ge(2).all())
    if name in KEEP_WEIGHTS:
        known = {tensor.numpy().tobytes() for layer in range(before.spec.layers) for tensor in before.layer(layer).values()}
        assert all(tensor.numpy().tobytes() in known for layer in range(after.spec.layers)
                   for tensor in after.layer(layer).values())
    for path in (tmp_path / "whole").glob("*.safetensors"):
        for key, tensor in load_file(path).items():
            assert tensor.dtype != torch.float32 or "norm" in key, f"{key} of a bfloat16 source is stored in 32 bits"


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_refuses_what_it_does_not_know(name: str) -> None:
    good = CONFIGURATIONS[name][0][-1][name]
    with pytest.raises(RecipeError, match=f"{name}.*nonsense"):
        Recipe.parse([{name: good | {"nonsense": 1}}])
    with pytest.raises(RecipeError, match=name):
        Recipe.parse([{name: good | WRONG[name]}])
    with pytest.raises(RecipeError, match=name):
        Recipe.parse([{name: ["a list"]}])


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_stage_is_plain_data(text: Path, name: str, recipe: list[dict[str, Any]]) -> None:
    parsed = Recipe.parse(filled(recipe, text))
    again = Recipe.parse(json.loads(json.dumps(parsed.plain())))
    assert again == parsed
    assert isinstance(parsed.stages[-1], STAGES[name])
    assert Recipe.parse(parsed.line()) == parsed


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_stage_takes_no_more_memory_than_forecast(tiny: Path, text: Path, tmp_path: Path, name: str,
                                                    recipe: list[dict[str, Any]]) -> None:
    """Measured in a process of its own. Half the forecast and 60 MB may be missing: interpreter and libraries vary."""
    asked = json.dumps([str(tiny), filled(recipe, text), str(tmp_path / "out"), str(text)])
    code = ("import json, sys, tsotsallm\nmodel, recipe, out, text = json.loads(sys.argv[1])\n"
            "options = {'calibration': text, 'windows': 4, 'window': 48}\n"
            "forecast = tsotsallm.plan(model, recipe, out, **options).ram_bytes\n"
            "print(json.dumps([forecast, tsotsallm.compress(model, recipe, out, **options).peak_rss_bytes]))")
    told = subprocess.run([sys.executable, "-c", code, asked], capture_output=True, text=True, check=True).stdout
    forecast, measured = json.loads(told.splitlines()[-1])
    assert measured <= 1.5 * forecast + 60e6, name
