"""to_huggingface and to_gguf: the same numbers in other forms, read by transformers and by the gguf library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.compressing import tensors_of
from tsotsallm import machine
from tsotsallm.api.export import to_imatrix
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import ExportError, ResourceError, TsotsallmError

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def test_a_container_of_ours_becomes_a_plain_checkpoint(tiny: Path, tmp_path: Path) -> None:
    recipe = "[{layers: {order: [0, 1, 1, 3], shared: true}}, {quantize: {method: rtn, grid: q4_0}}]"
    tsotsallm.compress(tiny, recipe, tmp_path / "own")
    written = tsotsallm.to_huggingface(tmp_path / "own", tmp_path / "plain")
    assert written["hf"] == str(tmp_path / "plain")
    own = Checkpoint.open(tmp_path / "own")
    stored = tensors_of(tmp_path / "plain")
    assert not any("weight_" in name for name in stored)
    for index, layer in enumerate(own.spec.layer_order):
        for name, tensor in own.layer(layer).items():
            assert torch.equal(stored[f"model.layers.{index}.{name}"].float(), tensor.to(own.storage).float()), name
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)(IDS).logits
        ours = tsotsallm.load(tmp_path / "own")[0](IDS).logits
    assert float((theirs - ours).abs().max()) <= 0.03 * float(ours.abs().max())           # codes rounded to bfloat16


def test_a_file_holds_the_weights_that_were_there(tiny: Path, tmp_path: Path) -> None:
    written = tsotsallm.to_gguf(tiny, tmp_path / "model.gguf", dense="f32", ollama=True, verify=False)
    assert written["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert f"FROM ./model.gguf\nPARAMETER num_ctx {Checkpoint.open(tiny).spec.context}" in (
        tmp_path / "model.Modelfile").read_text()
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    stored = tensors_of(tiny)
    for ours, theirs in (("token_embd.weight", "model.embed_tokens.weight"), ("output_norm.weight", "model.norm.weight"),
                         ("blk.2.ffn_down.weight", "model.layers.2.mlp.down_proj.weight"),
                         ("blk.3.attn_v.weight", "model.layers.3.self_attn.v_proj.weight")):
        assert tensors[ours].dtype == np.float32
        assert np.array_equal(tensors[ours], stored[theirs].float().numpy()), ours


def test_what_cannot_be_written_is_refused_before_anything_is(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "model.Modelfile").write_text("mine")
    for out, options, words in (
            ("model.bin", {}, "does not end in .gguf"), ("model.gguf", {"dense": "f64"}, "it takes f32, f16, bf16"),
            ("model.gguf", {"ollama": True}, "Modelfile exists already")):
        with pytest.raises(ExportError, match=words):
            tsotsallm.to_gguf(tiny, tmp_path / out, **options)
    assert {path.name for path in tmp_path.iterdir()} == {"model.Modelfile"}


def test_two_files_of_a_folder_have_a_modelfile_each(tiny: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        tsotsallm.to_gguf(tiny, tmp_path / f"{name}.gguf", dense="f16", ollama=True, verify=False)
        assert (tmp_path / f"{name}.Modelfile").read_text().startswith(f"FROM ./{name}.gguf\n")


def test_a_file_larger_than_its_checkpoint_is_announced_before_it_is_written(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:q4_0", tmp_path / "small")
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        assert not list(tmp_path.glob("plain*"))

    tsotsallm.to_huggingface(tmp_path / "small", tmp_path / "plain", say=say)
    assert len(said) == 1
    tsotsallm.to_gguf(tmp_path / "small", tmp_path / "small.gguf", verify=False, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize("write", [tsotsallm.to_gguf, tsotsallm.to_huggingface, to_imatrix])
def test_an_output_is_looked_at_before_the_model(tmp_path: Path, write: Callable[..., object]) -> None:
    out = tmp_path / "out.gguf"
    out.touch()
    with pytest.raises(ExportError, match="exists already"):
        write(tmp_path / "no-such-model", out)


def test_the_folder_of_a_file_is_made(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.to_gguf(tiny, tmp_path / "new" / "folder" / "a.gguf", dense="f16", ollama=True, verify=False)
    assert (tmp_path / "new" / "folder" / "a.gguf").exists()
    tsotsallm.to_huggingface(tiny, tmp_path / "other" / "folder" / "plain")


@pytest.mark.parametrize("write", [tsotsallm.to_gguf, tsotsallm.to_huggingface])
def test_a_disk_without_room_is_refused_before_anything_is_written(tiny: Path, tmp_path: Path, write: Callable[..., object],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_disk_bytes", lambda _place: 1000)
    with pytest.raises(ResourceError, match="1 kB are free"):
        write(tiny, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_what_stands_under_the_name_of_unfinished_work_is_not_published_as_a_result(tiny: Path, tmp_path: Path) -> None:
    """A stopped compression keeps hours of work in OUT.partial; so may anybody keep anything."""
    partial = tmp_path / "plain.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years")
    try:
        tsotsallm.to_huggingface(tiny, tmp_path / "plain")
    except TsotsallmError:
        assert not (tmp_path / "plain").exists()
    else:
        assert not (tmp_path / "plain" / "thesis.txt").exists()
    assert (partial / "thesis.txt").read_text() == "years"
