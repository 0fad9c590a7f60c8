"""A real LLaMA, from the GGUF file that somebody has to one that llama.cpp runs; skipped without the package index."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tsotsallm
from tests.cli.running import within
from tsotsallm.checkpoint.gguf_file import GgufFile

pytestmark = pytest.mark.slow


def raw(path: Path) -> dict[str, bytes]:
    """The data of every tensor of a file."""
    content = path.read_bytes()
    return {name: content[one.start:one.start + one.size] for name, one in GgufFile.open(path).tensors.items()}


def test_inspect_names_types_and_what_texts_cost(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
    found = json.loads(within("inspect", smollm2, "--text", tmp_path / "text.txt", "--json").stdout)
    assert found["layers"] == 30
    assert set(found["bytes_by_type"]) == {"f32", "q4_1", "q8_0"}
    assert found["token_costs"]["texts"][0]["tokens"] == 10


def test_layers_go_and_every_other_block_stays(smollm2: Path, tmp_path: Path) -> None:
    tsotsallm.compress(smollm2, "skip:10+20", tmp_path / "shorter")
    within("export", tmp_path / "shorter", "--gguf", tmp_path / "shorter.gguf", "--no-verify")
    whole, less = raw(smollm2), raw(tmp_path / "shorter.gguf")
    kept = [layer for layer in range(30) if layer not in (10, 20)]
    for name, data in less.items():
        parts = name.split(".")
        if parts[0] == "blk":
            parts[1] = str(kept[int(parts[1])])
        assert data == whole[".".join(parts)], name


def test_from_the_file_to_a_smaller_one_that_llama_cpp_computes_alike(smollm2: Path, tmp_path: Path) -> None:
    """The export compares tokens, ends of answers and log-probabilities with llama.cpp, and keeps no file that differs."""
    tsotsallm.compress(smollm2, "rtn:q4_0", tmp_path / "small")
    written = json.loads(within("export", tmp_path / "small", "--gguf", tmp_path / "small.gguf", "--json").stdout)
    assert written["verified"]["different"] == 0
    assert written["bytes"] < smollm2.stat().st_size
    assert "Paris" in within("generate", smollm2, "The capital of France is", "--tokens", 3).stdout
