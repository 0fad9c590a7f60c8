"""What a run writes beside the weights, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.compressing import SMALL, THREE_STAGES
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.recipe import Recipe


def test_provenance_names_everything_that_went_in(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, THREE_STAGES, tmp_path / "out", calibration=text, **SMALL)
    found = json.loads((tmp_path / "out" / "tsotsallm.json").read_text())
    assert Recipe.parse(found["recipe"]) == Recipe.parse(THREE_STAGES)
    assert found["choices"][0]["order"] != [0, 1, 2, 3]
    assert found["inputs"]["machine"]["torch"] == torch.__version__
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()


def test_sharded_results_load(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsotsallm.checkpoint.writer.SHARD_BYTES", 100_000)
    tsotsallm.compress(tiny, "rtn:8:channel", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    Checkpoint.open(tmp_path / "out")


def test_a_chosen_scratch_directory_is_left_as_it_was(tiny: Path, text: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "mine.txt").write_text("precious")
    tsotsallm.compress(tiny, "gptq:4:32", tmp_path / "out", calibration=text, scratch=scratch, **SMALL)
    assert [path.name for path in scratch.iterdir()] == ["mine.txt"]
