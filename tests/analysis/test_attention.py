"""Attention maps against transformers, spectra against constructed ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tsotsallm.analysis import pictures
from tsotsallm.analysis.attention import attention_spectrum, look_inside, state_spectrum
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import TsotsallmError


def test_maps_and_states_equal_the_resident_models(family_checkpoint: Path) -> None:
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    view = View.of(Checkpoint.open(family_checkpoint))
    found = look_inside(view, ids, [0, 3], torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(family_checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    for layer in (0, 3):
        torch.testing.assert_close(found.attention[layer], out.attentions[layer][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.states[0], out.hidden_states[1][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_attention_to_every_nth_token_has_its_peak_there(period: int) -> None:
    tokens = 128
    places = torch.arange(tokens)
    wave = 1 + torch.cos(2 * math.pi * places / period)
    attention = torch.tril(wave.expand(tokens, tokens))
    attention /= attention.sum(-1, keepdim=True)
    frequencies, magnitudes = attention_spectrum(attention[None])
    assert float(frequencies[magnitudes[0].argmax()]) == pytest.approx(1 / period, abs=1 / tokens)
    assert frequencies[-1] == pytest.approx(0.5)


def test_even_attention_has_an_empty_spectrum_and_sharp_attention_a_flat_one() -> None:
    tokens = 64
    even = torch.tril(torch.ones(tokens, tokens))
    even /= even.sum(-1, keepdim=True)
    assert float(attention_spectrum(even)[1].max()) < 1e-9
    sharp = torch.eye(tokens)                               # |FFT| of a single spike is one at every frequency
    assert attention_spectrum(sharp)[1] == pytest.approx(torch.ones(tokens // 4).numpy(), abs=0.05)


def test_state_spectrum_of_waves_is_known() -> None:
    tokens = 96
    places = torch.arange(tokens)
    states = torch.stack([torch.sin(2 * math.pi * places * 6 / tokens), torch.sin(2 * math.pi * places * 6 / tokens) + 5], 1)
    frequencies, magnitudes = state_spectrum(states)
    assert float(frequencies[magnitudes.argmax()]) == pytest.approx(6 / tokens)
    assert float(magnitudes.max()) == pytest.approx(tokens / 2, rel=1e-6)
    assert float(magnitudes.sort().values[-2]) < 1e-6 * tokens


def test_an_analysis_writes_pictures_and_numbers(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:3:channel", tmp_path / "small")
    found = tsotsallm.analyze(tmp_path / "small", text, tmp_path / "out", reference=tiny, windows=4, window=64)
    assert [path.name for path in found.files] == ["attention.png", "attention-spectra.png", "state-spectra.png",
                                                   "importance.png", "outliers.png", "analysis.json"]
    assert all(path.stat().st_size > 1000 for path in found.files)
    numbers = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert set(numbers["importance"]) == {"perplexity", "taylor", "magnitude", "cosine"}
    assert set(numbers["beside"]["original"]["importance"]) == set(numbers["importance"])
    assert numbers["layers"] == {"model": [0, 3], "original": [0, 3]}
    assert len(numbers["outliers"]) == 4 * 7
    for heads in numbers["attention"]["model"].values():
        assert all(0 <= value <= math.log(numbers["tokens"]) for value in heads["entropy"])
    with pytest.raises(TsotsallmError, match="there is no layer 9"):
        tsotsallm.analyze(tiny, text, tmp_path / "bad", layers=[9], windows=4, window=64)


def test_importance_is_that_of_both_models_and_the_line_is_the_original_s(
        tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's numbers are those of its own analysis; layers stand at the place they have in the original."""
    tsotsallm.compress(tiny, [{"layers": {"skip": [1]}}, "rtn:3:channel"], tmp_path / "small")
    drawn: list[dict[str, Any]] = []
    draw = pictures.importance

    def noted(models: Any, path: Path, **given: Any) -> Path:
        drawn.append({"models": models, **given})
        return draw(models, path, **given)

    monkeypatch.setattr(pictures, "importance", noted)
    alone = tsotsallm.analyze(tiny, text, tmp_path / "alone", windows=4, window=64).numbers
    found = tsotsallm.analyze(tmp_path / "small", text, tmp_path / "both", reference=tiny, windows=4, window=64).numbers
    assert found["beside"] == {"original": {"importance": alone["importance"], "perplexity": alone["perplexity"]}}
    assert found["perplexity"] != alone["perplexity"]
    assert "beside" not in alone
    own, both = drawn
    assert (own["baseline"], own["named"], own["places"]) == (alone["perplexity"], "all layers", None)
    assert (both["baseline"], both["named"]) == (alone["perplexity"], "original")
    assert {name: list(places) for name, places in both["places"].items()} == {"model": [0, 2, 3], "original": [0, 1, 2, 3]}
    assert both["models"] == {"model": found["importance"], "original": alone["importance"]}
    assert [len(values) for values in found["importance"].values()] == [3] * 4


def test_outliers_are_found_where_they_are(tmp_path: Path, text: Path) -> None:
    from safetensors.torch import load_file, save_file

    from tests.conftest import build

    source = build(tmp_path / "source", "llama3", num_hidden_layers=3)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = 40 * tensors["model.layers.1.mlp.up_proj.weight"].std()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    found = tsotsallm.analyze(source, text, tmp_path / "out", windows=4, window=64).numbers["outliers"]
    worst = max(found, key=lambda one: one["weight_peak"])
    assert (worst["layer"], worst["linear"]) == (1, "mlp.up_proj")
