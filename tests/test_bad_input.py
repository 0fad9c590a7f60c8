"""Damaged, lying and dangerous checkpoints, and texts that do not do: a clear error, nothing half written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import tsotsallm
from tests.checkpoint.damage import Header, edit_json, with_header
from tests.conftest import build
from tsotsallm.errors import CheckpointError, CorpusError, TsotsallmError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "source", "llama2", shard="120KB")


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def edit_config(path: Path, **changes: object) -> None:
    edit_json(path / "config.json", **changes)


def truncate(path: Path) -> None:
    shard = shards(path)[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def cut_header(path: Path) -> None:
    shards(path)[0].write_bytes(shards(path)[0].read_bytes()[:20])


def remove_shard(path: Path) -> None:
    shards(path)[0].unlink()


def lying_index(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = list(content["weight_map"])
    content["weight_map"][names[0]] = content["weight_map"][names[-1]]
    index.write_text(json.dumps(content))


def index_outside(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))


def not_a_number(path: Path) -> None:
    for shard in shards(path):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if "layers.2" in name and tensor.ndim == 2:
                tensor[3, 3] = float("nan")
        save_file(tensors, shard)


def not_a_number_in_embeddings(path: Path) -> None:
    for shard in shards(path):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if "embed_tokens" in name:
                tensor[200, 1] = float("inf")
        save_file(tensors, shard)


def pickled(path: Path) -> None:
    for file in [*shards(path), path / "model.safetensors.index.json"]:
        file.unlink()
    torch.save({}, path / "pytorch_model.bin")


def garbage(path: Path) -> None:
    shards(path)[0].write_bytes(b"\x10\0\0\0\0\0\0\0" + b"{not json at all" + b"\0" * 50)


def negative_offsets(path: Path) -> None:
    def change(header: Header) -> None:
        entry = next(iter(header.values()))
        entry["data_offsets"] = [offset - 8 for offset in entry["data_offsets"]]
        entry["data_offsets"][0] = -8
    with_header(shards(path)[0], change)


def overlap(path: Path) -> None:
    def change(header: Header) -> None:
        entries = list(header.values())
        same = [entry for entry in entries if entry["shape"] == entries[0]["shape"]]
        same[1]["data_offsets"] = same[0]["data_offsets"]
    with_header(max(shards(path), key=lambda shard: shard.stat().st_size), change)


def unknown_tensor(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = shards(path)[0]
    save_file(load_file(shard) | {"model.layers.1.self_attn.k_scale": torch.tensor(1.0)}, shard)
    content["weight_map"]["model.layers.1.self_attn.k_scale"] = shard.name
    index.write_text(json.dumps(content))


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated shard": (truncate, "truncated"),
    "cut header": (cut_header, "not a safetensors file"),
    "garbage": (garbage, "unreadable safetensors header"),
    "missing shard": (remove_shard, "does not exist"),
    "index that lies": (lying_index, "index and shards do not belong together"),
    "index that leaves the directory": (index_outside, "outside the checkpoint"),
    "NaN": (not_a_number, "NaN or infinity"),
    "infinite embedding": (not_a_number_in_embeddings, "NaN or infinity"),
    "wider config": (lambda path: edit_config(path, intermediate_size=128), "has shape .* config.json says"),
    "longer config": (lambda path: edit_config(path, num_hidden_layers=5), "no shard holds"),
    "shorter config": (lambda path: edit_config(path, num_hidden_layers=3), "does not have; config and weights"),
    "unknown architecture": (lambda path: edit_config(path, model_type="gpt_neox"), "unknown architecture 'gpt_neox'"),
    "code in the checkpoint": (lambda path: edit_config(path, auto_map={"AutoModel": "x.Y"}), "never run"),
    "other quantisation": (lambda path: edit_config(path, quantization_config={"quant_method": "awq"}), "awq"),
    "config of nonsense": (lambda path: edit_config(path, hidden_size="wide"), "not a valid llama config"),
    "config is not JSON": (lambda path: (path / "config.json").write_text("{"), "not valid JSON"),
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "not a Hugging Face config"),
    "layers are text": (lambda path: edit_config(path, num_hidden_layers="x"), "num_hidden_layers is 'x'"),
    "activation nobody knows": (lambda path: edit_config(path, hidden_act="foo"), "not a valid llama config"),
    "no KV heads": (lambda path: edit_config(path, num_key_value_heads=0), "not a valid llama config"),
    "tied to another head": (lambda path: edit_config(path, tie_word_embeddings=True), "set tie_word_embeddings to false"),
    "integer codes": (lambda path: edit_config(path, quantization_config={
        "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}}), "int-quantized"),
    "index without files": (lambda path: (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": null}}'),
                            "cannot be read"),
    "offsets below zero": (negative_offsets, "unreadable safetensors header"),
    "overlapping tensors": (overlap, "overlap"),
    "unknown tensor in a layer": (unknown_tensor, "is not part of a llama layer"),
    "provenance that is not JSON": (lambda path: (path / "tsotsallm.json").write_text("{"),
                                    "tsotsallm.json is not valid JSON"),
    "damaged provenance": (lambda path: (path / "tsotsallm.json").write_text("{}"), "tsotsallm.json is damaged"),
    "pickled": (pickled, "pickle can run any code"),
    "a token without end": (lambda path: (path / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": ["x" * 20_000], "eos_token": "y" * 20_000})), "token of 20000 characters"),
    "no tokenizer": (lambda path: [file.unlink() for file in path.glob("token*")], "no usable tokenizer"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_checkpoint_is_a_clear_error(source: Path, text: Path, tmp_path: Path, case: str) -> None:
    spoil, message = CASES[case]
    spoil(source)
    with pytest.raises(CheckpointError, match=message):
        tsotsallm.compress(source, "wanda:2:4, gptq:4:32", tmp_path / "out", calibration=text, windows=4, window=64)
    assert not (tmp_path / "out").exists()


def test_nan_is_found_even_when_layers_are_only_copied(source: Path, tmp_path: Path) -> None:
    not_a_number(source)
    with pytest.raises(CheckpointError, match="NaN"):
        tsotsallm.compress(source, "skip:0", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="names of files are text here")
def test_a_folder_whose_name_is_no_text_is_a_folder(source: Path, tmp_path: Path) -> None:
    odd = source.rename(os.fsdecode(os.fsencode(tmp_path) + b"/a\xffb"))
    tsotsallm.compress(odd, "rtn:8:32", tmp_path / "out")
    assert tsotsallm.inspect(tmp_path / "out").layers == 4
    assert json.loads((tmp_path / "out" / "tsotsallm.json").read_text("utf-8"))["source"] == "a?b"


def test_an_export_of_damaged_weights_leaves_nothing(source: Path, tmp_path: Path) -> None:
    not_a_number(source)
    (tmp_path / "there").mkdir()
    for write, name in ((tsotsallm.to_huggingface, "out"), (tsotsallm.to_gguf, "out.gguf")):
        with pytest.raises(CheckpointError, match="NaN"):
            write(source, tmp_path / "there" / name)
    assert not list((tmp_path / "there").iterdir())


def test_inputs_at_fault_leave_no_work_that_would_refuse_whole_ones(source: Path, text: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(source, whole)
    not_a_number(source)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    settings: dict[str, Any] = {"calibration": text, "windows": 2, "window": 64, "scratch": scratch}
    with pytest.raises(CheckpointError, match="NaN"):
        tsotsallm.compress(source, "gptq:4:32", tmp_path / "out", **settings)
    assert not (tmp_path / "out.partial").exists()
    assert not list(scratch.iterdir())
    shutil.rmtree(source)
    whole.rename(source)
    tsotsallm.compress(source, "gptq:4:32", tmp_path / "out", **settings)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"  \n ", "is empty"), (b"short", "fewer than one window"), (b"\xff\xfe\x00caf\xe9", "not UTF-8")])
def test_a_text_that_does_not_do_is_a_clear_error(source: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        tsotsallm.compress(source, "gptq:4:32", tmp_path / "out", calibration=path, windows=4, window=64)
    assert not (tmp_path / "out").exists()


def test_no_text_at_all_says_what_to_give(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="calibration=FILE"):
        tsotsallm.compress(source, "gptq:4:32", tmp_path / "out")


def test_a_missing_model_names_the_ways_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hub id"):
        tsotsallm.inspect(tmp_path / "nothing")


def test_too_little_memory_or_disk_is_refused_before_anything_starts(source: Path, text: Path, tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tsotsallm.machine.free_disk_bytes", lambda _path: 1000)
    with pytest.raises(TsotsallmError, match="of disk"):
        tsotsallm.compress(source, "gptq:4:32", tmp_path / "out", calibration=text, windows=4, window=64)
    monkeypatch.undo()
    monkeypatch.setattr("tsotsallm.planning.free_ram_bytes", lambda: -(1 << 40))
    with pytest.raises(TsotsallmError, match="of memory"):
        tsotsallm.compress(source, "gptq:4:32", tmp_path / "out", calibration=text, windows=4, window=64)
    assert not (tmp_path / "out.partial").exists()
    tsotsallm.compress(source, "gptq:4:32", tmp_path / "out", calibration=text, windows=4, window=64, force=True)


def test_a_gpu_that_is_not_there_is_a_clear_error(source: Path, text: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(TsotsallmError, match='device="cpu"'):
        tsotsallm.compress(source, "gptq:4:32", tmp_path / "out", calibration=text, device="cuda")


def test_a_lock_of_a_living_process_is_respected(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "lock").write_text(json.dumps([os.getppid(), psutil.Process(os.getppid()).create_time()]))
    with pytest.raises(TsotsallmError, match="is working on"):
        tsotsallm.compress(source, "", tmp_path / "out")
    (partial / "lock").write_text(json.dumps([os.getppid(), 1.0]))       # a number given to another process since
    tsotsallm.compress(source, "", tmp_path / "out")
