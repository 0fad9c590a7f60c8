"""plan: what it forecasts comes true, and no tensor is read for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tsotsallm
from tsotsallm.errors import CheckpointError, RecipeError


def test_a_forecast_needs_no_weights_and_comes_true(tiny: Path, tmp_path: Path) -> None:
    hollow = Path(shutil.copytree(tiny, tmp_path / "hollow"))
    for path in hollow.glob("*.safetensors"):
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:header] + b"\xff" * (len(content) - header))        # all NaN: who reads it complains
    forecast = tsotsallm.plan(hollow, "skip:1, rtn:4:32")
    result = tsotsallm.compress(tiny, "skip:1, rtn:4:32", tmp_path / "out")
    assert forecast.result_parameters == result.result_parameters == tsotsallm.inspect(tmp_path / "out").parameters
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert written <= forecast.result_bytes <= 1.5 * written + 100_000
    assert forecast.bytes == tsotsallm.plan(tiny, "").bytes
    with pytest.raises(CheckpointError, match="NaN"):
        tsotsallm.compress(hollow, "skip:1, rtn:4:32", tmp_path / "other")


def test_a_recipe_that_does_not_fit_is_refused_without_a_run(tiny: Path, tmp_path: Path) -> None:
    for recipe, words in (("skip:9", "the model has layers 0 to 3"), ("rtn:4:33", "group 33 must divide"),
                          ("wandda", "did you mean")):
        with pytest.raises(RecipeError, match=words):
            tsotsallm.plan(tiny, recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_result_that_would_be_larger_than_its_source_is_announced_before_it_is_written(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:q4_0", tmp_path / "small")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        assert not (tmp_path / "out").exists()

    assert not any("more than" in note for note in tsotsallm.plan(tiny, "rtn:q4_0").warnings)
    file = tsotsallm.to_gguf(tmp_path / "small", tmp_path / "small.gguf", verify=False)["gguf"]
    [larger] = [note for note in tsotsallm.plan(file, "rtn:8:32").warnings if "more than" in note]
    tsotsallm.compress(file, "rtn:8:32", tmp_path / "out", say=say)
    assert larger in said


def test_integer_grids_for_a_gguf_file_name_the_grids_that_keep_it_small(tiny: Path, tmp_path: Path) -> None:
    file = tsotsallm.to_gguf(tiny, tmp_path / "tiny.gguf", dense="f16", verify=False)["gguf"]
    assert any("gptq:q4_k" in note for note in tsotsallm.plan(file, "rtn:4:32").warnings)
    assert not any("gptq:q4_k" in note for note in tsotsallm.plan(file, "rtn:q4_0").warnings)
    assert not any("gptq:q4_k" in note for note in tsotsallm.plan(tiny, "rtn:4:32").warnings)
