"""GGUF files of every family as sources: the same logits, config and tokens, and the same file when exported again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import tsotsallm
from tests.checkpoint.test_gguf_source import Parts, effective, logits, raw
from tests.conftest import MORE_FAMILIES, build
from tests.export.test_gguf import IDS
from tests.fidelity import kinds
from tests.test_families import losses
from tsotsallm.checkpoint.families import ARCHITECTURES, FAMILIES
from tsotsallm.checkpoint.gguf_rope import _share
from tsotsallm.checkpoint.gguf_vocabulary import ALIKE, read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.llama import Llama
from tsotsallm.errors import CheckpointError
from tsotsallm.export.gguf import export_gguf

TEXT = "Été 12 don't \n\n  x"
READ_AS = {"ministral": "llama"}
"""Families that a file does not tell from another one."""
OTHERWISE = {"ministral": {"model_type", "layer_types", "sliding_window", "max_position_embeddings"},
             "hunyuan": {"rope_parameters"}, "phi": {"rope_parameters", "max_position_embeddings"}}
"""Fields that a file says in other words: alpha as a base, a context as the window or as the first one."""
OF_NO_EFFECT = {"architectures", "transformers_version", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim"}


@pytest.mark.parametrize("family", sorted(MORE_FAMILIES))
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    directory = build(tmp_path / "model", family)
    original = Checkpoint.open(directory)
    export_gguf(original, tmp_path / "model.gguf", dense="f32")
    found = Checkpoint.open(tmp_path / "model.gguf")
    assert found.spec.family == READ_AS.get(family, original.spec.family)
    expected, weights = effective(original), effective(found)
    assert expected.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6 if original.spec.traits.offset else 0)
    torch.testing.assert_close(logits(found), logits(original), rtol=0, atol=1e-4)
    torch.testing.assert_close(losses(tmp_path / "model.gguf", tmp_path), losses(directory, tmp_path), rtol=0, atol=1e-4)
    assert found.codec.encode(TEXT) == original.codec.encode(TEXT)
    assert found.codec.ends == original.codec.ends
    assert found.spec.head_dim == original.spec.head_dim
    mine, theirs = found.spec.hf_config.to_dict(), original.spec.hf_config.to_dict()
    ignored = OF_NO_EFFECT | OTHERWISE.get(family, set())
    assert not {key: mine.get(key) for key in theirs if key not in ignored and _plain(mine.get(key)) != _plain(theirs[key])}
    again = tmp_path / "again.gguf"
    export_gguf(found, again)
    assert raw(again) == raw(tmp_path / "model.gguf")
    third = Checkpoint.open(again)
    assert third.spec.config == found.spec.config


def _plain(value: Any) -> Any:
    """A value of a config in float32, without what a scaling says by default."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if one is not None and key not in (
            "beta_fast", "beta_slow", "rope_theta" if value.get("rope_type") is None else "")}
    return float(np.float32(value)) if isinstance(value, float) else value


@pytest.mark.parametrize("family", sorted(MORE_FAMILIES))
def test_layers_are_dropped_from_blocks_that_stay(family: str, tmp_path: Path) -> None:
    wide = {} if family == "phi" else {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32}
    wide |= {"query_pre_attn_scalar": 32} if family.startswith("gemma") else {}
    wide |= {"gemma3": {"num_hidden_layers": 12}, "olmo3": {"num_hidden_layers": 8}}.get(family, {})
    directory = build(tmp_path / "model", family, **wide)
    tsotsallm.compress(directory, "rtn:q8_0", tmp_path / "small")
    small = Checkpoint.open(tmp_path / "small")
    export_gguf(small, tmp_path / "model.gguf", dense="f16")
    found = Checkpoint.open(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(found), logits(small), rtol=0, atol=2e-2)     # embeddings in f16
    export_gguf(found, tmp_path / "again.gguf")
    assert raw(tmp_path / "again.gguf") == raw(tmp_path / "model.gguf")
    gone = {"gemma3": "0-5", "olmo3": "0-3"}.get(family, "1")
    tsotsallm.compress(tmp_path / "model.gguf", f"skip:{gone}", tmp_path / "cut")
    export_gguf(Checkpoint.open(tmp_path / "cut"), tmp_path / "cut.gguf", dense="f16")
    cut, whole = raw(tmp_path / "cut.gguf"), raw(tmp_path / "model.gguf")
    first, last = (int(one) for one in (gone.split("-") * 2)[:2])
    kept = [index for index in range(found.spec.layers) if not first <= index <= last]
    assert {name.split(".")[1] for name in cut if name.startswith("blk.")} == {str(index) for index in range(len(kept))}
    for name, tensor in cut.items():
        if name.startswith("blk."):
            _, index, rest = name.split(".", 2)
            name = f"blk.{kept[int(index)]}.{rest}"
        assert tensor == whole[name], name
    again = Checkpoint.open(tmp_path / "cut.gguf")
    assert again.spec.layers == len(kept)
    torch.testing.assert_close(losses(tmp_path / "cut.gguf", tmp_path)[:7], losses(tmp_path / "cut", tmp_path)[:7],
                               rtol=0, atol=1e-3)


def like_llama_cpp(file: Path, scratch: Path) -> None:
    """The losses of a file are those of llama.cpp."""
    theirs = -torch.tensor(list(Llama(file, kv="f32", threads=1).log_likelihoods(IDS)))
    gap = 5e-3 if Checkpoint.open(file).spec.family.startswith("gemma") else 1e-4   # their activation, in 16 bits there
    torch.testing.assert_close(losses(file, scratch).double(), theirs.double(), rtol=0, atol=gap)


@pytest.mark.parametrize("family", sorted(MORE_FAMILIES))
def test_probabilities_are_those_of_llama_cpp(family: str, tmp_path: Path) -> None:
    export_gguf(Checkpoint.open(build(tmp_path / "model", family)), tmp_path / "model.gguf", dense="f32")
    like_llama_cpp(tmp_path / "model.gguf", tmp_path)


# -- what converters write otherwise ----------------------------------------------------------------------------------

WINDOW, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
Change = tuple[str, Any, Any]
"""A key without its architecture, its kind and its value; without a kind it is deleted."""


def changed(folder: Path, family: str, *changes: Change, **fields: Any) -> Path:
    """A file of a family with other entries in its header."""
    parts = Parts.of(Checkpoint.open(build(folder / "model", family, **fields)), folder)
    architecture = parts.entries["general.architecture"].value
    for name, kind, value in changes:
        if kind is None:
            parts.tensors.pop(name, None)
            parts.entries.pop(f"{architecture}.{name}", None)
        else:
            parts.set(f"{architecture}.{name}", kind, value)
    return parts.write(folder / "model.gguf")


@pytest.mark.parametrize(("family", "changes", "expected"), [
    ("olmo3", [(PATTERN, "bool", [True, False, True, False])], {
        "model_type": "olmo3", "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 9}),
    ("olmo3", [(PATTERN, "u32", 3)], {"layer_types": [
        "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}),
    ("olmo3", [("rope.scaling.yarn_attn_factor", "f32", 0.1 * math.log(8) + 1), ("rope.freq_base_swa", None, 0)], {}),
    ("olmo3", [(WINDOW, None, 0), ("rope.scaling.type", None, 0), ("rope.scaling.factor", None, 0)], {
        "model_type": "olmo2", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ("gemma3", [("rope.freq_base_swa", None, 0)], {"rope_parameters": MORE_FAMILIES["gemma3"]["rope_parameters"]}),
    ("gemma3", [(WINDOW, None, 0)], {"layer_types": ["full_attention"] * 6, "final_logit_softcapping": None}),
    ("gemma3", [("final_logit_softcapping", "f32", 2.5)], {"final_logit_softcapping": 2.5}),
    ("gemma2", [("attn_logit_softcapping", None, 0), ("final_logit_softcapping", None, 0), (WINDOW, None, 0)], {
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}),
    ("granite", [("attention.scale", None, 0), ("residual_scale", None, 0)], {
        "attention_multiplier": 0.25, "residual_multiplier": 1.0}),
    ("phi", [(WINDOW, "u32", 40)], {"max_position_embeddings": 40}),
    ("phi", [("rope_factors_long.weight", None, 0), ("rope_factors_short.weight", None, 0),
             ("rope.scaling.attn_factor", None, 0)], {"rope_parameters": {
                 "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}}),
    ("ministral3", [("attention.temperature_scale", None, 0), ("rope.scaling.yarn_beta_slow", None, 0)], {}),
    ("ministral3", [("rope.scaling.yarn_log_multiplier", None, 0)], {}),
    ("ministral3", [("rope.scaling.type", None, 0), ("rope.scaling.factor", None, 0),
                    ("attention.temperature_scale", None, 0)], {"model_type": "mistral", "head_dim": 24}),
    ("hunyuan", [("rope.scaling.type", "string", "none"), ("rope.scaling.factor", "f32", 1.0)], {}),
    ("ernie4_5", [("rope.scaling.factor", "f32", 2.0)], {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}),
    ("seed_oss", [("attention.key_length_swa", "u32", 24)], {"attention_bias": True, "attention_out_bias": False})])
def test_headers_of_other_converters_are_read_like_llama_cpp_does(family: str, changes: list[Change],
                                                                  expected: dict[str, Any], tmp_path: Path) -> None:
    file = changed(tmp_path, family, *changes)
    config = Checkpoint.open(file).spec.hf_config
    found = {key: config.model_type if key == "model_type" else getattr(config, key) for key in expected}
    assert found == expected
    like_llama_cpp(file, tmp_path)


def test_a_window_that_no_layer_has_is_noted(tmp_path: Path) -> None:
    found = Checkpoint.open(changed(tmp_path, "phi", (WINDOW, "u32", 40)))
    assert any("the context is 40 instead of the file's 256" in note for note in found.notes)


def test_windows_of_exaone_4_begin_at_64_layers(tmp_path: Path) -> None:
    """With as many layers, those without a window have no RoPE."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    original = Checkpoint.open(build(tmp_path / "model", "exaone4", num_hidden_layers=64, sliding_window=9,
                                     layer_types=None, **small))
    export_gguf(original, tmp_path / "model.gguf", dense="f32")
    found = Checkpoint.open(tmp_path / "model.gguf")
    assert found.spec.hf_config.layer_types == (["sliding_attention"] * 3 + ["full_attention"]) * 16
    assert found.spec.hf_config.sliding_window == 9
    torch.testing.assert_close(logits(found), logits(original), rtol=0, atol=1e-4)
    assert Checkpoint.open(changed(tmp_path / "less", "exaone4", (WINDOW, "u32", 9))).spec.context == 9


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("gemma2", [("rope.freq_base_swa", "f32", 7.0)], "by the base 7 and others by 10000; a gemma2 has the same"),
    ("gemma2", [("final_logit_softcapping", "f32", 0.0)], "final_logit_softcapping as 0, where a number above 0"),
    ("gemma3", [("rope.freq_base_swa", "f32", 0.0)], "freq_base_swa as 0.0, where a number above 0"),
    ("gemma3", [("rope.freq_base", None, 0), ("rope.global.freq_base", "f32", 1e6)], "as old files of Ollama do"),
    ("granite", [("attention.scale", "f32", -1.0)], "attention.scale as -1, where a number above 0"),
    ("granite", [("rope.scaling.finetuned", "bool", False)], "leaves RoPE out"),
    ("seed_oss", [("attention.causal", "bool", False)], "attends in both directions"),
    ("seed_oss", [("attention.key_length_swa", "u32", 16)], "only models whose layers are alike"),
    ("olmo3", [("rope.scaling.yarn_attn_factor", "f32", 3.0)], "yarn_attn_factor as 3, which llama.cpp does not compute"),
    ("ministral3", [("rope.scaling.yarn_beta_fast", "f32", -1.0)], "yarn_beta_fast as -1, where a number above 0"),
    ("olmo3", [(PATTERN, "bool", [True])], "where one of 0 and 1 for each of 4 layers"),
    ("olmo3", [(WINDOW, None, 0)], "by 'yarn', which is not read for the architecture olmo2; known are default"),
    ("ministral3", [("rope.scaling.type", None, 0), ("rope.scaling.factor", None, 0)], "by 'default', which is not read"),
    ("phi", [("rope_factors_short.weight", None, 0)], "rope_factors_short.weight is missing, which LongRoPE needs"),
    ("phi", [("rope.scaling.factor", "f32", 2.0)], "both linearly and by rope_factors_long"),
    ("phi", [("rope.dimension_count", "u32", 8)], "does not hold 4 numbers above 0"),
    ("phi", [("rope.dimension_count", "u32", 7)], "rotates at most these"),
    ("ernie4_5", [("rope.scaling.attn_factor", "f32", 2.0)], "multiplies its scores by ernie4_5.rope.scaling.attn_factor"),
    ("hunyuan", [("rope.scaling.type", "string", "warp")], "by 'warp', which is not read")])
def test_what_no_family_computes_is_refused(family: str, changes: list[Change], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(changed(tmp_path, family, *changes))
    assert "config.json" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_every_architecture_has_one_family_for_each_way_to_attend() -> None:
    assert sorted(name for names in ARCHITECTURES.values() for name in names) == sorted(FAMILIES)
    for family in FAMILIES.values():
        assert {module: short for short, module in family.modules.items()} == {
            module: family.gguf.name_of(module) for module in family.modules.values()}


def test_shares_of_a_head_are_short_decimals() -> None:
    for head_dim in range(2, 300, 2):
        for rotated in range(2, head_dim + 1, 2):
            assert int(head_dim * _share(rotated, head_dim)) == rotated
    assert (_share(96, 128), _share(18, 24)) == (0.75, 0.75)


# -- rules that split text --------------------------------------------------------------------------------------------

def joining(directory: Path) -> Path:
    """A checkpoint whose tokenizer has merges across words, digits, scripts and lines: the rule keeps them apart."""
    build(directory, "llama2", vocab_size=kinds.SIZE, num_hidden_layers=1)
    kinds.save(directory, "llama3")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.train_from_iterator(kinds.strings(4000, 77, []), trainers.BpeTrainer(
        vocab_size=kinds.SIZE - 8, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    content = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    added = {entry["content"]: entry["id"] for entry in content["added_tokens"]}
    trained = json.loads(tokenizer.to_str())["model"]
    words = sorted(trained["vocab"], key=lambda word: trained["vocab"][word])
    free = [place for place in range(kinds.SIZE) if place not in added.values()]
    content["model"] |= {"vocab": {**dict(zip(words, free, strict=False)), **added}, "merges": trained["merges"]}
    (directory / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return directory


@pytest.mark.parametrize("rule", ["llama-bpe", "qwen2", "seed-coder", "deepseek-v3", "hunyuan-dense", "exaone4"])
def test_rules_keep_apart_what_merges_would_join(rule: str, tmp_path: Path) -> None:
    parts = Parts.of(Checkpoint.open(joining(tmp_path / "model")), tmp_path)
    codecs = {}
    for name in ("qwen35", rule):
        parts.set("tokenizer.ggml.pre", "string", name)
        codecs[name] = Checkpoint.open(parts.write(tmp_path / f"{name}.gguf")).codec
    engine, texts = Llama(tmp_path / f"{rule}.gguf", threads=1), kinds.strings(500, 5, [])
    for text in texts:
        assert codecs[rule].encode(text) == engine.tokenize(text), repr(text)
    assert sum(codecs["qwen35"].encode(text) != codecs[rule].encode(text) for text in texts) > 5
    assert rule in (known := read_vocabulary(codecs[rule]).pre, *ALIKE.get(known, ()))
