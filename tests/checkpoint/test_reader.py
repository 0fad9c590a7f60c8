"""A checkpoint read lazily against the safetensors library; rows of fewer tokens, fingerprints, what is found by a name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tsotsallm
from tests.checkpoint.damage import edit_json
from tests.compressing import tensors_of, unpacked_by_transformers
from tests.conftest import build
from tsotsallm.checkpoint.reader import VOCABULARY, Checkpoint, layer_prefix, locate
from tsotsallm.checkpoint.source import PROVENANCE
from tsotsallm.checkpoint.spec import EMBEDDING, FINAL_NORM, HEAD
from tsotsallm.checkpoint.weights import SINGLE
from tsotsallm.errors import CheckpointError

KEPT = [0, 1, 2, 7, 8, 40, 255]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain") / "plain", "llama2", dtype=torch.bfloat16, shard="60KB")


@pytest.fixture
def copied(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))


def test_every_tensor_is_the_librarys_in_float32(family_checkpoint: Path) -> None:
    checkpoint, stored = Checkpoint.open(family_checkpoint), tensors_of(family_checkpoint)
    assert checkpoint.records.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.tensor(name), tensor.float()), name
        assert checkpoint.shape_of(name) == tuple(tensor.shape)
        checkpoint.require_finite(name)
    layers = {layer_prefix(index) + name: tensor for index in range(4) for name, tensor in checkpoint.layer(index).items()}
    assert layers.keys() == {name for name in stored if ".layers." in name}
    assert layers.keys() | checkpoint.end_records().keys() == stored.keys()
    assert checkpoint.weight_bytes == sum(path.stat().st_size for path in family_checkpoint.glob("*.safetensors"))


def test_the_head_is_the_one_that_transformers_uses(family_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(family_checkpoint)
    head = AutoModelForCausalLM.from_pretrained(family_checkpoint, dtype=torch.float32).lm_head.weight
    assert torch.equal(checkpoint.tensor(checkpoint.head_name), head)


@pytest.mark.parametrize("recipe", ["rtn:4:32", "rtn:3:channel", "[{quantize: {method: rtn, bits: 4, symmetric: false}}]"])
def test_packed_tensors_are_what_transformers_computes_with(tiny: Path, tmp_path: Path, recipe: str) -> None:
    tsotsallm.compress(tiny, recipe, tmp_path / "out")
    checkpoint, theirs = Checkpoint.open(tmp_path / "out"), unpacked_by_transformers(tmp_path / "out")
    for index in range(4):
        names = checkpoint.layer_names(index)
        assert len(names) == len(set(names)) == len(Checkpoint.open(tiny).layer_names(index))
        for name in names:
            full = layer_prefix(index) + name
            assert torch.equal(checkpoint.tensor(full), theirs[full].float()), full
            assert checkpoint.shape_of(full) == tuple(theirs[full].shape)
            assert checkpoint.is_packed(full.removesuffix(".weight")) == (theirs[full].ndim == 2)
    assert checkpoint.packed("model.layers.0.input_layernorm") is None


def test_rows_are_slices(plain: Path) -> None:
    checkpoint, table = Checkpoint.open(plain), tensors_of(plain)[HEAD].float()
    for first, last in ((0, 1), (255, 256), (3, 200), (0, 256), (7, 7), (250, 900)):
        assert torch.equal(checkpoint.rows(HEAD, first, last), table[first:last])


@pytest.mark.parametrize("ends", [None, "q8_0"])
def test_fewer_tokens_are_read_by_their_old_numbers(tmp_path: Path, ends: str | None) -> None:
    path = build(tmp_path / "model", "llama2")
    if ends is not None:
        recipe = f"[{{quantize: {{method: rtn, grid: q8_0, ends: {ends}}}}}]"
        path = tsotsallm.compress(path, recipe, tmp_path / "packed").path
    whole = Checkpoint.open(path)
    fewer = whole.restricted(KEPT, whole.spec.config | {"vocab_size": len(KEPT)}, {})
    for name in (EMBEDDING, HEAD):
        expected = whole.tensor(name)[KEPT]
        assert torch.equal(fewer.tensor(name), expected)
        for first, last in ((0, 7), (2, 5), (6, 7), (4, 900)):
            assert torch.equal(fewer.rows(name, first, last), expected[first:last])
        stored = name if ends is None else f"{name}_blocks"
        piece = fewer.end_pieces()[stored]
        assert isinstance(piece, torch.Tensor)
        assert torch.equal(piece, whole.record(stored).read()[KEPT])
        fewer.require_finite(stored)
    assert torch.equal(fewer.tensor(FINAL_NORM), whole.tensor(FINAL_NORM))
    assert fewer.spec.vocabulary == 7
    assert whole.spec.vocabulary == 256
    assert fewer.fingerprint() != whole.fingerprint()
    assert fewer.codec is whole.codec           # text keeps the old numbers


def test_an_original_is_read_with_the_tokens_that_were_kept(plain: Path, tmp_path: Path, text: Path) -> None:
    tsotsallm.compress(plain, [{"vocabulary": {"keep": [str(text)]}}], tmp_path / "small")
    small, whole = Checkpoint.open(tmp_path / "small"), Checkpoint.open(plain)
    kept = small.tokens_of_original
    assert kept is not None
    assert torch.equal(whole.with_tokens_of(small).tensor(HEAD), small.tensor(HEAD))
    assert whole.with_tokens_of(whole) is whole
    assert small.with_tokens_of(small) is small
    assert (tmp_path / "small" / VOCABULARY).exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [EMBEDDING, HEAD, FINAL_NORM, "model.layers.1.mlp.up_proj.weight"])
def test_what_is_no_number_is_found_wherever_it_stands(tmp_path: Path, name: str, value: float) -> None:
    path = build(tmp_path / "model", "llama2", num_hidden_layers=2)
    tensors = load_file(path / SINGLE)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path / SINGLE, {"format": "pt"})
    checkpoint = Checkpoint.open(path)
    for read in (checkpoint.tensor, checkpoint.require_finite):
        with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
            read(name)


def test_weights_whose_sum_is_too_large_are_finite(tmp_path: Path) -> None:
    path = build(tmp_path / "model", "llama2", num_hidden_layers=1)
    tensors = load_file(path / SINGLE)
    tensors[HEAD].fill_(3e38)
    save_file(tensors, path / SINGLE, {"format": "pt"})
    assert torch.equal(Checkpoint.open(path).tensor(HEAD), tensors[HEAD])


def test_old_checkpoints_with_rotary_frequencies_are_read(tiny: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(tiny, old)
    (old / "model.safetensors.index.json").unlink()
    for path in old.glob("*.safetensors"):
        path.unlink()
    save_file(tensors_of(tiny) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, old / SINGLE)
    tsotsallm.compress(old, "rtn:4:32", tmp_path / "out")
    assert tsotsallm.inspect(tmp_path / "out").layers == 4


def test_a_fingerprint_is_the_same_until_something_changes(copied: Path, tmp_path: Path) -> None:
    first = Checkpoint.open(copied).fingerprint()
    assert first == Checkpoint.open(shutil.copytree(copied, tmp_path / "again")).fingerprint()
    assert json.loads(json.dumps(first)) == first
    edit_json(copied / "config.json", rope_theta=20000.0)
    second = Checkpoint.open(copied).fingerprint()
    assert second["shards"] == first["shards"]
    assert second["config_sha256"] != first["config_sha256"]
    shard = sorted(copied.glob("model-*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert Checkpoint.open(copied).fingerprint()["shards"] != first["shards"]


@pytest.mark.parametrize(("name", "message"), [
    ("no-such-folder", "does not exist; give a checkpoint's directory, a hub id such as"),
    ("a/b/c", "does not exist"), ("~/model", "does not exist"), ("", r"no config\.json"), ("name/model\n", "does not exist"),
    ("name/model?", "does not exist")])
def test_names_that_are_neither_folders_nor_ids_are_not_asked_for(tmp_path: Path, name: str, message: str,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(name)


def test_a_file_is_no_folder(plain: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a file; give the directory that holds config\.json"):
        locate(plain / "config.json")
    assert locate(plain) == plain
    assert (locate("embedded") / "config.json").exists()


def test_a_tensor_that_is_not_there_is_named(plain: Path) -> None:
    checkpoint = Checkpoint.open(plain)
    for read in (checkpoint.record, checkpoint.tensor, checkpoint.shape_of):
        with pytest.raises(CheckpointError, match=r"has no tensor .*model\.layers\.9\.mlp\.up_proj\.weight"):
            read("model.layers.9.mlp.up_proj.weight")
    assert checkpoint.layer(9) == {}


@pytest.mark.parametrize(("dtype", "storage"), [(torch.float32, torch.float32), (torch.float16, torch.float16)])
def test_new_tensors_have_the_type_of_the_old_ones(tmp_path: Path, dtype: torch.dtype, storage: torch.dtype) -> None:
    path = build(tmp_path / "model", "llama3", dtype=dtype, num_hidden_layers=1)
    assert Checkpoint.open(path).storage == storage
    tsotsallm.compress(path, "[{quantize: {method: rtn, grid: q8_0, ends: q8_0}}]", tmp_path / "packed")
    assert Checkpoint.open(tmp_path / "packed").storage == storage          # by the config, since none is dense


def test_zeros_are_known_to_be_meant_through_all_generations(tiny: Path, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": text, "windows": 2, "window": 32}
    tsotsallm.compress(tiny, "wanda:2:4", tmp_path / "one", **options)
    tsotsallm.compress(tmp_path / "one", "skip:1", tmp_path / "two")
    tsotsallm.compress(tmp_path / "two", "rtn:4:32", tmp_path / "three")
    assert [Checkpoint.open(path).is_sparse for path in (tiny, tmp_path / "one", tmp_path / "two", tmp_path / "three")] == [
        False, True, True, True]
    (tmp_path / "three" / PROVENANCE).unlink()
    assert not Checkpoint.open(tmp_path / "three").is_sparse


@pytest.mark.parametrize("name", ["../up", "./model", "../.."])
def test_a_relative_path_that_leads_nowhere_is_no_id_of_the_hub(tmp_path: Path, name: str,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    message = "no config.json" if name == "../.." else "does not exist"
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(name)
    assert "downloaded" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def asked(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no file in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    with pytest.raises(CheckpointError, match="the hub cannot be reached; connect to the internet") as found:
        Checkpoint.open("Some/Model")
    assert "LocalEntryNotFoundError" not in str(found.value)
