"""Results written part by part: read by transformers and safetensors, in shards, or not at all where a part is lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import build
from tsotsallm.checkpoint import writer
from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shards import Piece
from tsotsallm.checkpoint.spec import slice_config
from tsotsallm.checkpoint.weights import INDEX, SINGLE
from tsotsallm.checkpoint.writer import Writer, partial_path, publish, write_json
from tsotsallm.errors import CheckpointError
from tsotsallm.numerics.grids import Grid, IntegerGrid, NormalFloatGrid

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(build(tmp_path_factory.mktemp("source") / "source", "llama2"))


def written(source: Checkpoint, out: Path, kept: list[int], layer_order: list[int] | None = None) -> Writer:
    """The layers `kept` of a model, copied, written in an order of their own."""
    made = Writer(out)
    for index in reversed(kept):        # parts may come in any order
        made.write_layer(index, dict(source.layer_records(index)))
    made.write_ends(dict(source.end_records()), 4)
    order = kept if layer_order is None else [kept[place] for place in layer_order]
    made.finish(source, slice_config(source.spec.config, order, 4), {}, layer_order, kept, 4)
    return made


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 3], [3, 0]], ids=str)
def test_layers_get_the_numbers_of_their_places(source: Checkpoint, tmp_path: Path, kept: list[int]) -> None:
    made = written(source, tmp_path / "out", kept)
    made.remove_parts()
    assert not list((tmp_path / "out").glob("part-*"))
    assert not made.own_container
    theirs = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float32).eval()
    theirs.model.layers = torch.nn.ModuleList(theirs.model.layers[index] for index in kept)
    for place, layer in enumerate(theirs.model.layers):
        layer.self_attn.layer_idx = place
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, theirs(IDS, use_cache=False).logits)


def test_shards_hold_every_tensor_once_as_the_index_says(source: Checkpoint, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 300_000)
    made = written(source, tmp_path / "out", [0, 1, 2, 3])
    made.remove_parts()
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = {path.name: load_file(path) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 1
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    assert all((tmp_path / "out" / name).stat().st_size <= 300_000 + 20_000 for name in files)
    whole = load_file(source.directory / SINGLE)
    assert index["weight_map"].keys() == whole.keys()
    for tensors in files.values():
        assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors.items())


def test_a_lost_part_is_named_before_anything_is_joined(source: Checkpoint, tmp_path: Path) -> None:
    made = Writer(tmp_path / "out")
    made.write_ends(dict(source.end_records()), 4)
    with pytest.raises(CheckpointError, match=r"lost part-00002\.safetensors; delete the directory"):
        made.finish(source, dict(source.spec.config), {}, None, [2], 4)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"part-00004.safetensors"}


def test_parts_stay_until_they_are_removed(source: Checkpoint, tmp_path: Path) -> None:
    made = written(source, tmp_path / "out", [0, 1])
    assert {path.name for path in (tmp_path / "out").glob("part-*")} == {f"part-0000{number}.safetensors"
                                                                         for number in (0, 1, 4)}
    first = (tmp_path / "out" / SINGLE).read_bytes()
    made.finish(source, slice_config(source.spec.config, [0, 1], 4), {}, None, [0, 1], 4)        # after a kill in between
    assert (tmp_path / "out" / SINGLE).read_bytes() == first


def test_a_repeated_layer_makes_a_container_of_our_own(source: Checkpoint, tmp_path: Path) -> None:
    made = written(source, tmp_path / "out", [0, 2], [0, 1, 1])
    made.remove_parts()
    assert made.own_container
    found = Checkpoint.open(tmp_path / "out")
    assert found.spec.layer_order == (0, 1, 1)
    assert torch.equal(found.layer(1)["mlp.up_proj.weight"], source.layer(2)["mlp.up_proj.weight"])
    with pytest.raises((ValueError, KeyError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(("grid", "bits", "own"), [
    (IntegerGrid(4, 32), None, False), (NormalFloatGrid(group=32), None, True), (IntegerGrid(4, 32), 16, False),
    (IntegerGrid(4, 32), 8, True), (None, 16, False)])
def test_codes_and_corrections_go_where_their_readers_look(source: Checkpoint, tmp_path: Path, grid: IntegerGrid | None,
                                                           bits: int | None, own: bool) -> None:
    """Codes of integers and 16-bit corrections are for any reader; NF4 and 8-bit corrections for ours."""
    out, effective, grids = tmp_path / "out", {}, {}
    made = Writer(out)
    for index in range(4):
        pieces: dict[str, Piece] = dict(source.layer_records(index))
        one = Linear("mlp.up_proj", source.layer(index)["mlp.up_proj.weight"], torch.float32)
        if grid is not None:
            one.quantise(grid.round(one.dense, one.storage))
        if bits is not None:
            one.compensate(torch.randn(one.d_out, 2) * 0.1, torch.randn(2, one.d_in) * 0.1, bits)
        del pieces["mlp.up_proj.weight"]
        made.write_layer(index, pieces | one.tensors())
        effective[index] = one.effective()
        grids |= {f"model.layers.{index}.{name.removesuffix('.weight')}": None for name, record in pieces.items()
                  if isinstance(record.shape, tuple) and len(record.shape) == 2}
        grids[f"model.layers.{index}.mlp.up_proj"] = grid
    made.write_ends(dict(source.end_records()), 4)
    some: dict[str, Grid | None] = dict(grids)
    made.finish(source, dict(source.spec.config), some, None, [0, 1, 2, 3], 4)
    made.remove_parts()
    assert made.own_container == own
    assert (out / "adapter").exists() == (bits == 16)
    (out / "tsotsallm.json").write_text(json.dumps({"recipe": [], "choices": [], "measures": {}}))
    found = Checkpoint.open(out)
    for index in range(4):
        torch.testing.assert_close(found.layer(index)["mlp.up_proj.weight"], effective[index])
        assert torch.equal(found.layer(index)["mlp.gate_proj.weight"], source.layer(index)["mlp.gate_proj.weight"])
    if bits == 16:
        stored = load_file(out / "adapter" / "adapter_model.safetensors")
        assert len(stored) == 8
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, ["up_proj"])


def test_files_beside_the_weights_come_along_and_no_others(source: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source.directory, tmp_path / "source"))
    for name in ("LICENSE.txt", "USE_POLICY.md", "notes.txt", "train.py", "pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    written(Checkpoint.open(folder), tmp_path / "out", [0]).remove_parts()
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {SINGLE, "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                     "LICENSE.txt", "USE_POLICY.md", "additional_chat_templates/rag.jinja"}


def test_a_name_of_weights_in_the_sources_config_does_not_come_along(source: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source.directory, tmp_path / "source"))
    (folder / SINGLE).rename(folder / "other.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    written(Checkpoint.open(folder), tmp_path / "out", [0, 1, 2, 3]).remove_parts()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_result_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "dotted.name-1.5"
    partial = partial_path(final)
    assert partial == tmp_path / "dotted.name-1.5.partial"
    (partial / "adapter").mkdir(parents=True)
    (partial / "adapter" / "a").write_text("a")
    publish(partial, final)
    assert (final / "adapter" / "a").read_text() == "a"
    assert not partial.exists()


@pytest.mark.skipif(os.name != "posix", reason="elsewhere files replace no folders")
def test_a_folder_with_something_in_it_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    partial_path(tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="not empty"):
        publish(partial_path(tmp_path / "out"), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_json_is_there_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, None], "name": os.fsdecode(b"a\xffb") if os.name == "posix" else "a?b"})
    assert json.loads(path.read_text("utf-8")) == {"é": [1, None], "name": "a?b"}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text("utf-8"))["é"] == [1, None]
