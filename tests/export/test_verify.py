"""A measured disagreement is a failure: files that llama.cpp would run otherwise are refused, and nothing half-made
stays."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tsotsallm
from tests.conftest import build
from tsotsallm.checkpoint import gguf_layout
from tsotsallm.errors import ExportError
from tsotsallm.export.verify import BOUNDS


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.is_dir() or path.name.startswith("tmp"))


def with_biases(directory: Path, **config: Any) -> Path:
    """Random biases in place of the zeros that a fresh model has."""
    weights = load_file(directory / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(".bias"):
            tensor += torch.randn(tensor.shape) * 0.3
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_other_activations_are_refused_by_name(tmp_path: Path, activation: str) -> None:
    model = build(tmp_path / "model", "llama3", hidden_act=activation)
    with pytest.raises(ExportError, match=f"hidden_act is '{activation}'"):
        tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    assert left(tmp_path) == []


@pytest.mark.parametrize(("family", "options"), [
    ("llama2", {"attention_bias": True}), ("llama3", {"attention_bias": True, "mlp_bias": True}), ("qwen2", {})])
def test_biases_that_llama_cpp_loads_agree(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    model = with_biases(build(tmp_path / "model", family, **options))
    found = tsotsallm.to_gguf(model, tmp_path / "model.gguf", dense="f32", accept_differences=family == "qwen2")
    assert found["verified"]["mean"] < BOUNDS["f32"]


@pytest.mark.parametrize("family", ["qwen3", "smollm3"])
def test_biases_that_llama_cpp_does_not_load_are_refused(tmp_path: Path, family: str) -> None:
    model = with_biases(build(tmp_path / "model", family, attention_bias=True))
    with pytest.raises(ExportError, match=r"self_attn\.\w_proj\.bias, which llama\.cpp's \w+ does not load"):
        tsotsallm.to_gguf(model, tmp_path / "model.gguf", accept_differences=True)
    assert left(tmp_path) == []


def test_a_window_shorter_than_the_probe_agrees(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "mistral", sliding_window=9)
    found = tsotsallm.to_gguf(model, tmp_path / "model.gguf", dense="f32")
    assert found["verified"]["tokens"] == 8
    assert any("attend to 9 tokens" in note for note in found["notes"])


def test_numbers_that_no_engine_takes_are_refused(tmp_path: Path) -> None:
    model = build(tmp_path / "model", "llama3", max_position_embeddings=1 << 31)
    with pytest.raises(ExportError, match="max_position_embeddings is 2147483648"):
        tsotsallm.to_gguf(model, tmp_path / "model.gguf")
    assert left(tmp_path) == []


@pytest.mark.parametrize("dense", ["f32", "f16"])
def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         dense: str) -> None:
    model = build(tmp_path / "model", "llama2")
    honest = gguf_layout.rope_of
    monkeypatch.setattr(gguf_layout, "rope_of", lambda spec: honest(spec) | {"rope_theta": 3.0})
    with pytest.raises(ExportError, match="computes different results"):
        tsotsallm.to_gguf(model, tmp_path / "model.gguf", dense=dense)
    assert left(tmp_path) == []


def test_a_file_that_cuts_text_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsotsallm.checkpoint.gguf_vocabulary._split_rule", lambda _content, _where: "qwen2")
    with pytest.raises(ExportError, match=r"splits \d+ of \d+ probed texts into other tokens"):
        tsotsallm.to_gguf("embedded", tmp_path / "model.gguf")
    assert left(tmp_path) == []
    found = tsotsallm.to_gguf("embedded", tmp_path / "model.gguf", accept_differences=True)
    assert found["verified"]["different"] > 0
    assert found["verified"]["examples"]


def test_an_abort_of_the_engine_does_not_take_us_along(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho GGML_ASSERT failed >&2\nkill -ABRT $$\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(ExportError, match=r"ended with SIGABRT.*GGML_ASSERT failed"):
        tsotsallm.to_gguf(tiny, tmp_path / "model.gguf")
    assert left(tmp_path) == ["python"]


def test_ctrl_c_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    for word in ("writing", "comparing"):
        def tick(what: str, _share: float, word: str = word) -> None:
            if what.startswith(word):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tsotsallm.to_gguf(tiny, tmp_path / "model.gguf", tick=tick)
        assert left(tmp_path) == []


def test_what_a_kill_left_is_replaced(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf.partial").write_bytes(os.urandom(1000))
    tsotsallm.to_gguf(tiny, tmp_path / "model.gguf")
    assert left(tmp_path) == ["model.gguf"]


def test_an_adapter_that_is_in_the_way_is_not_overwritten(tiny: Path, text: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:4:32, eora:2", tmp_path / "out", calibration=text, windows=6, window=64)
    (tmp_path / "model-adapter.gguf").write_text("mine")
    with pytest.raises(ExportError, match=r"model-adapter\.gguf exists already"):
        tsotsallm.to_gguf(tmp_path / "out", tmp_path / "model.gguf")
    assert (tmp_path / "model-adapter.gguf").read_text() == "mine"
    (tmp_path / "model-adapter.gguf").unlink()
    found = tsotsallm.to_gguf(tmp_path / "out", tmp_path / "model.gguf")
    assert left(tmp_path) == ["model-adapter.gguf", "model.gguf"]
    assert json.loads(json.dumps(found))["verified"]["mean"] <= found["verified"]["bound"]
