"""GGUF files of every family as sources: the same logits, config and tokens, and the same file when exported again."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tsotsallm
from tests.checkpoint.test_gguf_source import Parts, effective, logits, raw
from tests.compressing import SMALL
from tests.conftest import MORE_FAMILIES, build
from tests.export.test_gguf import IDS
from tests.test_families import losses
from tsotsallm.checkpoint.families import ARCHITECTURES, FAMILIES
from tsotsallm.checkpoint.gguf_layout import Entry
from tsotsallm.checkpoint.gguf_rope import _share
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
WHOLE = {"exaone4": 3}


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
    assert {key: mine.get(key) for key in theirs if key not in ignored and _plain(mine.get(key)) != _plain(theirs[key])} == {}
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
    directory = build(tmp_path / "model", family, **wide)
    tsotsallm.compress(directory, "rtn:q8_0", tmp_path / "small", **SMALL)
    small = Checkpoint.open(tmp_path / "small")
    export_gguf(small, tmp_path / "model.gguf", dense="f16")
    found = Checkpoint.open(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(found), logits(small), rtol=0, atol=2e-2)     # embeddings in f16
    export_gguf(found, tmp_path / "again.gguf")
    assert raw(tmp_path / "again.gguf") == raw(tmp_path / "model.gguf")
    period = FAMILIES[found.spec.family].gguf.period
    gone = f"0-{period - 1}" if family == "gemma3" else "1"
    if family == "olmo3":                           # one group of four is all that it has
        gone, directory = "0-3", build(tmp_path / "longer", family, num_hidden_layers=8, **wide)
        tsotsallm.compress(directory, "rtn:q8_0", tmp_path / "rounded", **SMALL)
        export_gguf(Checkpoint.open(tmp_path / "rounded"), tmp_path / "model.gguf", dense="f16")
    elif family == "gemma3":
        directory = build(tmp_path / "longer", family, num_hidden_layers=12, layer_types=None, **wide)
        tsotsallm.compress(directory, "rtn:q8_0", tmp_path / "rounded", **SMALL)
        export_gguf(Checkpoint.open(tmp_path / "rounded"), tmp_path / "model.gguf", dense="f16")
    tsotsallm.compress(tmp_path / "model.gguf", f"skip:{gone}", tmp_path / "cut", **SMALL)
    export_gguf(Checkpoint.open(tmp_path / "cut"), tmp_path / "cut.gguf", dense="f16")
    cut, whole = raw(tmp_path / "cut.gguf"), raw(tmp_path / "model.gguf")
    first, last = (int(one) for one in (gone.split("-") * 2)[:2])
    kept = [index for index in range(Checkpoint.open(tmp_path / "model.gguf").spec.layers) if not first <= index <= last]
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


@pytest.mark.parametrize("family", sorted(MORE_FAMILIES))
def test_probabilities_are_those_of_llama_cpp(family: str, tmp_path: Path) -> None:
    export_gguf(Checkpoint.open(build(tmp_path / "model", family)), tmp_path / "model.gguf", dense="f32")
    found = losses(tmp_path / "model.gguf", tmp_path)
    theirs = -torch.tensor(list(Llama(tmp_path / "model.gguf", kv="f32", threads=1).log_likelihoods(IDS)))
    gap = 5e-3 if family.startswith("gemma") else 1e-4         # llama.cpp looks their activation up in 16 bits
    torch.testing.assert_close(found.double(), theirs.double(), rtol=0, atol=gap)
