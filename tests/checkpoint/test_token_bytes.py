"""The bytes of a vocabulary: a near bound on what the gguf library writes for it, whatever the files hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import build
from tests.fidelity import kinds
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.token_bytes import LENGTH, NUMBER, UNNAMED, is_sentencepiece, vocabulary_bytes
from tsotsallm.export.gguf import export_gguf

WRITTEN = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores", "tokenizer.ggml.merges",
           "tokenizer.chat_template")


@pytest.mark.parametrize("kind", ["bytes", "llama3", "legacy", "first"])
def test_it_is_a_near_bound_on_what_a_file_holds(tmp_path: Path, kind: str) -> None:
    path = build(tmp_path / "model", "llama2", vocab_size=kinds.SIZE + 8, num_hidden_layers=1, bos_token_id=None,
                 eos_token_id=None)
    kinds.save(path, kind)
    export_gguf(Checkpoint.open(path), tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    # of an array the reader lists lengths and contents of its elements, after the key, the types and the count
    written = sum(sum(part.nbytes for part in fields[key].parts[-2 * len(fields[key].data):])
                  for key in WRITTEN if key in fields)
    bound = vocabulary_bytes(path, kinds.SIZE + 8)
    assert written <= bound <= 1.2 * written + 4096
    content = json.loads((path / "tokenizer.json").read_text("utf-8"))
    assert is_sentencepiece(content) == (kind in ("legacy", "first"))
    assert ("tokenizer.ggml.merges" in fields) != is_sentencepiece(content)


def saved(path: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Path:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path.mkdir(exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    (path / "tokenizer_config.json").unlink()
    return path


def test_bytes_are_those_of_utf8_and_of_the_longest(tmp_path: Path) -> None:
    """By hand: three tokens of 1, 2 and 3 bytes, and a merge of "a é" (4 bytes)."""
    path = saved(tmp_path / "model", {"a": 0, "é": 1, "aé": 2}, [("a", "é")])
    each = LENGTH + NUMBER
    assert vocabulary_bytes(path, 3) == 3 * each + (1 + 2 + 3) + max(3 * NUMBER, 4 + LENGTH)
    assert vocabulary_bytes(path, 1) == each + 3 + max(NUMBER, 4 + LENGTH)          # the longest token, and its merge
    assert vocabulary_bytes(path, 5) == 5 * each + 6 + 2 * UNNAMED + max(5 * NUMBER, 4 + LENGTH)
    assert vocabulary_bytes(path, 0) == 0


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = saved(tmp_path / "model", {"a": 0, "é": 1, "aé": 2}, [("a", "é")])
    before = vocabulary_bytes(path, 3)
    saved(path, {"a": 0, "é": 1, "aé": 2, "long word": 3}, [("a", "é")])
    assert vocabulary_bytes(path, 3) == before + len("long word") - len("a")
    (path / "chat_template.jinja").write_text("x" * 100)
    assert vocabulary_bytes(path, 3) == before + len("long word") - len("a") + 100


@pytest.mark.parametrize("content", [None, "", "{", "[]", "null", "7", '{"model": null}', '{"model": {"vocab": 3}}',
                                     '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["ab"]}}',
                                     '{"model": {"vocab": {"a": 0}}, "added_tokens": [{}]}', b"\xff\xfe",
                                     '{"model": {"vocab": {"\\ud800": 0}}}'])
def test_what_cannot_be_read_is_taken_for_ordinary_words(tmp_path: Path, content: str | bytes | None) -> None:
    if isinstance(content, bytes):
        (tmp_path / "tokenizer.json").write_bytes(content)
    elif content is not None:
        (tmp_path / "tokenizer.json").write_text(content, "utf-8")
    for size in (0, 1, 1000):
        assert vocabulary_bytes(tmp_path, size) == size * (LENGTH + NUMBER + UNNAMED) + size * (UNNAMED + LENGTH)


def test_the_assumption_is_no_less_than_a_real_vocabulary(tmp_path: Path) -> None:
    embedded = Checkpoint.open("embedded")
    shutil.copy(embedded.directory / "tokenizer_config.json", tmp_path)
    size = embedded.spec.vocabulary
    assert vocabulary_bytes(tmp_path, size) >= vocabulary_bytes(embedded.directory, size) - (
        embedded.directory / "chat_template.jinja").stat().st_size
