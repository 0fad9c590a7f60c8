"""The same text becomes the same tokens, and ends at the same tokens, in a checkpoint, its GGUF file and its cut
vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tsotsallm
from tests.conftest import FAMILIES, build
from tests.fidelity import kinds
from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.gguf_vocabulary import letter_with, unlisted_pairs
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.interface import Piece, Question, Speaker
from tsotsallm.engine.llama import Llama
from tsotsallm.engine.transformer import HALF, Transformer
from tsotsallm.errors import CheckpointError, ExportError
from tsotsallm.stages.vocabulary import Vocabulary

KINDS = ("bytes", "legacy", "llama-new")
MORE_KINDS = ("llama3", "first", "always", "never", "llama-old")
ENDS = ["</s>", "<|system|>", "<|user|>"]


@dataclass(frozen=True)
class Made:
    """A checkpoint and the same as a GGUF file, running."""

    checkpoint: Checkpoint
    engine: Llama
    kind: str

    @property
    def codec(self) -> TextCodec:
        return self.checkpoint.codec

    @property
    def specials(self) -> list[str]:
        return [str(token) for token in self.codec.added.values()]


def make(folder: Path, family: str, kind: str) -> Made:
    """A checkpoint whose answers often end: the rows of the head of all ends are long."""
    directory = build(folder / "model", family, vocab_size=kinds.SIZE, tie_word_embeddings=False)
    kinds.save(directory, kind)
    tokenizer = Checkpoint.open(directory).tokenizer()
    ends = tokenizer.convert_tokens_to_ids(ENDS)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"bos_token_id": tokenizer.bos_token_id,
                                                                "eos_token_id": ends[:2]}))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [ends[0], ends[2]]}))
    weights = load_file(directory / "model.safetensors")
    weights["lm_head.weight"][ends] *= 4
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    tsotsallm.to_gguf(directory, folder / "model.gguf", dense="f32",
                      accept_differences=family.startswith("qwen") or kind not in ("bytes", "llama3", "legacy", "never"))
    return Made(Checkpoint.open(directory), Llama(folder / "model.gguf", kv="f32", threads=1), kind)


def said(speaker: Speaker, question: Question) -> tuple[str, str, int]:
    """Text, how it ended, and how many tokens it has."""
    heard: list[str] = []

    def take(piece: Piece) -> bool:
        heard.append(piece.text)
        return False

    ended = speaker.speak(question, take)
    return "".join(heard), ended.finish, ended.tokens


def check(made: Made, count: int, folder: Path) -> None:
    """Compare on `count` strings and a tenth as many conversations, and on what both say."""
    codec, engine = made.codec, made.engine
    texts = kinds.strings(count, 5, made.specials)
    cut_alike = [text for text in texts if made.kind not in ("always", "llama-old") or not hard_for(text, made.specials)]
    assert len(cut_alike) > count / 4
    for text in cut_alike:
        assert engine.tokenize(text) == codec.encode(text), repr(text)
    talks = kinds.conversations(count // 10, 6, made.specials)
    asked = [(talk, Question(tuple(talk), 4)) for talk in talks]
    for talk, question in asked:
        if made.kind not in ("always", "llama-old") or not any(hard_for("\n" + one["content"],
                                                                        made.specials) for one in talk):
            assert engine._ids(question) == codec.conversation(talk), talk
            assert engine.rules.composed or engine.raw_conversation(talk) == codec.conversation(talk), talk
    kept = texts[:200] + [codec.render(talk, answer=True) for talk in talks[:20]]
    smaller = Vocabulary(keep=["x"]).applied(made.checkpoint, kept)
    assert smaller.kept_tokens is not None
    assert len(smaller.kept_tokens) < codec.size
    for text in kept:
        assert [smaller.kept_tokens[token] for token in smaller.codec.encode(text)] == codec.encode(text), repr(text)
    for text in texts:
        assert smaller.codec.decode(smaller.codec.encode(text)) == codec.decode(codec.encode(text))
    assert [smaller.kept_tokens[token] for token in smaller.codec.ends] == list(codec.ends)
    for token in {*codec.added, *codec.ends}:
        assert engine.ends_at(token) == (token in codec.ends), token
    assert {codec.decode([token]) for token in codec.ends} >= set(ENDS)
    speaker = Transformer(made.checkpoint)
    questions = [Question(text, 12) for text in cut_alike[:20] if len(codec.encode(text)) < engine.context - 1]
    questions += [question for talk, question in asked[:10] if len(codec.conversation(talk)) < engine.context - 1
                  and made.kind not in ("always", "llama-old")]
    finishes = []
    for question in questions:
        ours, theirs = said(speaker, question), said(engine, question)
        assert ours[1:] == theirs[1:], question
        # bytes that make no character: the libraries differ in how many signs stand for them, at the end in whether any does
        assert ours[0] == theirs[0] or HALF in ours[0] + theirs[0] or theirs[0].startswith(ours[0]), question
        finishes.append(ours[1])
    assert "stop" in finishes


def hard_for(text: str, specials: list[str]) -> bool:
    """Texts that GGUF cannot hold for `always`: a stretch between special tokens that begins with a space."""
    for token in specials:
        text = text.replace(token, "\0")
    return any(part[:1] in (" ", "▁") for part in text.split("\0")[1:]) or text[:1] in (" ", "▁")


@pytest.fixture
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", ["bytes", "llama-new"])
def test_llama_alike(tmp_path: Path, kind: str) -> None:
    check(make(tmp_path, "llama2", kind), 150, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family in sorted(FAMILIES) for kind in KINDS if
                                              family != "qwen2" or kind == "bytes"])
def test_every_family_and_kind_alike(tmp_path: Path, family: str, kind: str) -> None:
    check(make(tmp_path, family, kind), 2000, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_every_scheme_of_leading_spaces_alike(tmp_path: Path, kind: str) -> None:
    check(make(tmp_path, "llama2", kind), 2000, tmp_path)


@pytest.mark.parametrize("kind", ["legacy", "llama-new"])
def test_a_byte_level_vocabulary_without_some_bytes_is_refused(tmp_path: Path, kind: str) -> None:
    """transformers reads whatever tokenizer files stand beside a Qwen2 by Qwen2's byte-level rule."""
    directory = build(tmp_path / "model", "qwen2", vocab_size=kinds.SIZE)
    kinds.save(directory, kind)
    codec = Checkpoint.open(directory).codec
    assert codec.encode("a\u1230b", prefix=False) == codec.encode("ab", prefix=False)
    with pytest.raises(ExportError, match="GGUF cannot express"):
        tsotsallm.to_gguf(directory, tmp_path / "model.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    written = tsotsallm.to_gguf(directory, tmp_path / "model.gguf", accept_differences=True)
    assert written["verified"]["different"] > 0
    assert any("the vocabulary lacks" in note for note in written["notes"])


def test_merges_that_sentencepiece_would_make_besides_are_probed(tmp_path: Path) -> None:
    directory = kinds.save(build(tmp_path / "model", "llama2", vocab_size=kinds.SIZE), "legacy")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    assert unlisted_pairs(content) == []
    merges = [tuple(pair) for pair in content["model"]["merges"]]
    word = max(content["model"]["vocab"], key=len)
    kept = [pair for pair in merges if "".join(pair) != word]
    path.write_text(json.dumps(content | {"model": content["model"] | {"merges": kept}}), "utf-8")
    assert sorted(unlisted_pairs(json.loads(path.read_text("utf-8")))) == sorted(pair for pair in merges if pair not in kept)
    with pytest.raises(ExportError, match="probed texts into other tokens"):
        tsotsallm.to_gguf(directory, tmp_path / "model.gguf")


def test_every_byte_has_a_letter() -> None:
    for byte in [*range(0xC0), *range(0xC2, 0xF5)]:
        assert byte in letter_with(byte).encode()


def test_a_merge_of_a_token_that_comes_late_is_unlisted() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    in_order = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
    assert unlisted_pairs({"model": {"vocab": vocabulary, "merges": in_order}}) == []
    late = [("b", "c"), ("a", "bc"), ("a", "b"), ("ab", "c")]
    assert unlisted_pairs({"model": {"vocab": vocabulary, "merges": late}}) == [("ab", "c")]
    assert unlisted_pairs({"model": {"vocab": vocabulary, "merges": in_order[:3]}}) == [("ab", "c")]


def test_unigram_is_refused_by_name(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator(kinds.training_text(), trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False))
    directory = build(tmp_path / "model", "llama2", vocab_size=kinds.SIZE)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(directory)
    with pytest.raises(ExportError, match="type Unigram"):
        tsotsallm.to_gguf(directory, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="Unigram"):
        Vocabulary(keep=["x"]).applied(Checkpoint.open(directory), ["the river"])
    assert not list(tmp_path.glob("*.gguf*"))
