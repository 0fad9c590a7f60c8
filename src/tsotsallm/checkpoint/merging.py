"""The tokens of a BPE tokenizer that given texts need, and the same tokenizer with only those."""

from __future__ import annotations

import heapq
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.errors import CheckpointError

Pair = tuple[str, str]
PART_CHARACTERS, OVERLAP = 20_000, 64
_BREAK = re.compile(r"\n(?=[^\W\d_])")
"""A line break before a letter: no splitting rule has a word that crosses it, while empty lines are words of their own."""


class Merges:
    """The BPE model of a tokenizer.json: its vocabulary and its merges by rank."""

    def __init__(self, codec: TextCodec) -> None:
        self.codec, content = codec, codec.content
        model = content.get("model") or {}
        if model.get("type") != "BPE" or not model.get("merges"):
            raise CheckpointError(f"{codec.where} has no BPE tokenizer with merges (it is {model.get('type')}); its "
                                  "vocabulary cannot be reduced")
        self.content = content
        self.merged_ids: dict[str, int] = dict(model["vocab"])
        self.added_ids: dict[str, int] = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        self.vocabulary = self.merged_ids | self.added_ids      # Llama 3's special tokens are only among the added ones
        self.pairs: list[Pair] = [tuple(token.split(" ", 1)) if isinstance(token, str) else tuple(token)  # type: ignore[misc]
                                  for token in model["merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(self.pairs)}
        self.byte_level = not model.get("byte_fallback")
        self.named = {token for token in (*codec.ends, *codec.prefix, *codec.suffix, codec.bos, codec.eos, codec.padding)
                      if token is not None}

    @property
    def always_kept(self) -> set[str]:
        """Bytes, special and added tokens, those that begin or end a text, and the unknown one.

        With them every text can still be encoded.
        """
        kept = {token for token in self.vocabulary if len(token) == 6 and token.startswith("<0x") and token.endswith(">")}
        if self.byte_level:
            from tokenizers import pre_tokenizers

            kept |= set(pre_tokenizers.ByteLevel.alphabet()) & self.vocabulary.keys()
        unknown = self.content["model"].get("unk_token")
        named = {token for token, place in self.vocabulary.items() if place in self.named}
        return kept | named | ({unknown} & self.vocabulary.keys()) | self.added_ids.keys()

    def merged(self, word: str) -> list[str]:
        """Every token that arises while the characters of a word are merged: first the characters, last the result."""
        symbols: list[str | None] = list(word)
        made = [symbol for symbol in word if symbol in self.vocabulary]
        following, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
        heap = [(self.ranks[pair], place) for place in range(len(symbols) - 1)
                if (pair := (word[place], word[place + 1])) in self.ranks]
        heapq.heapify(heap)
        while heap:
            rank, place = heapq.heappop(heap)
            left, right = self.pairs[rank]
            after = following[place]
            if symbols[place] != left or after >= len(symbols) or symbols[after] != right:
                continue                    # one of the two was merged with another
            symbols[place], symbols[after] = left + right, None
            made.append(left + right)
            following[place] = following[after]
            if following[place] < len(symbols):
                before[following[place]] = place
            for first in (before[place], place):
                if first >= 0 and following[first] < len(symbols):
                    pair = (str(symbols[first]), str(symbols[following[first]]))
                    if pair in self.ranks:
                        heapq.heappush(heap, (self.ranks[pair], first))
        return made

    def needed(self, texts: Iterable[str]) -> Counter[str]:
        """How often each token occurs in texts split by the tokenizer itself, whole or as a step towards a longer one.

        The steps towards a token are parts of it, so they follow from its own characters.
        """
        times_of: Counter[int] = Counter()
        for text in texts:
            for part in parts_of(text):
                times_of.update(self.codec.encode(part, prefix=False))
        names = {place: token for token, place in self.vocabulary.items()}
        counts: Counter[str] = Counter()
        for place, times in times_of.items():
            for token in {names[place], *(() if names[place] in self.added_ids else self.merged(names[place]))}:
                counts[token] += times
        return counts

    def kept(self, needed: Counter[str], size: int | None) -> list[int]:
        """Ids of the tokens to keep, rising: all that are needed, or the `size` that are needed most.

        Spare room is filled with the earliest merges. A token is added only after the two that it is merged from, which
        occur in the texts at least as often. Raises CheckpointError where `size` is too small for the tokens that are
        always kept.
        """
        kept = self.always_kept
        order = sorted((token for token in needed if token not in kept),
                       key=lambda token: (-needed[token], len(token), self.vocabulary[token]))
        room = len(order) if size is None else size - len(kept)
        if room < 0:
            raise CheckpointError(f"a vocabulary of {size} does not hold the {len(kept)} bytes and special tokens that any "
                                  f"text may need; ask for more than {len(kept)}")
        kept |= set(order[:room])
        if size is not None:
            for left, right in self.pairs:
                if len(kept) >= size:
                    break
                if left in kept and right in kept:
                    kept.add(left + right)
        return sorted(self.vocabulary[token] for token in kept)

    def cut(self, kept: list[int]) -> dict[str, Any]:
        """The tokenizer.json with only these tokens, renumbered in their old order."""
        new = {old: place for place, old in enumerate(kept)}
        content: dict[str, Any] = json.loads(json.dumps(self.content))
        vocabulary = {token: new[old] for token, old in self.merged_ids.items() if old in new}
        content["model"]["vocab"] = vocabulary
        content["model"]["merges"] = [[left, right] for left, right in self.pairs
                                      if left in vocabulary and right in vocabulary and left + right in vocabulary]
        content["added_tokens"] = [token | {"id": new[token["id"]]} for token in content.get("added_tokens") or ()]
        _renumber(content.get("post_processor"), new)
        return content


def _renumber(node: object, new: dict[int, int]) -> None:
    """Replace the numbers of special tokens in a template by their new ones, wherever they occur."""
    if isinstance(node, dict):
        if isinstance(node.get("ids"), list):
            node["ids"] = [new[old] for old in node["ids"]]
        for key in ("sep", "cls"):
            if isinstance(node.get(key), list):
                node[key][1] = new[node[key][1]]
        for value in node.values():
            _renumber(value, new)
    elif isinstance(node, list):
        for value in node:
            _renumber(value, new)


def parts_of(text: str) -> Iterator[str]:
    """Yield a text in parts of about 20,000 characters, which end at a line break before a letter.

    Each begins with the end of the part before it, so that every stretch of the text is seen in its context.
    """
    start = 0
    while start < len(text):
        line_break = _BREAK.search(text, start + PART_CHARACTERS)
        end = len(text) if line_break is None else line_break.end()
        yield text[max(0, start - OVERLAP):end]
        start = end
