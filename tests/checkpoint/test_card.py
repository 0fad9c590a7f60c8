"""The model card: metadata that the hub's library reads, the recipe as it was, and how this very model is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import tsotsallm
from tsotsallm.checkpoint.card import model_card
from tsotsallm.checkpoint.provenance import Calibrated, Measures, Provenance
from tsotsallm.recipe import Recipe


def provenance(recipe: str = "", source: str = "folder", calibration: Calibrated | None = None) -> Provenance:
    return Provenance(source=source, recipe=Recipe.parse(recipe).plain(), choices=(), inputs=None, ancestry=None,
                      calibration=calibration, measures=Measures(1_500_000, 3_000_000_000))


def card(made: Provenance, *, own: bool = False, packed: bool = False) -> str:
    return model_card(made, own_container=own, packed=packed)


def head_and_body(text: str) -> tuple[dict[str, Any], str]:
    begin, head, body = text.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(head), body


def recipe_in(body: str) -> Any:
    return yaml.safe_load(body.split("```yaml\n", 1)[1].split("```", 1)[0])


def test_the_hubs_library_reads_its_metadata(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    (tmp_path / "README.md").write_text(card(provenance("gptq:4", "meta-llama/Llama-3.2-1B")))
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == "meta-llama/Llama-3.2-1B"
    assert data.library_name == "transformers"
    assert "tsotsallm" in (data.tags or [])


@pytest.mark.parametrize("recipe", ["", "skip:3, wanda:2:4, gptq:4:32", "[{layers: {order: [0, 1, 1], shared: true}}]",
                                    "[{vocabulary: {keep: ['a \"quoted\" name: #1.txt']}}]"])
def test_the_recipe_in_it_is_the_recipe(recipe: str) -> None:
    _, body = head_and_body(card(provenance(recipe)))
    assert Recipe.parse(recipe_in(body)) == Recipe.parse(recipe)


@pytest.mark.parametrize(("source", "base"), [("folder", None), ("embedded", None), ("name/model", "name/model"),
                                              ("name/yes: no", "name/yes: no")])
def test_only_a_model_of_the_hub_is_a_base(source: str, base: str | None) -> None:
    head, body = head_and_body(card(provenance(source=source)))
    assert head.get("base_model") == base
    assert f"# {source}, made smaller" in body


def test_sizes_and_texts_are_those_measured() -> None:
    asked = Calibrated("c4", 128, 262_144, None)
    _, body = head_and_body(card(provenance(calibration=asked)))
    assert "Weights: 1.5 MB, from 3 GB." in body
    assert "calibrated on 128 windows (262144 tokens) of `c4`" in body
    assert "without calibration text" in card(provenance())


@pytest.mark.parametrize(("recipe", "own", "words", "others"), [
    ("", False, "pip install transformers\n", "compressed-tensors"),
    ("gptq:4", False, "pip install transformers compressed-tensors\n", "tsotsallm.load"),
    ("rtn:q4_0", True, "tsotsallm.load", "pip install transformers")])
def test_it_says_how_this_very_model_is_run(recipe: str, own: bool, words: str, others: str) -> None:
    head, body = head_and_body(card(provenance(recipe), own=own, packed=bool(recipe)))
    assert head["library_name"] == ("tsotsallm" if own else "transformers")
    assert words in body
    assert others not in body


def test_the_code_in_it_runs(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tsotsallm.compress(tiny, "rtn:4:32", out)
    _, body = head_and_body((out / "README.md").read_text("utf-8"))
    code = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(code) == 1
    made: dict[str, Any] = {}
    exec(code[0].replace("PATH", str(out)), made)
    assert made["model"].config.num_hidden_layers == 4
    assert made["tokenizer"]("a")["input_ids"]


def test_what_was_packed_before_still_needs_the_package_that_unpacks_it(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "packed")
    tsotsallm.compress(tmp_path / "packed", "skip:1", tmp_path / "shorter")
    assert "quantization_config" in (tmp_path / "shorter" / "config.json").read_text()
    assert "pip install transformers compressed-tensors" in (tmp_path / "shorter" / "README.md").read_text("utf-8")
