"""GGUF files through the command line and from Python: text, conversation, caches, clear errors."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tsotsallm
from tests.conftest import build
from tsotsallm.cli import app
from tsotsallm.engine import llama
from tsotsallm.engine.llama import Llama
from tsotsallm.errors import CheckpointError, ConversationError, ExportError, ResourceError, TsotsallmError


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    found = tsotsallm.to_gguf("embedded", path, dense="f32", ollama=True)
    assert found["verified"]["largest"] < 1e-3
    assert Path(found["modelfile"]).read_text().startswith("FROM ./model.gguf\n")
    return path


def test_both_engines_say_the_same(file: Path) -> None:
    prompt = "Question: Where was Ada born? Answer:"
    assert "".join(tsotsallm.generate(file, prompt, tokens=10)) == "".join(tsotsallm.generate("embedded", prompt, tokens=10))
    ours, theirs = tsotsallm.Conversation("embedded", tokens=8), tsotsallm.Conversation(file, tokens=8)
    for question in ("Where was Ada born?", "And when?"):
        assert "".join(ours.answer(question)).strip() == "".join(theirs.answer(question)).strip()
    drawn = ["".join(tsotsallm.generate(file, prompt, tokens=12, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_file_alone_cuts_the_text_as_its_checkpoint_does(file: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Ada was born in Paris.\n\nWho was born there? Ada, they say, and others.\n" * 9)
    said = CliRunner().invoke(app, ["evaluate", str(file), "--text", str(tmp_path / "text.txt"), "--context", "64",
                                    "--limit", "2", "--kv", "f32", "--json"])
    [alone] = json.loads(said.output)
    expected = tsotsallm.evaluate("embedded", tmp_path / "text.txt", context=64, limit=2)
    assert alone["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)


def test_an_engine_that_only_splits_text_ends(file: Path) -> None:
    """In a process of its own: where the loop of llama.cpp had not begun, stopping it waited for ever, now and then."""
    code = ("import sys\nfrom pathlib import Path\nfrom tsotsallm.engine.llama import Llama\n"
            "for _ in range(20):\n    assert Llama(Path(sys.argv[1]), threads=1).raw_tokens('Ada')\n")
    subprocess.run([sys.executable, "-c", code, str(file)], check=True, timeout=120)


def test_caches_are_compared(file: Path) -> None:
    from tsotsallm.api.evaluate import evaluate_gguf

    found = evaluate_gguf([file], reference="embedded", kv=("f32", "q4_0"), context=64, limit=2)
    expected = tsotsallm.evaluate("embedded", context=64, limit=2)
    assert found[0].perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert found[1].perplexity == pytest.approx(expected.perplexity, rel=0.1)
    assert found[1].bytes_per_token == found[0].bytes_per_token * 4.5 / 32


def test_the_command_line(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    said = runner.invoke(app, ["generate", str(file), "Once upon", "--tokens", "5"])
    assert said.exit_code == 0
    assert said.stdout.startswith("Once upon")
    said = runner.invoke(app, ["chat", str(file), "--tokens", "5"], input="Who was Ada?\n\n")
    assert said.exit_code == 0
    assert said.stdout.strip()
    said = runner.invoke(app, ["push", str(file), "me/model"])
    assert "nothing was sent" in said.stdout
    assert "Modelfile" in said.stdout


def test_speed_and_memory_of_a_file(file: Path) -> None:
    """By llama.cpp's own clock: what it tells is no more than what the call takes."""
    engine = Llama(file, threads=1)
    began = time.perf_counter()
    prompt_s, decode_s = engine.timed(list(range(5, 45)), 8)
    assert 0 < prompt_s + decode_s <= time.perf_counter() - began
    said = CliRunner().invoke(app, ["evaluate", str(file), "--speed", "--json"])
    [found] = json.loads(said.output).values()
    assert found["new_tokens"] == 32
    assert found["decode_tokens_per_s"] > 1
    assert found["grown_bytes"] > 0.5 * file.stat().st_size


def test_clear_errors(file: Path, stories: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:500_000])
    with pytest.raises(CheckpointError, match="damaged"):
        tsotsallm.generate(cut, "x")
    cut.write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        tsotsallm.generate(cut, "x")
    with pytest.raises(CheckpointError, match="does not exist"):
        tsotsallm.generate(tmp_path / "nowhere.gguf", "x")
    for options, message in (({"kv": "q3_k"}, "can be f32"), ({"tokens": 0}, "1 or more"), ({"top_p": 0.0}, "top-p")):
        with pytest.raises(TsotsallmError, match=message):
            tsotsallm.generate(file, "x", **options)            # type: ignore[arg-type]
    with pytest.raises(TsotsallmError, match="GGUF files"):
        tsotsallm.generate("embedded", "x", kv="q8_0")
    tsotsallm.to_gguf(stories, tmp_path / "stories.gguf", verify=False)
    (tmp_path / "other.Modelfile").touch()
    with pytest.raises(ExportError, match="Modelfile exists"):
        tsotsallm.to_gguf(stories, tmp_path / "other.gguf", ollama=True)
    assert not (tmp_path / "other.gguf").exists()
    said = CliRunner().invoke(app, ["evaluate", str(file), "--reference", "embedded", "--by-sweeps"])
    assert said.exit_code == 1
    assert "do not reach GGUF files" in said.output
    said = CliRunner().invoke(app, ["evaluate", str(file), "--speed", "--reference", "embedded"])
    assert said.exit_code == 1
    assert "by themselves" in said.output
    said = CliRunner().invoke(app, ["evaluate", "embedded", str(file), "--speed"])
    assert said.exit_code == 1
    assert "embedded is no GGUF file" in said.output
    for model in (stories, tmp_path / "stories.gguf"):
        with pytest.raises(ConversationError, match="no chat template"):
            tsotsallm.Conversation(model)


def test_a_plain_checkpoint_is_exported(tiny: Path, text: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tsotsallm.compress(tiny, "layers:0+1+1+3, gptq:q8_0", tmp_path / "out", calibration=text, windows=4, window=64)
    found = tsotsallm.to_huggingface(tmp_path / "out", tmp_path / "plain")
    assert any("dense" in note for note in found["notes"])
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)(ids).logits
        ours = tsotsallm.load(tmp_path / "out")[0](ids).logits
    assert float((theirs - ours).abs().max()) < 0.05 * float(ours.abs().max())


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows 65,536 positions: 256 bytes of cache a token in 16 bits."""
    folder = tmp_path_factory.mktemp("long")
    build(folder / "model", "smollm", max_position_embeddings=65_536)
    tsotsallm.to_gguf(folder / "model", folder / "model.gguf", verify=False, ollama=True)
    return folder / "model.gguf"


def test_a_context_is_what_fits_and_is_said(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Llama(long, slots=4)
    assert (one.context, one.known, one.cache_bytes_per_token) == (8192, 65_536, 4 * 2 * 2 * 16 * 2)
    assert [note for note in one.notes if "--context" in note] == [
        "the context is 8192 tokens for each of 4 conversations, of 65536 that the model knows (cache: 16.8 MB of memory); "
        "--context sets another number"]
    whole = Llama(long, context=65_536)
    assert whole.context == 65_536
    assert not whole.notes
    monkeypatch.setattr(llama, "free_ram_bytes", lambda: one.file.size + 4 * 4 * 2048 * 512)
    assert Llama(long, slots=4).context == 2048
    with pytest.raises(ResourceError, match=r"of 65536 tokens for each of 4 conversations takes 134 MB, but only "):
        Llama(long, slots=4, context=65_536)
    monkeypatch.setattr(llama, "free_ram_bytes", lambda: 0)
    assert Llama(long, slots=4).context == 512


def test_the_context_of_an_engine_is_chosen_where_it_runs(long: Path, file: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["generate", str(long), "ab", "--tokens", "2"])
    assert "note: the context is 8192 tokens, of 65536" in shown.stderr
    shown = runner.invoke(app, ["generate", str(long), "a" * 40, "--tokens", "2", "--context", "32"])
    assert "the context is 32; shorten it, or choose a larger --context, at most 65536" in shown.stderr
    for asked, words in ((["generate", str(file), "a"], "at most the 2048 that the model knows"),
                         (["chat", str(file)], "at most the 2048"),
                         (["serve", str(file), "--port", "0"], "at most the 2048"),
                         (["generate", "embedded", "a"], "for GGUF files")):
        shown = runner.invoke(app, [*asked, "--context", "9999"])
        assert shown.exit_code == 1
        assert words in shown.stderr
    assert "PARAMETER num_ctx 8192\n" in long.with_suffix(".Modelfile").read_text()
    tsotsallm.to_gguf("embedded", tmp_path / "small.gguf", verify=False, ollama=True, context=128)
    assert "PARAMETER num_ctx 128\n" in (tmp_path / "small.Modelfile").read_text()
    shown = runner.invoke(app, ["export", "embedded", "--gguf", str(tmp_path / "none.gguf"), "--context", "128"])
    assert "belongs to --ollama" in shown.stderr


def test_threads_follow_the_load_unless_they_are_chosen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TSOTSALLM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(llama, "idle_cores", lambda: 1)
    monkeypatch.setattr(llama, "cores", lambda: 2)
    one = Llama(file)
    assert one.threads == 1
    assert any("1 of 2 cores; --threads sets" in note for note in one.notes)
    assert "--threads" in one._options()
    assert (Llama(file, threads=2).threads, Llama(file, threads=2).notes) == (2, ())
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert Llama(file).threads == 2
