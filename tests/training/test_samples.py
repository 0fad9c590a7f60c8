"""Training data: chat templates and what is learned of them, packed text, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import byte_tokenizer
from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import CorpusError
from tsotsallm.training.samples import instruction_windows, read_conversations, read_samples, split, text_windows


def lines(path: Path, *rows: Any) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def embedded() -> Checkpoint:
    return Checkpoint.open("embedded")


def test_only_what_the_assistant_says_is_learned(embedded: Checkpoint, tmp_path: Path) -> None:
    source = lines(tmp_path / "chat.jsonl", {"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is it?"},
        {"role": "assistant", "content": "Nobody."}, {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "A friend."}]})
    tokenizer = embedded.tokenizer()
    corpus = instruction_windows(read_conversations(source), embedded.codec, 2048, "chat")
    [ids], [learned] = corpus.windows, corpus.learned or ()
    assert tokenizer.decode(ids) == ("<|begin_of_text|><|im_start|>system\nBe brief.<|im_end|>\n"
                                     "<|im_start|>user\nWho is it?<|im_end|>\n"
                                     "<|im_start|>assistant\nNobody.<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
                                     "<|im_start|>assistant\nA friend.<|im_end|>\n")
    assert tokenizer.decode(ids[learned]) == "Nobody.<|im_end|>\nA friend.<|im_end|>\n"


def test_a_tokenizer_without_a_template_gets_the_plain_form(tmp_path: Path) -> None:
    source = lines(tmp_path / "plain.jsonl", {"instruction": "Name it", "context": "A dog.", "response": "Dog"})
    tokenizer = byte_tokenizer()
    corpus = instruction_windows(read_conversations(source), TextCodec(tokenizer, 260, "bytes"), 256, "plain")
    [ids], [learned] = corpus.windows, corpus.learned or ()
    assert tokenizer.decode(ids[1:-1]) == "A dog.\n\nName it\nDog"
    assert tokenizer.decode(ids[learned][:-1]) == "Dog"
    assert ids[-1] == tokenizer.eos_token_id


def test_every_known_shape_of_a_row_is_read(tmp_path: Path) -> None:
    source = lines(tmp_path / "rows.jsonl", {"prompt": "p", "response": "r"}, "", {"question": "p", "answer": "r"},
                   {"instruction": "p", "input": "", "output": "r"}, {"conversations": ["p", "r"]})
    found = read_conversations(source)
    assert [number for number, _ in found] == [1, 3, 4, 5]
    same = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]
    assert all(messages == same for _, messages in found)
    (tmp_path / "rows.json").write_text("\ufeff" + json.dumps([{"prompt": "p", "response": "r"}]), "utf-8")
    assert len(read_conversations(str(tmp_path / "rows.json"))) == 1


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x7f", "\ufeff"])
def test_lines_end_at_line_feeds_alone(tmp_path: Path, mark: str) -> None:
    row = json.dumps({"prompt": f"a{mark}b", "response": f"{mark}c"}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_bytes(f"\ufeff{row}\r\n\r\n{row}".encode())
    found = read_conversations(str(tmp_path / "rows.jsonl"))
    assert [number for number, _ in found] == [1, 3]
    assert [message["content"] for message in found[1][1]] == [f"a{mark}b", f"{mark}c"]


@pytest.mark.parametrize("mark", ["\\u000b", "\\u000c", "\\u001c", "\\n", "\\r"])
def test_escaped_line_ends_stay_in_their_text(tmp_path: Path, mark: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "a{mark}b", "response": "c"}}\r\n' * 2, "utf-8")
    assert [messages[0]["content"] for _, messages in read_conversations(str(tmp_path / "rows.jsonl"))] == [
        json.loads(f'"a{mark}b"')] * 2


@pytest.mark.parametrize("content", [b'{"prompt": "a", "response": "\\ud800"}', b'{"prompt": "a", "response": "\xff"}',
                                     b'{"prompt": "a", "response": "\xed\xa0\x80"}'])
def test_half_a_surrogate_pair_and_other_bytes_are_refused_with_their_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"prompt": "a", "response": "b"}\n' + content)
    with pytest.raises(CorpusError, match=r"line 2,? (is not UTF-8|holds half of a surrogate pair)") as error:
        read_conversations(str(tmp_path / "rows.jsonl"))
    assert "\n" not in str(error.value)


def test_packed_text_holds_all_of_it_and_splits_by_the_seed(text: Path) -> None:
    tokenizer = byte_tokenizer(bos=False)
    corpus = text_windows(text.read_text(), TextCodec(tokenizer, 260, "bytes"), 100, "words")
    assert "".join(tokenizer.decode(window) for window in corpus.windows) == text.read_text()
    one, same, other = (split(corpus, 0.05, seed) for seed in (1, 1, 2))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    assert len(one.training.windows) + len(one.held_out.windows) == len(corpus.windows)
    assert 1 <= len(one.held_out.windows) <= 32


@pytest.mark.parametrize(("rows", "message"), [
    ([], "is empty"),
    ([{"promt": "p", "response": "r"}], r"line 1 has the fields promt, response; it takes one of prompt"),
    ([{"prompt": "p", "response": "r"}, "{broken"], "line 2, is not valid JSON"),
    ([{"prompt": "p", "response": " "}], "line 1: response is empty"),
    ([{"prompt": 3, "response": "r"}], "line 1: prompt is 3; it takes text"),
    ([["p", "r"]], "line 1 holds list"),
    ([{"messages": [{"role": "user", "content": "p"}]}], "no message of the assistant"),
    ([{"messages": [{"from": "user", "content": "p"}]}], "a message is"),
    ([{"prompt": "p", "response": "r"}, {"prompt": "long " * 3000, "response": "r"}], "line 2 has 6013 tokens, more than"),
    ([{"prompt": "p", "response": "r"}], "gives 1 sample; training needs at least two"),
])
def test_what_cannot_be_learned_is_refused_with_its_line(embedded: Checkpoint, tmp_path: Path, rows: list[Any],
                                                         message: str) -> None:
    source = lines(tmp_path / "data.jsonl", *rows)
    with pytest.raises(CorpusError, match=message):
        read_samples(source, embedded.codec, embedded.spec, 512, 0.05, 0)


def test_a_missing_file_and_other_bytes_are_refused(embedded: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes("{\"prompt\": \"caf\xe9\"}".encode("latin-1"))
    for source, message in ((tmp_path / "none.jsonl", "does not exist"), (tmp_path / "latin.jsonl", "not UTF-8")):
        with pytest.raises(CorpusError, match=message):
            read_samples(str(source), embedded.codec, embedded.spec, 512, 0.05, 0)
