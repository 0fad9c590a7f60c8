"""The text that models are calibrated on: sources, shares, conversations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

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
)
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import CorpusError

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
    with pytest.raises(CorpusError, match=r"of 2 windows source 2 in .* gets none; take more --windows"):
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
