"""What texts cost in tokens, against the tokenizer itself and the vocabulary that is really cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import tsotsallm
from tests.cli.running import within
from tsotsallm.api.inspect import token_costs
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import CorpusError


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two texts, one of them with letters of several bytes."""
    names, plain = [], "Ada likes apples.\nShe is a baker in the town.\n"
    for name, content in (("plain.txt", plain), ("more.txt", "Où est né Zoé ? ọjọ́")):
        (tmp_path / name).write_text(content, "utf-8")
        names.append(tmp_path / name)
    return names


def test_counts_are_the_tokenizers(tiny: Path, texts: list[Path]) -> None:
    found = token_costs(tiny, texts)
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for one, path in zip(found.texts, texts, strict=True):
        content = path.read_text("utf-8")
        assert one.tokens == len(tokenizer.encode(content, add_special_tokens=False).ids)
        assert one.bytes == path.stat().st_size
        assert one.bytes_per_token == pytest.approx(path.stat().st_size / one.tokens)
    assert [one.words for one in found.texts] == [10, 6]
    assert found.texts[0].tokens_per_word == pytest.approx(found.texts[0].tokens / 10)


def test_what_would_be_saved_is_what_the_stage_saves(texts: list[Path], tmp_path: Path) -> None:
    found = token_costs("embedded", texts)
    tsotsallm.compress("embedded", [{"vocabulary": {"keep": [str(path) for path in texts]}}], tmp_path / "cut")
    before, after = Checkpoint.open("embedded"), Checkpoint.open(tmp_path / "cut")
    assert found.needed == after.spec.vocabulary
    assert found.saved == sum(record.size for record in before.end_records().values()) - sum(
        record.size for record in after.end_records().values())


def test_the_command_prints_a_row_for_every_text(texts: list[Path]) -> None:
    options = [word for path in texts for word in ("--text", path)]
    printed = within("inspect", "embedded", *options).stdout
    assert "tokens per word" in printed
    assert "the stage `vocabulary` would save" in printed
    plain = json.loads(within("inspect", "embedded", *options, "--json").stdout)
    assert [one["source"] for one in plain["token_costs"]["texts"]] == [str(path) for path in texts]
    assert plain["token_costs"]["texts"][0]["tokens_per_word"] > 1
    with pytest.raises(CorpusError, match=r"none\.txt"):
        token_costs("embedded", ["none.txt"])
