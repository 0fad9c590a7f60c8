"""What checkpoints and GGUF files are made of: weights counted as weights, in both forms alike, in the same words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import tsotsallm
from tests.checkpoint.damage import rewritten
from tests.cli.running import tsotsallm as command
from tests.conftest import build
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import CheckpointError
from tsotsallm.evaluation.cost import cost_of, parameters_of
from tsotsallm.export.gguf import export_gguf
from tsotsallm.inspection import Anatomy, FileAnatomy, inspect_checkpoint, inspect_file, layer_map, part_of_gguf

SAME = ("family", "layers", "hidden", "feed_forward", "heads", "kv_heads", "head_dim", "vocabulary", "tied_embeddings",
        "parameters", "kv_cache_bytes_per_token", "macs_per_token")


def parts(counts: dict[str, int]) -> dict[str, int]:
    return {part: count for part, count in counts.items() if count}


# -- packed embeddings and heads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["q8_0", "q4_0"])
@pytest.mark.parametrize("family", ["llama3", "llama2"], ids=["tied", "untied"])
def test_packed_embeddings_and_heads_are_counted_as_weights(tmp_path: Path, family: str, ends: str) -> None:
    source = build(tmp_path / "source", family, dtype=torch.bfloat16)
    tsotsallm.compress(source, f"[{{quantize: {{method: rtn, grid: q4_0, ends: {ends}}}}}]", tmp_path / "out")
    before, after = (Checkpoint.open(path) for path in (source, tmp_path / "out"))
    assert after.is_packed("model.embed_tokens")
    was, now = inspect_checkpoint(before), inspect_checkpoint(after)
    assert now.parameters_by_part == was.parameters_by_part
    assert now.parameters_by_part["embeddings"] == 256 * 64
    assert now.bytes_by_part["embeddings"] == 256 * 64 // 32 * (34 if ends == "q8_0" else 18)
    assert now.parameters_by_part["head"] == (0 if family == "llama3" else 256 * 64)
    assert parameters_of(View.of(after)) == parameters_of(View.of(before)) == now.parameters
    dense, packed = cost_of(before, "before"), cost_of(after, "after")
    assert packed.float32_bytes == dense.float32_bytes == 4 * now.parameters
    assert packed.float32_bytes_by_part == dense.float32_bytes_by_part
    embeddings = Checkpoint.tensor(after, "model.embed_tokens.weight")
    others = sum(int(torch.count_nonzero(after.tensor(name))) for name in (
        "model.norm.weight", *(("lm_head.weight",) if family == "llama2" else ())))
    layers = sum(int(torch.count_nonzero(one)) for layer in range(4) for one in after.layer(layer).values())
    assert packed.nonzero_parameters == int(torch.count_nonzero(embeddings)) + others + layers <= now.parameters


def test_the_embedded_model_with_packed_embeddings(tmp_path: Path) -> None:
    recipe = "[{layers: {order: [0, 1]}}, {quantize: {method: rtn, grid: q8_0, ends: q8_0}}]"
    result = tsotsallm.compress("embedded", recipe, tmp_path / "out")
    found = tsotsallm.inspect(tmp_path / "out")
    assert found.parameters_by_part["embeddings"] == 4096 * 256 == 1_048_576
    assert found.bytes_by_part["embeddings"] == 1_114_112
    assert found.parameters == result.result_parameters


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_its_checkpoint_in_the_same_words(family_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint, path = Checkpoint.open(family_checkpoint), tmp_path / "model.gguf"
    found = export_gguf(checkpoint, path, dense="f16")
    one, other = inspect_checkpoint(checkpoint), inspect_file(path)
    for name in SAME[1:]:
        assert getattr(other, name) == getattr(one, name), name
    assert parts(other.parameters_by_part) == parts(one.parameters_by_part)
    assert (other.bits_per_linear_weight, other.storage) == (pytest.approx(16, abs=0.3), "f16, f32")
    assert other.bytes_by_type == dict(sorted(found.bytes_by_type.items(), key=lambda item: -item[1]))
    assert (other.file_bytes, other.bytes) == (path.stat().st_size, sum(found.bytes_by_type.values()))
    assert sum(other.bytes_by_part.values()) == sum(other.bytes_by_type.values()) == other.bytes
    assert sum(other.parameters_by_type.values()) == other.parameters
    reader = gguf.GGUFReader(path)
    assert other.bytes == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert set(one.plain()) - {"stored_layers"} <= set(other.plain())


def test_a_result_of_ours_says_where_it_comes_from(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:q4_0", tmp_path / "out")
    export_gguf(Checkpoint.open(tmp_path / "out"), tmp_path / "model.gguf", name="Small one", dense="f16")
    found = inspect_file(tmp_path / "model.gguf")
    assert found.made_from["name"] == "Small one"
    assert found.made_from["recipe"][0]["quantize"]["grid"] == "q4_0"
    assert found.made_from["original"] == tiny.name
    assert found.bits_per_linear_weight == 4.5
    assert found.tokenizer is not None
    assert found.tokenizer["kind"] == "byte-level BPE"
    assert found.tokenizer["tokens"] == 256
    assert found.tokenizer["bos"]["number"] == 0
    assert not found.notes
    shown = command("inspect", tmp_path / "model.gguf").stdout
    for words in ("embeddings", "feed-forward", "4 layers, hidden 64", "stored as", "4.50 bits per linear weight", "q4_0",
                  "byte-level BPE", "256 tokens", "BOS 0", "name: Small one", "recipe: [{"):
        assert words in shown, words
    assert json.loads(command("inspect", tmp_path / "model.gguf", "--json").stdout) == json.loads(json.dumps(found.plain()))


@pytest.fixture(scope="module")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    export_gguf(Checkpoint.open(build(folder / "source", "llama2")), folder / "model.gguf")
    return folder / "model.gguf"


def test_what_a_header_leaves_out_is_unknown(plain_file: Path, tmp_path: Path) -> None:
    path = rewritten(plain_file, tmp_path / "a.gguf", ("context_length", "embedding_length", "attention.key_length",
                                                       "feed_forward_length", "tokenizer.ggml.tokens"))
    found = inspect_file(path)
    assert (found.context, found.hidden, found.head_dim, found.feed_forward, found.tokenizer) == (None,) * 5
    assert found.notes == ("has no llama.embedding_length in its header, without which no engine runs a language model; "
                           "convert or download it again",)
    shown = command("inspect", path)
    assert "hidden unknown" in shown.stdout
    assert "KV cache unknown" in shown.stdout
    assert "no tokenizer" in shown.stdout
    assert "llama.embedding_length" in shown.stdout + shown.stderr


def test_layers_that_differ_and_parts_of_several_files(plain_file: Path, tmp_path: Path) -> None:
    found = inspect_file(rewritten(plain_file, tmp_path / "a.gguf", attention__head_count=[4, 2, 4, 2]))
    assert (found.heads, found.kv_heads) == (4, 4)
    assert "heads differ from layer to layer: from 2 to 4" in found.notes
    second = inspect_file(rewritten(plain_file, tmp_path / "b.gguf", split__no=1, split__count=2))
    assert any("give the first part" in note for note in second.notes)
    assert any("of this part alone" in note for note in second.notes)


def test_words_of_strangers_stay_on_their_line(plain_file: Path, tmp_path: Path) -> None:
    path = rewritten(plain_file, tmp_path / "a.gguf", general__name="a\nnote: all is well\x1b[2J" + "x" * 10_000,
                     general__organization="b\u202ec", tokenizer__ggml__pre="p\n\x1b[0m")
    shown = command("inspect", path).stdout
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert not any(line.startswith("note: all is well") for line in shown.splitlines())
    assert max(map(len, shown.splitlines())) < 500


def test_an_adapter_is_shown_for_what_it_is(tmp_path: Path, text: Path) -> None:
    source = build(tmp_path / "source", "llama3", dtype=torch.bfloat16)
    tsotsallm.compress(source, "[{quantize: {grid: q4_0}}, {compensate: {rank: 8}}]", tmp_path / "out", calibration=text,
                       windows=4, window=64)
    found = export_gguf(Checkpoint.open(tmp_path / "out"), tmp_path / "model.gguf")
    assert found.adapter is not None
    anatomy = inspect_file(found.adapter)
    assert parts(anatomy.parameters_by_part) == {"adapter": inspect_checkpoint(
        Checkpoint.open(tmp_path / "out")).parameters_by_part["adapter"]}
    assert any("is an adapter" in note for note in anatomy.notes)
    assert "adapter" in command("inspect", found.adapter).stdout


def test_experts_count_as_far_as_a_token_uses_them(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "moe.gguf", "llama")
    for key, value in {"block_count": 1, "expert_count": 8, "expert_used_count": 2}.items():
        writer.add_uint32(f"llama.{key}", value)
    shapes = {"token_embd.weight": (10, 32), "blk.0.attn_q.weight": (32, 32), "blk.0.ffn_up_exps.weight": (8, 64, 32),
              "blk.0.ffn_gate_inp.weight": (8, 32), "rope_freqs.weight": (16,)}
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = inspect_file(tmp_path / "moe.gguf")
    assert found.parameters == 320 + 1024 + 8 * 2048 + 256
    assert found.macs_per_token == 320 + 1024 + 2 * 2048 + 256
    assert found.bytes_by_part["other"] == 64


@pytest.mark.parametrize(("name", "part"), [
    ("token_embd.weight", "embeddings"), ("token_embd_norm.weight", "norms"), ("output.weight", "head"),
    ("output_norm.weight", "norms"),
    ("blk.3.attn_q.bias", "attention"), ("blk.3.attn_q_norm.weight", "norms"), ("blk.12.attn_qkv.weight", "attention"),
    ("blk.3.ffn_gate_exps.weight", "feed-forward"), ("blk.3.ffn_norm.weight", "norms"), ("rope_freqs.weight", "other"),
    ("blk.0.ssm_in.weight", "other"), ("blk.0.ffn_up.weight.lora_a", "adapter"), ("v.blk.0.attn_q.weight", "other")])
def test_parts_of_files(name: str, part: str) -> None:
    assert part_of_gguf(name) == part


def test_what_inspect_is_given(tiny: Path, plain_file: Path, tmp_path: Path) -> None:
    assert isinstance(tsotsallm.inspect(tiny), Anatomy)
    assert isinstance(tsotsallm.inspect(plain_file), FileAnatomy)
    (tmp_path / "bare").write_bytes(plain_file.read_bytes())
    assert isinstance(tsotsallm.inspect(tmp_path / "bare"), FileAnatomy)
    (tmp_path / "folder.gguf").symlink_to(tiny)
    assert isinstance(tsotsallm.inspect(tmp_path / "folder.gguf"), Anatomy)
    cases: dict[str, tuple[Any, str]] = {
        "cut": (plain_file.read_bytes()[:5000], "copy or download it again"), "no": (b"no such", "does not begin with GGUF")}
    for name, (content, words) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        shown = command("inspect", path, check=False)
        assert shown.returncode == 1
        assert len(shown.stderr.splitlines()) == 1
        assert words in shown.stderr
    with pytest.raises(CheckpointError, match="give the directory"):
        tsotsallm.inspect(next(tiny.glob("*.safetensors")))
    with pytest.raises(CheckpointError, match="does not exist; give a GGUF file"):
        tsotsallm.inspect(tmp_path / "none.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match="a FIFO"):
        tsotsallm.inspect(tmp_path / "a.gguf")


def test_layers_chosen_before_depth_are_counted_once(tiny: Path, tmp_path: Path) -> None:
    depth = {"remove": 1, "importance": "magnitude", "protect": {"first": 0, "last": 0}}
    recipe = [{"layers": {"skip": [0]}}, {"depth": depth}]
    tsotsallm.compress(tiny, recipe, tmp_path / "out")
    [_, choice] = json.loads((tmp_path / "out" / "tsotsallm.json").read_text("utf-8"))["choices"]
    assert layer_map(Checkpoint.open(tmp_path / "out")).runs == tuple(1 + place for place in choice["order"])
