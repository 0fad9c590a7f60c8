"""The importance matrix: against resident Hugging Face, read by the gguf library, and used by ggml's quantiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cli.running import within
from tests.conftest import build
from tsotsallm.api.export import to_imatrix
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import ExportError
from tsotsallm.export.imatrix import export_imatrix
from tsotsallm.streaming.corpus import Corpus

NAMES = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
         "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
         "mlp.down_proj": "ffn_down"}


def tensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {one.name: one.data for one in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_sums_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    directory = build(tmp_path / "model", family)
    checkpoint = Checkpoint.open(directory)
    generator = torch.Generator().manual_seed(1)
    windows = tuple(torch.randint(0, checkpoint.spec.vocabulary, (length,), generator=generator) for length in (40, 40, 23))
    size = export_imatrix(View.of(checkpoint), Corpus(windows, "some text"), tmp_path / "im.gguf", tmp_path / "scratch",
                          torch.device("cpu"))
    assert size == (tmp_path / "im.gguf").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    expected: dict[str, torch.Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        for name, short in NAMES.items():
            def seen(_module: Any, args: Any, key: str = f"blk.{layer}.{short}.weight") -> None:
                rows = args[0].detach().reshape(-1, args[0].shape[-1]).double()
                expected[key] = expected.get(key, 0.0) + rows.square().sum(0)
            block.get_submodule(name).register_forward_pre_hook(seen)
    with torch.no_grad():
        for window in windows:
            model(window[None])
    found = tensors(tmp_path / "im.gguf")
    assert set(found) == {f"{key}.{suffix}" for key in expected for suffix in ("in_sum2", "counts")}
    for key, sums in expected.items():
        np.testing.assert_allclose(found[f"{key}.in_sum2"].reshape(-1), sums.float().numpy(), rtol=1e-3)
        assert found[f"{key}.counts"].reshape(-1).tolist() == [103.0]


def test_its_header_is_that_of_llama_cpp(tiny: Path, text: Path, tmp_path: Path) -> None:
    found = to_imatrix(tiny, tmp_path / "im.gguf", calibration=text, windows=4, window=32)
    reader = gguf.GGUFReader(tmp_path / "im.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == [str(text)]
    assert reader.fields["imatrix.chunk_count"].contents() == 4
    assert reader.fields["imatrix.chunk_size"].contents() == 32
    assert found["tokens"] == 128
    shapes = {one.name: one.shape.tolist() for one in reader.tensors}
    assert shapes["blk.0.attn_q.weight.in_sum2"] == [Checkpoint.open(tiny).spec.hidden, 1]
    assert shapes["blk.0.attn_q.weight.counts"] == [1, 1]


def test_the_command_writes_one_thing(tiny: Path, text: Path, tmp_path: Path) -> None:
    printed = within("export", tiny, "--imatrix", tmp_path / "im.gguf", "--calibration", text, "--windows", 2, "--window",
                     16).stdout
    assert f"{tmp_path / 'im.gguf'} (" in printed
    assert f"gathered on 32 tokens of {text}" in printed
    for wrong in (["--gguf", tmp_path / "a.gguf", "--imatrix", tmp_path / "b.gguf"], [],
                  ["--gguf", tmp_path / "a.gguf", "--calibration", text], ["--imatrix", tmp_path / "c.gguf", "--ollama"]):
        assert within("export", tiny, *wrong, check=False).exit_code == 1
    with pytest.raises(ExportError, match="exists already"):
        to_imatrix(tiny, tmp_path / "im.gguf", calibration=text, windows=2, window=16)
    with pytest.raises(ExportError, match=r"end in \.gguf"):
        to_imatrix(tiny, tmp_path / "im.dat", calibration=text)
