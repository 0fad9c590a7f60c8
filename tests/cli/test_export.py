"""What export prints: the files, their sizes, and how the file compares with llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import within


def test_a_file_and_its_modelfile_are_named(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
    file = tmp_path / "model.gguf"
    lines = within("export", tiny, "--gguf", file, "--ollama", "--dense", "f16").stdout.splitlines()
    assert lines[0].startswith(f"{file} (")
    assert lines[1] == str(tmp_path / "model.Modelfile")
    assert [f"  ollama create model -f {tmp_path / 'model.Modelfile'}", "  ollama run model"] == lines[-2:]
    assert any(line.startswith("weights: ") and "f16" in line for line in lines)
    assert any("into the same tokens, ends answers at the same tokens" in line for line in lines)
    assert file.exists()


def test_a_plain_checkpoint_is_named_and_told_as_json(tiny: Path, tmp_path: Path) -> None:
    assert within("export", tiny, "--hf", tmp_path / "plain").stdout.splitlines()[0] == str(tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").exists()
    found = json.loads(within("export", tiny, "--gguf", tmp_path / "a.gguf", "--no-verify", "--json").stdout)
    assert found["bytes"] == (tmp_path / "a.gguf").stat().st_size
    assert "verified" not in found
    assert f"tsotsallm chat {tmp_path / 'b.gguf'}" in within("export", tiny, "--gguf", tmp_path / "b.gguf",
                                                             "--no-verify").stdout


@pytest.mark.parametrize(("options", "words"), [
    ([], "--gguf OUT.gguf, --hf DIRECTORY or --imatrix OUT.gguf"), (["--gguf", "a.gguf", "--hf", "b"], "choose what"),
    (["--hf", "b", "--ollama"], "belong to --gguf"), (["--gguf", "a.bin"], "does not end in .gguf")])
def test_misuse_is_one_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str],
                            words: str) -> None:
    monkeypatch.chdir(tmp_path)
    found = within("export", tiny, *options, check=False)
    assert found.exit_code == 1
    assert words in found.stderr
    assert not list(tmp_path.iterdir())
