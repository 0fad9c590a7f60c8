"""On a GPU every stage makes the model that it makes on the CPU, but for the order of sums, and scores are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tsotsallm
from tests.stages.test_contract import CASES, OPTIONS, filled
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.evaluation.perplexity import evaluate_perplexity

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")


def divergence(model: Path, original: Path, text: Path, device: str) -> float:
    """KL from the original on the first windows of the text."""
    found = evaluate_perplexity(Checkpoint.open(model), text.read_text("utf-8"), source="words", context=48, limit=8,
                                reference=Checkpoint.open(original), device=device).kl
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_stage_does_on_a_gpu_what_it_does_on_the_cpu(tiny: Path, text: Path, tmp_path: Path, name: str,
                                                       recipe: list[dict[str, Any]]) -> None:
    recipe = filled(recipe, text)
    for device in ("cpu", "cuda"):
        tsotsallm.compress(tiny, recipe, tmp_path / device, calibration=text, device=device, **OPTIONS)
    made, here = Checkpoint.open(tmp_path / "cuda"), Checkpoint.open(tmp_path / "cpu")
    assert {file.name: file.stat().st_size for file in made.directory.glob("*.safetensors")} == {
        file.name: file.stat().st_size for file in here.directory.glob("*.safetensors")}
    if made.spec.vocabulary == Checkpoint.open(tiny).spec.vocabulary:
        there = divergence(made.directory, tiny, text, "cuda")
        assert there == pytest.approx(divergence(made.directory, tiny, text, "cpu"), rel=1e-3, abs=1e-6)
        assert there == pytest.approx(divergence(here.directory, tiny, text, "cpu"), rel=0.2, abs=1e-4)
