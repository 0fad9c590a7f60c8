"""What texts cost a model in tokens, and what a vocabulary cut to them would save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import CheckpointError
from tsotsallm.files import one_line
from tsotsallm.records import Record
from tsotsallm.stages.vocabulary import Vocabulary
from tsotsallm.streaming.corpus import read_text


@dataclass(frozen=True)
class TextCost(Record):
    """How many tokens a text takes; words are what white space separates, bytes those of UTF-8."""

    source: str
    tokens: int
    words: int
    bytes: int

    @property
    def tokens_per_word(self) -> float:
        """What a word costs on average."""
        return self.tokens / max(self.words, 1)

    @property
    def bytes_per_token(self) -> float:
        """How much text a token stands for on average."""
        return self.bytes / max(self.tokens, 1)

    def plain(self) -> dict[str, object]:
        """The fields and the two ratios as JSON's plain data."""
        return super().plain() | {"tokens_per_word": self.tokens_per_word, "bytes_per_token": self.bytes_per_token}


@dataclass(frozen=True)
class TokenCosts(Record):
    """What some texts cost, and what the stage `vocabulary` would leave of a model if it kept what they need.

    vocabulary  the model's tokens
    needed      tokens that would stay; None where this kind of tokenizer cannot be cut, as `note` says
    saved       bytes of embeddings and head, as stored, that would go
    """

    texts: tuple[TextCost, ...]
    vocabulary: int
    needed: int | None = None
    saved: int | None = None
    note: str = ""


def token_costs(checkpoint: Checkpoint, sources: Sequence[str | Path]) -> TokenCosts:
    """What the texts in files or folders cost a model; raises CorpusError where one cannot be read."""
    contents = {str(source): read_text(source) for source in sources}
    codec, spec = checkpoint.codec, checkpoint.spec
    texts = tuple(TextCost(source, len(codec.encode(text, prefix=False)), len(text.split()), len(text.encode()))
                  for source, text in contents.items())
    try:
        smaller = Vocabulary(keep=list(contents)).applied(checkpoint, list(contents.values()))
    except CheckpointError as error:
        return TokenCosts(texts, spec.vocabulary, note=one_line(error))
    row = sum(record.size for name, record in checkpoint.end_records().items() if len(record.shape) == 2) // spec.vocabulary
    needed = smaller.spec.vocabulary
    return TokenCosts(texts, spec.vocabulary, needed, (spec.vocabulary - needed) * row)
