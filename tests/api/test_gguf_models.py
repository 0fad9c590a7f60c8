"""Verbs that take a checkpoint take a GGUF file, with llama.cpp or without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tsotsallm
from tests.compressing import SMALL
from tests.conftest import build
from tests.fidelity import kinds
from tsotsallm.api.fit import fit
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.cli import app
from tsotsallm.engine import factory
from tsotsallm.engine.factory import speaker
from tsotsallm.engine.llama import Llama
from tsotsallm.engine.transformer import Transformer
from tsotsallm.errors import CheckpointError, MissingExtraError
from tsotsallm.export.gguf import export_gguf

TASK = """
kind: choices
layouts: [{prompt: "{{question}}", choices: "[a, b]", answer: gold}]
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    directory = build(folder / "model", "llama2", vocab_size=kinds.SIZE, hidden_size=256, intermediate_size=256)
    kinds.save(directory, "legacy")
    return directory


@pytest.fixture(scope="module")
def file(plain: Path) -> Path:
    path = plain.parent / "exact.gguf"
    export_gguf(Checkpoint.open(plain), path, dense="f32")
    return path


@pytest.fixture(scope="module")
def coded(plain: Path) -> Path:
    """The same in 4 bits, embeddings and head too."""
    recipe = [{"quantize": {"grid": "q4_k", "method": "rtn", "ends": "q4_k"}}]
    tsotsallm.compress(plain, recipe, plain.parent / "coded", **SMALL)
    path = plain.parent / "coded.gguf"
    export_gguf(Checkpoint.open(plain.parent / "coded"), path)
    return path


def command(*words: object) -> str:
    said = CliRunner().invoke(app, [str(word) for word in words])
    assert said.exit_code == 0, said.output
    return said.output


def test_streaming_scores_are_those_of_the_checkpoint(plain: Path, file: Path, text: Path) -> None:
    ours = tsotsallm.evaluate(file, text, context=64, limit=4, reference=plain)
    theirs = tsotsallm.evaluate(plain, text, context=64, limit=4)
    assert ours.plain()["perplexity"] == theirs.plain()["perplexity"]
    assert json.loads(command("evaluate", file, "--text", text, "--context", 64, "--limit", 4, "--stream", "--json"))[
        "perplexity"] == theirs.plain()["perplexity"]
    words = ("evaluate", file, "--text", text, "--context", 64, "--limit", 4, "--protocol", "rows", "--json")
    rows = json.loads(command(*words))
    assert rows["protocol"]["kind"] == "rows"
    both = json.loads(command("evaluate", plain, file, "--text", text, "--context", 64, "--limit", 2, "--json"))
    assert "exact.gguf" in json.dumps(both)


def test_one_text_is_scored_in_llama_cpp_where_it_is_installed(file: Path, text: Path,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
    words = ("evaluate", file, "--text", text, "--context", 64, "--limit", 1)
    assert "llama.cpp, cache in f16" in command(*words)
    assert "key-value caches" in command(*words, "--kv", "f16,q8_0")
    monkeypatch.setattr("tsotsallm.engine.llama.in_process", lambda: False)
    monkeypatch.setattr("tsotsallm.engine.llama.installed", lambda: False)
    assert "predicted tokens, float32" in command(*words)


def test_tasks_are_answered_from_a_file(file: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(TASK + "files: [items.jsonl]\n")
    items = [{"question": f"the river {number}", "a": "runs", "b": "counts", "gold": number % 2} for number in range(6)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    found = json.loads(command("evaluate", plain, file, "--task", tmp_path / "task.yaml", "--data",
                               tmp_path, "--json"))
    assert str(file) in json.dumps(found)


def test_without_llama_cpp_a_file_answers_in_transformers(file: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "".join(tsotsallm.generate(plain, "the river", tokens=8))
    monkeypatch.setattr(factory, "installed", lambda: False)
    assert isinstance(speaker(file), Transformer)
    assert "".join(tsotsallm.generate(file, "the river", tokens=8)) == expected
    assert list(tsotsallm.Conversation(file, tokens=4).answer("the river"))
    monkeypatch.setattr(factory, "free_ram_bytes", lambda: 1000)
    with pytest.raises(MissingExtraError, match=r"without llama\.cpp"):
        speaker(file)


def test_with_llama_cpp_a_file_answers_there_whatever_its_name(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is in the extra [llama]")
    blob = tmp_path / "sha256-0"
    blob.symlink_to(file)
    assert isinstance(speaker(file), Llama)
    assert isinstance(speaker(blob), Llama)


def test_plan_and_result_name_what_the_source_lost(coded: Path, tmp_path: Path) -> None:
    shown = " ".join(command("plan", coded, "skip:1").split())
    assert "quantised already: q4_k, 4.50 bits a weight" in shown
    assert "start from the 16-bit checkpoint" in shown
    result = tsotsallm.compress(coded, "skip:1", tmp_path / "out", **SMALL)
    assert "4.50 bits a weight" in str(result.notes)
    assert "quantised before (q4_k, 4.50 bits a weight)" in (tmp_path / "out" / "README.md").read_text()
    made = Checkpoint.open(tmp_path / "out").provenance
    assert made is not None
    assert made.source == "coded.gguf"
    assert made.measures.source_types == "q4_k, 4.50 bits a weight"
    assert made.ancestry is not None            # the file says that we made it, and how
    assert "quantize" in made.ancestry.recipe[0]
    assert "4.50 bits" in command("inspect", coded)


def test_a_file_in_16_bits_lost_nothing_to_speak_of(file: Path) -> None:
    assert Checkpoint.open(file).notes == ()
    assert "quantised already" not in command("plan", file, "skip:1")


@pytest.mark.parametrize("recipe", ["rtn:q4_0", "gptq:4:32", "wanda:2:4", "[{neurons: {feed_forward: 0.5, multiple: 32}}]",
                                    "[{depth: {remove: 1, protect: {first: 1, last: 1}}}]",
                                    "[{quantize: {bits: 4, group: 32, method: rtn}}, {compensate: {rank: 2}}]",
                                    "[{quantize: {grid: q4_k, ends: q6_k, method: rtn}}]"])
def test_stages_work_on_a_file(file: Path, coded: Path, text: Path, tmp_path: Path, recipe: str) -> None:
    for number, source in enumerate((file, coded)):
        if source == coded and "neurons" in recipe:      # refused after quantising, wherever that was
            continue
        tsotsallm.compress(source, recipe, tmp_path / str(number), calibration=text, **SMALL)
        assert Checkpoint.open(tmp_path / str(number)).layer(0)


def test_other_verbs_take_a_file(file: Path, text: Path, tmp_path: Path) -> None:
    model, tokenizer = tsotsallm.load(file)
    assert model.config.num_hidden_layers == 4
    assert tokenizer.decode(tokenizer("the river")["input_ids"], skip_special_tokens=True).strip() == "the river"
    tsotsallm.to_huggingface(file, tmp_path / "plain")
    assert Checkpoint.open(tmp_path / "plain").codec.encode("the river") == Checkpoint.open(file).codec.encode("the river")
    command("analyze", file, "--text", text, "--tokens", 16, "-o", tmp_path / "pictures")
    assert (tmp_path / "pictures" / "analysis.json").exists()


@pytest.mark.slow
def test_fit_starts_from_a_file(file: Path, text: Path, tmp_path: Path) -> None:
    fitted, _ = fit(file, tmp_path / "fitted", size=int(0.5 * file.stat().st_size), calibration=text, windows=4, window=32,
                    quick=True, say=lambda _line: None)
    assert fitted.gguf.stat().st_size <= 0.5 * file.stat().st_size


def test_a_folder_of_files_is_no_checkpoint(file: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(file)
    with pytest.raises(CheckpointError, match=r"give one of the files, such as .*model\.gguf"):
        Checkpoint.open(tmp_path)
