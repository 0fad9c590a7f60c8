"""A smaller vocabulary: the tokens that one's texts need, and bytes for everything else."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.checkpoint.merging import Merges, parts_of
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.spec import EMBEDDING
from tsotsallm.errors import CheckpointError
from tsotsallm.files import JsonObject, quoted
from tsotsallm.stages.contract import Model, SourceEdit
from tsotsallm.validation import Count

TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
PROBED = 2
"""Parts of a text that both tokenizers cut, to see that they agree."""
REPLACED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Vocabulary(SourceEdit):
    """Drop the tokens that the given texts do not need; the same text is cut into the same tokens, numbered anew.

    keep  files or directories of text in the languages that matter: their tokens stay, with every merge on the way to them;
          bytes, special and added tokens always stay, so that any text can still be encoded
    size  so many tokens: those needed most, or the earliest merges besides; by default all that are needed
    """

    name: ClassVar[str] = "vocabulary"
    keep: Annotated[list[str], Field(min_length=1)]
    size: Count | None = None

    @property
    def reads(self) -> list[str]:
        """The files whose tokens stay."""
        return [str(name) for name in self.keep]

    def shape(self, model: Model) -> Model:
        """The same model: it is read with fewer tokens already."""
        return replace(super().shape(model), corrected=model.corrected)     # the source is read with fewer tokens already

    def applied(self, checkpoint: Checkpoint, texts: Sequence[str]) -> Checkpoint:
        """The same model with fewer tokens: nothing is written, rows are read by their old numbers."""
        codec = checkpoint.codec
        merges = Merges(codec)
        needed = merges.needed(texts)
        kept = merges.kept(needed, self.size)
        most = checkpoint.shape_of(EMBEDDING)[0]
        if kept[-1] >= most:
            raise CheckpointError(f"{checkpoint.directory}: the tokenizer numbers a token {kept[-1]}, but the model has "
                                  f"{most}; "
                                  "tokenizer and weights do not belong together")
        files = {"tokenizer.json": json.dumps(merges.cut(kept), ensure_ascii=False).encode()}
        new = {old: place for place, old in enumerate(kept)}
        for name in REPLACED[1:]:
            try:
                found = checkpoint.source.read_json(name)
            except FileNotFoundError:
                continue
            if isinstance(found.get("added_tokens_decoder"), dict):
                found["added_tokens_decoder"] = {str(new[int(old)]): token for old, token in
                                                 found["added_tokens_decoder"].items() if int(old) in new}
            files[name] = json.dumps(renumbered(found, new), ensure_ascii=False, indent=2).encode()
        config = renumbered(checkpoint.spec.config, new) | {"vocab_size": len(kept)}
        smaller = checkpoint.restricted(kept, config, files)
        exact = {merges.vocabulary[token] for token in needed} <= set(kept)
        _require_same(codec, smaller.codec, kept, texts, exact=exact)
        return smaller


def _require_same(before: TextCodec, after: TextCodec, kept: Sequence[int], texts: Sequence[str], *, exact: bool) -> None:
    """Raise unless the smaller tokenizer cuts the retained texts, and special tokens in them, into the same tokens.

    Where tokens that the texts need were left out (not `exact`), it must at least spell the same text.
    """
    samples = [part for text in texts for part in itertools.islice(parts_of(text), PROBED)]
    for text in (*samples, *(str(token) for place, token in before.added.items() if str(token) and place < before.size)):
        wanted, found = before.encode(text), after.encode(text)
        same = [kept[token] for token in found] == wanted if exact else after.decode(found) == before.decode(wanted)
        if not same:
            raise CheckpointError(f"{before.where}: the smaller tokenizer would cut a text otherwise ({quoted(text)}); "
                                  "this kind "
                                  "of tokenizer cannot be cut")


def renumbered(config: JsonObject, new: dict[int, int]) -> JsonObject:
    """A config whose token ids are the new ones; an id that was dropped is None."""
    found = dict(config)
    for key, value in config.items():
        if not key.endswith("_token_id") and key not in TOKEN_LISTS:
            continue
        if isinstance(value, list):
            found[key] = [new[one] for one in value if type(one) is int and one in new]
        elif type(value) is int:
            found[key] = new.get(value)
    return found
