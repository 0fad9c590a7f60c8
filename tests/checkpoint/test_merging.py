"""The tokens that texts need: merges against merging by hand, and cut tokenizers against the tokenizers library."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.conftest import build
from tests.fidelity import kinds
from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.merging import OVERLAP, PART_CHARACTERS, Merges, parts_of
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import CheckpointError
from tsotsallm.lab.texts import world_text

KINDS = ["bytes", "llama3", "legacy", "first"]


@pytest.fixture(scope="module", params=KINDS)
def codec(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    path = build(tmp_path_factory.mktemp(request.param) / "model", "llama2", vocab_size=kinds.SIZE, num_hidden_layers=1)
    kinds.save(path, request.param)
    return Checkpoint.open(path).codec


def by_hand(word: str, merges: Merges) -> set[str]:
    """Every token that arises: the pair of lowest rank first, of equal ones the leftmost."""
    symbols = list(word)
    made = {symbol for symbol in symbols if symbol in merges.vocabulary}
    while pairs := [pair for pair in itertools.pairwise(symbols) if pair in merges.ranks]:
        left, right = min(pairs, key=lambda pair: merges.ranks[pair])
        place = next(i for i in range(len(symbols)) if symbols[i:i + 2] == [left, right])
        symbols[place:place + 2] = [left + right]
        made.add(left + right)
    return made


def test_the_steps_to_a_token_lead_to_it() -> None:
    merges = Merges(Checkpoint.open("embedded").codec)
    word = max((token for token in merges.vocabulary if token.isalpha()), key=len)
    assert merges.merged(word)[-1] == word
    assert len(merges.merged(word)) > len(word)


def test_all_that_merging_makes_is_needed() -> None:
    """Of words as the embedded model's own tokenizer splits them."""
    codec = Checkpoint.open("embedded").codec
    merges = Merges(codec)
    backend = codec.tokenizer.backend_tokenizer
    for text in (world_text(test=True, characters=2_000), *kinds.strings(100, 3, [])):
        text = text.replace("<|end_of_text|><|begin_of_text|>", "\n")
        words = backend.pre_tokenizer.pre_tokenize_str(text)
        assert set().union(*(by_hand(word, merges) for word, _ in words)) <= set(merges.needed([text]))


def test_merging_is_merging_by_hand(codec: TextCodec) -> None:
    merges, rng = Merges(codec), random.Random(2)
    alphabet = sorted({symbol for token in merges.merged_ids for symbol in token if symbol in merges.merged_ids})
    words = ["", "a", *merges.merged_ids, *("".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(100))]
    for word in words:
        assert set(merges.merged(word)) == by_hand(word, merges), word


def test_tokens_are_counted_as_often_as_the_tokenizer_makes_them(codec: TextCodec) -> None:
    merges = Merges(codec)
    texts = [text for text in kinds.strings(60, 4, ["</s>", "<|user|>"]) if len(text) < PART_CHARACTERS]
    counts, names = merges.needed(texts), {place: token for token, place in merges.vocabulary.items()}
    whole = Counter(names[place] for text in texts for place in codec.encode(text, prefix=False))
    for token, times in whole.items():
        assert counts[token] >= times
    longest = max((token for token in whole if token not in merges.added_ids), key=len)
    containing = [token for token in whole if longest in token]
    assert counts[longest] == sum(whole[token] for token in containing if longest in merges.merged(token))


def test_a_cut_tokenizer_cuts_kept_texts_alike_and_still_spells_any(codec: TextCodec) -> None:
    merges = Merges(codec)
    texts = kinds.strings(30, 5, [])
    kept = merges.kept(merges.needed(texts), None)
    assert kept == sorted(set(kept))
    assert len(kept) < len(merges.vocabulary)
    small, large = Tokenizer.from_str(json.dumps(merges.cut(kept))), codec.tokenizer.backend_tokenizer
    for text in texts:
        assert [kept[token] for token in small.encode(text).ids] == large.encode(text).ids, text
    for text in kinds.strings(60, 6, ["</s>", "<|user|>"]):
        assert small.decode(small.encode(text).ids, skip_special_tokens=False) == large.decode(
            large.encode(text).ids, skip_special_tokens=False)


@pytest.mark.parametrize("more", [0, 1, 40])
def test_a_size_is_kept_to_and_every_token_in_it_can_be_made(codec: TextCodec, more: int) -> None:
    merges = Merges(codec)
    size = len(merges.always_kept) + more
    kept = merges.kept(merges.needed(kinds.strings(30, 5, [])), size)
    assert len(kept) == size
    names = {place: token for token, place in merges.vocabulary.items()}
    tokens = {names[place] for place in kept}
    assert merges.always_kept <= tokens
    for token in tokens - merges.always_kept:
        # a token is made of two others, or is a symbol on its own
        assert len(token) == 1 or any(left + right == token and {left, right} <= tokens for left, right in merges.pairs)


def test_a_size_below_what_any_text_may_need_is_refused(codec: TextCodec) -> None:
    merges = Merges(codec)
    least = len(merges.always_kept)
    with pytest.raises(CheckpointError, match=f"does not hold the {least} bytes and special tokens .* more than {least}"):
        merges.kept(Counter(), least - 1)


@pytest.mark.parametrize("model", [{"type": "Unigram", "vocab": [["a", 0.0]]}, {"type": "BPE", "vocab": {"a": 0},
                                                                                "merges": []}, None])
def test_a_tokenizer_without_merges_cannot_be_cut(model: object) -> None:
    class Strange:
        where, content = "here", {"model": model}

    with pytest.raises(CheckpointError, match="here has no BPE tokenizer with merges"):
        Merges(Strange())       # type: ignore[arg-type]


def test_parts_of_a_text_are_the_text_with_some_of_what_went_before() -> None:
    rng = random.Random(1)
    pieces = ["word ", "\n", "\nword", "\n\n", "é", "1\n", "_\nA", " \n漢字", "x" * 300]
    for length in (0, 1, 500, 60_000):
        text = "".join(rng.choice(pieces) for _ in range(length // 10 + (length > 0)))
        parts = list(parts_of(text))
        assert bool(parts) == bool(text)
        start = 0
        for part in parts:
            before = min(OVERLAP, start)
            assert text.startswith(part, start - before)
            start += len(part) - before
            if start < len(text):
                assert text[start - 1] == "\n"
                assert text[start].isalpha()
        assert start == len(text)


def test_a_text_without_a_break_is_one_part(tmp_path: Path) -> None:
    text = "a" * (3 * PART_CHARACTERS) + "\n1"
    assert list(parts_of(text)) == [text]
