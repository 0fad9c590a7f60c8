"""A GGUF file as the source of a checkpoint: the same weights, config and tokens as what it was exported from."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import tsotsallm
from tests.compressing import SMALL
from tests.conftest import FAMILIES, build
from tests.fidelity import kinds
from tsotsallm.checkpoint.gguf_config import llama3_scaling
from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.gguf_layout import Entry, Labels, Layout, TensorInfo, model_entries, vocabulary_entries
from tsotsallm.checkpoint.gguf_records import BLOCKS, FLOATS
from tsotsallm.checkpoint.gguf_terms import rope_factors
from tsotsallm.checkpoint.gguf_vocabulary import ALIKE, read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint, layer_prefix
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD, ModelSpec
from tsotsallm.engine.llama import Llama
from tsotsallm.engine.resident import resident
from tsotsallm.errors import CheckpointError, MissingExtraError
from tsotsallm.export.gguf import export_gguf
from tsotsallm.numerics.ggml import LAYOUTS

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4,
                        "head_dim": 32}


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor of a file."""
    file = GgufFile.open(path)
    content = path.read_bytes()
    return {name: (one.type, one.shape, content[one.start:one.start + one.size]) for name, one in file.tensors.items()}


def effective(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All weights as they are computed with."""
    spec = checkpoint.spec
    found = {name: checkpoint.tensor(name) for name in (EMBEDDING, "model.norm.weight", *(() if spec.tied else (HEAD,)))}
    for index in range(spec.layers):
        found |= {f"{index}.{name}": tensor for name, tensor in checkpoint.layer(spec.layer_order[index]).items()}
    return found


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.arange(20)[None] * 7 % checkpoint.spec.vocabulary
        found: torch.Tensor = resident(checkpoint)(ids).logits
        return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dense", ["f32", "f16", "bf16"])
def test_every_family_comes_back(tmp_path: Path, family: str, dense: str) -> None:
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dense]
    original = Checkpoint.open(build(tmp_path / "model", family, dtype=dtype, sliding_window=None, use_sliding_window=False)
                               if family in ("mistral", "qwen2") else build(tmp_path / "model", family, dtype=dtype))
    export_gguf(original, tmp_path / "model.gguf", dense=dense)  # type: ignore[arg-type]
    found = Checkpoint.open(tmp_path / "model.gguf")
    same(effective(original), effective(found))
    assert torch.equal(logits(original), logits(found))
    assert found.storage == dtype
    config, expected = found.spec.hf_config.to_dict(), original.spec.hf_config.to_dict()
    differ = {key for key in config.keys() | expected.keys() if config.get(key) != expected.get(key)}
    assert differ <= {"model_type", "architectures", "sliding_window", "transformers_version", "dtype", "max_window_layers",
                      "layer_types", "bos_token_id", "eos_token_id", "use_sliding_window"}, {
                          key: (config.get(key), expected.get(key)) for key in differ}
    text = "Été 12 don't \n\n  x"
    assert found.codec.encode(text) == original.codec.encode(text)
    assert found.codec.decode(found.codec.encode(text)) == original.codec.decode(original.codec.encode(text))
    assert found.codec.ends == original.codec.ends
    export_gguf(found, tmp_path / "again.gguf")
    assert raw(tmp_path / "again.gguf") == raw(tmp_path / "model.gguf")


@pytest.mark.parametrize("grid", sorted(LAYOUTS))
def test_blocks_stay_as_they_are(tmp_path: Path, grid: str) -> None:
    family = "llama3" if grid < "q5" else "smollm3"
    directory = build(tmp_path / "model", family, **WIDE)
    tsotsallm.compress(directory, f"[{{quantize: {{grid: {grid}, method: rtn, embeddings: {grid}, lose_zeros: true}}}}]"
                       if False else f"rtn:{grid}", tmp_path / "small", **SMALL)
    small = Checkpoint.open(tmp_path / "small")
    export_gguf(small, tmp_path / "model.gguf")
    found = Checkpoint.open(tmp_path / "model.gguf")
    same(effective(small), effective(found))
    assert str(found.grid_of(f"{layer_prefix(0)}mlp.up_proj")) == str(small.grid_of(f"{layer_prefix(0)}mlp.up_proj"))
    export_gguf(found, tmp_path / "again.gguf")
    assert raw(tmp_path / "again.gguf") == raw(tmp_path / "model.gguf")
    tsotsallm.compress(tmp_path / "model.gguf", "skip:1-2", tmp_path / "cut", **SMALL)
    export_gguf(Checkpoint.open(tmp_path / "cut"), tmp_path / "cut.gguf", dense="f32")
    cut, whole = raw(tmp_path / "cut.gguf"), raw(tmp_path / "model.gguf")
    assert len({name.split(".")[1] for name in cut if name.startswith("blk.")}) == 2
    for name, tensor in cut.items():
        assert tensor == whole[name.replace("blk.1.", "blk.3.")], name
