"""The text that models are calibrated on: sources, shares, conversations."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

import tsotsallm
from tests.conftest import build
from tsotsallm.calibration import (
    Calibration,
    Source,
    calibration_corpus,
    calibration_text,
    elsewhere,
    shared_out,
    sources_of,
    window_of,
    with_self_written,
)
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.cli import app
from tsotsallm.engine import selftext
from tsotsallm.engine.selftext import SelfText
from tsotsallm.errors import CorpusError
from tsotsallm.study.trial import Setup, TrialJob
from tsotsallm.study.workers import OnCluster

CHATS = [{"prompt": "What is a lion?", "response": "A large cat."},
         {"messages": [{"role": "user", "content": "Name two rivers."},
                       {"role": "assistant", "content": "Nile and Niger."}]}]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, CHATS * 40)))
    return path


@pytest.mark.parametrize(("given", "expected"), [
    ("novels", [("novels", 1.0)]), ("C:\\texts\\a.txt", [("C:\\texts\\a.txt", 1.0)]),
    ("novels/:0.5,chats.jsonl:0.5", [("novels/", 0.5), ("chats.jsonl", 0.5)]),
    ("C:\\a.txt:0.25, allenai/c4", [("C:\\a.txt", 0.25), ("allenai/c4", 0.75)]),
    ("a,b:0.5,c", [("a", 0.25), ("b", 0.5), ("c", 0.25)])])
def test_sources_and_their_shares(given: str, expected: list[tuple[str, float]]) -> None:
    assert sources_of(given) == [Source(*one) for one in expected]
    assert sources_of(elsewhere(given, {})) == sources_of(given)


@pytest.mark.parametrize(("given", "why"), [
    ("a:0.5,b:0.6", "add up to 1.1"), ("a:0.5,b:0.4", "add up to 0.9"), ("a:0.5,b:0.5,c", "add up to 1;"),
    ("a,,b", "an empty name")])
def test_shares_that_do_not_add_up_are_refused(given: str, why: str) -> None:
    with pytest.raises(CorpusError, match=why):
        sources_of(given)


def test_a_file_whose_name_has_a_comma_is_one_source(tmp_path: Path) -> None:
    path = tmp_path / "a,b:0.5"
    path.write_text("text")
    assert sources_of(str(path)) == [Source(str(path))]
    assert elsewhere("there/a,b:0.5", {"there/a,b:0.5": "here/a"}) == "here/a"


def test_windows_are_split_by_largest_remainder() -> None:
    assert shared_out(10, [0.5, 0.5]) == [5, 5]
    assert shared_out(7, [0.5, 0.3, 0.2]) == [4, 2, 1]
    assert shared_out(1, [0.4, 0.6]) == [0, 1]
    assert all(sum(shared_out(count, [0.21, 0.33, 0.46])) == count for count in range(1, 40))


def test_every_source_gives_its_share_of_windows_as_it_would_alone(tmp_path: Path, text: Path) -> None:
    checkpoint = Checkpoint.open(build(tmp_path / "model", "llama2"))
    other = tmp_path / "other.txt"
    other.write_text("zebra " * 2000)
    both = calibration_corpus(checkpoint, Calibration(f"{text}:0.75,{other}:0.25", 8, 32, seed=3)).windows
    alone = [*calibration_corpus(checkpoint, Calibration(str(text), 6, 32, seed=3)).windows,
             *calibration_corpus(checkpoint, Calibration(str(other), 2, 32, seed=3)).windows]
    assert all(map(torch.equal, both, alone))
    assert len(both) == 8


def test_a_source_that_would_give_no_window_is_refused(text: Path) -> None:
    with pytest.raises(CorpusError, match=r"of 2 windows source 2 in .* gets none; take more windows"):
        calibration_corpus(Checkpoint.open("embedded"), Calibration(f"{text}:0.9,{text}:0.1", 2, 32))


def test_conversations_are_calibrated_on_as_the_model_is_asked(chats: Path) -> None:
    checkpoint = Checkpoint.open("embedded")
    codec = checkpoint.codec
    found = calibration_text(checkpoint, Calibration(str(chats))).whole
    asked = [[{"role": "user", "content": "What is a lion?"}, {"role": "assistant", "content": "A large cat."}],
             CHATS[1]["messages"]]
    assert codec.encode(found, prefix=False)[:200] == [
        token for messages in asked * 40 for token in codec.conversation(messages, answer=False)][:200]  # type: ignore[arg-type]


def test_a_model_is_compressed_on_text_and_conversations(chats: Path, text: Path, tmp_path: Path) -> None:
    given = f"{text}:0.5,{chats}:0.5"
    tsotsallm.compress("embedded", "gptq:4", tmp_path / "small", calibration=given, windows=4, window=64)
    stored = json.loads((tmp_path / "small" / "tsotsallm.json").read_text())["calibration"]
    assert (stored["source"], stored["windows"]) == (given, 4)


@pytest.mark.parametrize(("content", "why"), [
    ("{\"prompt\": \"a\"}", "line 1 has the fields prompt"), ("nonsense", "line 1"), ("", "is empty")])
def test_faults_in_conversations_are_named(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(content)
    with pytest.raises(CorpusError, match=why):
        tsotsallm.plan("embedded", "gptq:4", calibration=path)


def test_a_model_without_chat_template_takes_text_only(chats: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="calibrate on text"):
        tsotsallm.compress(build(tmp_path / "model", "llama2"), "gptq:4", tmp_path / "out", calibration=chats, windows=2,
                           window=32)
    assert not list(tmp_path.glob("out*"))


# -- text that the model writes itself --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("small") / "model", "llama3", num_hidden_layers=2)


def test_a_model_is_calibrated_on_what_it_writes(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned, compressed, and stopped and resumed elsewhere: written once, with the same bytes."""
    asked = {"calibration": "self", "windows": 4, "window": 48}
    [said] = tsotsallm.plan(small, "gptq:4:32", **asked).warnings       # type: ignore[arg-type]
    assert said == ("the model first writes its own calibration text, about 240 tokens, with all of it in memory (some "
                    "minutes, once)")
    seen: list[tuple[int, str, float]] = []
    tsotsallm.compress(small, "gptq:4:32", tmp_path / "once", progress=lambda now: seen.append(
        (now.sweep, now.step, now.share)), **asked)       # type: ignore[arg-type]
    assert next(step for sweep, step, _ in seen if sweep < 0) == "the model writes its text"
    assert [sweep for sweep, *_ in seen] == sorted(sweep for sweep, *_ in seen)
    stored = json.loads((tmp_path / "once" / "tsotsallm.json").read_text())["calibration"]
    assert (stored["source"], stored["given"], stored["windows"]) == ("self", "self", 4)

    monkeypatch.setattr(selftext, "resident", lambda *_args, **_options: pytest.fail("written again"))
    assert not tsotsallm.plan(small, "gptq:4:32", **asked).warnings       # type: ignore[arg-type]

    def stop(now: object) -> None:
        if getattr(now, "layer", 0) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tsotsallm.compress(small, "gptq:4:32", tmp_path / "twice", progress=stop, **asked)       # type: ignore[arg-type]
    tsotsallm.compress(small, "gptq:4:32", tmp_path / "twice", **asked)       # type: ignore[arg-type]
    once, twice = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")}
                   for name in ("once", "twice"))
    assert once == twice != {}


def test_what_the_model_writes_has_a_share(small: Path, text: Path) -> None:
    checkpoint = Checkpoint.open(small)
    both = calibration_corpus(checkpoint, Calibration(f"self:0.25,{text}:0.75", 8, 32, seed=3)).windows
    alone = [*calibration_corpus(checkpoint, Calibration("self", 2, 32, seed=3)).windows,
             *calibration_corpus(checkpoint, Calibration(str(text), 6, 32, seed=3)).windows]
    assert all(map(torch.equal, both, alone))
    assert len(both) == 8


def test_a_file_that_is_called_self_is_read(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sources_of("self")[0].is_self
    assert not sources_of("./self")[0].is_self
    (tmp_path / "self").write_text("what is there comes first")
    assert not sources_of("self")[0].is_self
    assert calibration_text(Checkpoint.open(small), Calibration("self", 2, 32)).whole == "what is there comes first"


def test_too_little_memory_to_write_is_said_before_anything_begins(small: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftext, "free_ram_bytes", lambda: 1000)
    [said] = tsotsallm.plan(small, "gptq:4:32", calibration="self", windows=4, window=48).warnings
    assert said.startswith("the model writes its own calibration text with all of it in memory, which takes ")
    with pytest.raises(CorpusError) as refused:
        tsotsallm.compress(small, "gptq:4:32", tmp_path / "out", calibration="self", windows=4, window=48)
    assert str(refused.value) == str(CorpusError(said))
    assert not list(tmp_path.iterdir())
    assert not tsotsallm.plan(small, "rtn:4:32", calibration="self", windows=4, window=48).warnings


def test_other_computers_get_what_was_written_here(small: Path, text: Path) -> None:
    checkpoint = Checkpoint.open(small)
    asked = Calibration(f"self:0.5,{text}:0.5", 8, 32)
    [first, second] = sources_of(with_self_written(checkpoint, asked) or "")
    assert Path(first.name).read_text("utf-8") == SelfText(checkpoint, 4, 32, 0).text()
    assert (second.name, first.share, second.share) == (str(text), 0.5, 0.5)
    assert with_self_written(checkpoint, Calibration(str(text))) == str(text)


def test_a_study_sends_what_was_written_here_to_its_workers(small: Path, text: Path) -> None:
    submitted: list[Any] = []
    cluster = cast("Any", SimpleNamespace(submit=lambda _job, _work, given, bundles, _ram: submitted.append(
        (given[0].calibration, [bundle.source for bundle in bundles]))))
    setup = Setup(str(small), text=str(text), calibration="self", windows=2, window=32)
    for number in range(2):
        OnCluster(cluster).submit(setup, TrialJob(number, "key", []))
    written = SelfText(Checkpoint.open(small), 2, 32, 0).path.with_suffix(".txt")
    assert submitted == [(str(written), [str(small), str(written), str(text)])] * 2


def test_the_embedded_model_is_calibrated_on_what_it_writes(tmp_path: Path) -> None:
    codec = Checkpoint.open("embedded").codec
    found = calibration_text(Checkpoint.open("embedded"), Calibration("self", 2, 32)).whole
    assert "<|im_start|>assistant\n" in found
    tokens = len(codec.encode(found, prefix=False))
    assert 80 <= tokens < 8000
    tsotsallm.compress("embedded", "gptq:4", tmp_path / "out", calibration="self", windows=2, window=32)
    assert json.loads((tmp_path / "out" / "tsotsallm.json").read_text())["calibration"]["source"] == "self"


def test_a_window_beyond_the_context_is_refused_at_once_by_every_command_that_has_one(tiny: Path, tmp_path: Path) -> None:
    """Without one it is what the model knows, where that is less than usual."""
    missing = str(tmp_path / "no such text")
    for command in (["compress", str(tiny), "gptq:q4_0", "-o", str(tmp_path / "out")], ["plan", str(tiny), "gptq:q4_0"],
                    ["fit", str(tiny), "--bytes", "100kB", "-o", str(tmp_path / "out")],
                    ["export", str(tiny), "--imatrix", str(tmp_path / "out.gguf")]):
        found = CliRunner().invoke(app, [*command, "--window", "5000", "--calibration", missing])
        assert found.exit_code == 1
        assert "5000 tokens is longer than the 256 positions that the model knows; choose --window 256" in found.stderr
    checkpoint = Checkpoint.open(tiny)
    assert (window_of(checkpoint, None), window_of(checkpoint, None, 128), window_of(checkpoint, 200)) == (256, 128, 200)
