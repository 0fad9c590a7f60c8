"""The vocabularies that a fit can give a model: the tokens that the texts to keep need, or the most frequent of those."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property

from tsotsallm.checkpoint.gguf_layout import Entry, vocabulary_entries
from tsotsallm.checkpoint.gguf_vocabulary import read_vocabulary
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.compression import with_vocabulary
from tsotsallm.errors import CheckpointError
from tsotsallm.fit.files import Stages
from tsotsallm.recipe import Recipe

SHARES = (0.75, 0.5, 0.25)
"""Of the tokens that the texts need."""


class Vocabularies:
    """A model with each of its vocabularies, by size; None stands for all tokens."""

    def __init__(self, source: Checkpoint, keep: Sequence[str]) -> None:
        self.source, self.keep = source, keep
        self._checkpoints: dict[int | None, Checkpoint] = {None: source}
        self._entries: dict[int | None, tuple[Entry, ...]] = {}

    @cached_property
    def most(self) -> int | None:
        """The tokens that the texts to keep need; None, all, where there are no such texts."""
        return with_vocabulary(self.source, Recipe.parse(self.stage(None))).spec.vocabulary if self.keep else None

    def stage(self, size: int | None) -> Stages:
        """The stage that cuts the vocabulary to `size` tokens; none where no texts are kept."""
        return [{"vocabulary": {"keep": list(self.keep)} | ({} if size is None else {"size": size})}] if self.keep else []

    def checkpoint(self, size: int | None) -> Checkpoint:
        """The model with a vocabulary of `size` tokens."""
        if size not in self._checkpoints:
            self._checkpoints[size] = with_vocabulary(self.source, Recipe.parse(self.stage(size)))
        return self._checkpoints[size]

    def entries(self, size: int | None) -> tuple[Entry, ...]:
        """The keys of a GGUF file that describe the vocabulary; ExportError where GGUF has none like it."""
        if size not in self._entries:
            self._entries[size] = tuple(vocabulary_entries(read_vocabulary(self.checkpoint(size).codec)))
        return self._entries[size]

    def smaller(self) -> Iterator[int]:
        """Sizes below the largest that a file can hold, in falling order."""
        for share in SHARES if self.most is not None else ():
            assert self.most is not None
            size = int(self.most * share)
            try:
                cut = json.loads(self.checkpoint(size).token_files["tokenizer.json"])
            except CheckpointError:         # fewer than bytes and special tokens
                return
            if not cut["model"]["merges"]:  # which GGUF has no vocabulary for
                return
            yield size
