"""What a GGUF file says of texts: the spaces that Metaspace would put, joined accents, prefixes and chat templates."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest
from tokenizers import normalizers, pre_tokenizers

from tests.checkpoint.damage import rewritten
from tests.conftest import build
from tests.fidelity import kinds
from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.textrules import SPACE, TextRules
from tsotsallm.export.gguf import export_gguf


def in_llama_cpp(text: str, *, space_prefix: bool) -> str:
    """A text as llama.cpp's SentencePiece splitter has it before it looks for tokens."""
    return (SPACE if space_prefix and text else "") + text.replace(" ", SPACE)


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("space_prefix", [True, False])
def test_llama_cpp_sees_what_metaspace_makes(scheme: str, space_prefix: bool) -> None:
    rng = random.Random(0)
    rules = TextRules(leading_space=scheme, space_prefix=space_prefix)
    metaspace = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    texts = ["a", " a", "  a", "a ", "a  b", f"{SPACE}a", "\na", "\ta b", "▁", "▁▁",
             *("".join(rng.choices(" a▁\n.", k=rng.randint(1, 6))) for _ in range(200))]
    for text in texts:
        if text in (" ", SPACE) and space_prefix:
            continue        # nothing that llama.cpp could be given would become one space alone
        expected = "".join(piece for piece, _ in metaspace.pre_tokenize_str(text))
        assert in_llama_cpp(rules.as_cut(text), space_prefix=space_prefix) == expected, repr(text)


def test_without_a_scheme_nothing_is_changed() -> None:
    for text in ("", " ", "a", " a", f"{SPACE}a"):
        assert TextRules(space_prefix=True).as_cut(text) == TextRules().as_cut(text) == text


def test_a_text_that_begins_with_a_special_token_gets_no_space_before_it() -> None:
    rules = TextRules(leading_space="first", special=("<|user|>", "</s>"))
    assert rules.as_cut("<|user|>a") == "<|user|>a"
    assert rules.as_cut("<|use") == " <|use"
    assert rules.as_cut("") == ""


def test_accents_are_joined_as_the_library_joins_them() -> None:
    nfc, rules = normalizers.NFC(), TextRules(composed=True)
    for text in ("e\u0301a\u0300", "ﬁ", "가", "a\u0323\u0307", "plain"):
        assert rules.normal(text) == rules.as_cut(text) == nfc.normalize_str(text)
        assert unicodedata.is_normalized("NFC", rules.normal(text))
        assert TextRules().normal(text) == text


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("file")
    path = build(folder / "model", "llama2", vocab_size=kinds.SIZE, num_hidden_layers=1, bos_token_id=None,
                 eos_token_id=None)
    kinds.save(path, "legacy")
    export_gguf(Checkpoint.open(path), folder / "model.gguf")
    return folder / "model.gguf"


def test_the_rules_of_a_file_are_those_of_its_checkpoint(file: Path) -> None:
    codec = Checkpoint.open(file.parent / "model").codec
    rules = TextRules.read(GgufFile.open(file))
    assert (rules.bos, rules.adds_bos, rules.prefix) == (codec.bos, True, codec.prefix)
    assert (rules.space_prefix, rules.composed) == (True, False)
    assert {"<s>", "</s>", "<unk>", "<|user|>"} <= set(rules.special)
    assert rules.chat is not None
    for talk in kinds.conversations(5, 1, []):
        assert rules.chat.render(talk) == codec.render(talk)


def test_what_a_file_leaves_out_has_the_defaults_of_llama_cpp(file: Path, tmp_path: Path) -> None:
    old = rewritten(file, tmp_path / "old.gguf", (
        "tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template"))
    rules = TextRules.read(GgufFile.open(old))
    assert rules.space_prefix           # SentencePiece adds a space unless it is told otherwise
    assert rules.adds_bos
    assert rules.chat is None
    without = rewritten(file, tmp_path / "without.gguf", tokenizer__ggml__add_bos_token=False)
    assert TextRules.read(GgufFile.open(without)).prefix == ()
    bare = rewritten(file, tmp_path / "bare.gguf", ("tokenizer.ggml.tokens", "tokenizer.ggml.model"))
    assert TextRules.read(GgufFile.open(bare)) == TextRules()


def test_a_prefix_of_numbers_beyond_the_tokens_is_left_out(file: Path, tmp_path: Path) -> None:
    strange = rewritten(file, tmp_path / "strange.gguf", tsotsallm__text_prefix=[1, 4_000_000, 2])
    assert TextRules.read(GgufFile.open(strange)).prefix == (1, 2)
