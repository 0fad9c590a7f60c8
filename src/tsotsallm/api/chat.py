"""A conversation with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack, cast

from tsotsallm.api.generate import SamplingKeywords
from tsotsallm.engine.factory import speaker
from tsotsallm.engine.interface import Question, Sampling
from tsotsallm.engine.interface import texts as texts_of
from tsotsallm.engine.llama import CacheType
from tsotsallm.errors import ConversationError
from tsotsallm.records import amended


class Conversation:
    """Questions and answers one after another, with one model."""

    def __init__(self, model: str | Path, *, tokens: int = 256, kv: str = "f16", adapter: str | Path | None = None,
                 context: int | None = None, say: Callable[[str], None] = lambda _note: None,
                 sampling: Sampling | None = None, **keywords: Unpack[SamplingKeywords]) -> None:
        """Load a model; answers have at most `tokens` new tokens, chosen by `sampling` or its fields as keywords.

        `kv`, `adapter` and `context` are for GGUF files: the type of the key-value cache, a GGUF adapter, and the tokens
        that the conversation can have.

        Raises ConversationError where the model has no chat template that it can use.
        """
        self.messages: list[dict[str, str]] = []
        self.tokens, self.sampling = tokens, amended(sampling or Sampling(), keywords, Conversation)
        self.speaker = speaker(model, kv=cast(CacheType, kv), adapter=None if adapter is None else Path(adapter),
                               context=context)
        for note in self.speaker.notes:
            say(f"note: {note}")
        if not self.speaker.converses:
            raise ConversationError(f"{model} {self.speaker.no_chat}: it completes text, but does not converse; use "
                                    "`tsotsallm generate`")

    def answer(self, question: str) -> Iterator[str]:
        """Yield the pieces of the answer; both become part of the conversation, also where the answer is stopped."""
        asked = [*self.messages, {"role": "user", "content": question}]
        heard: list[str] = []

        def keep() -> None:
            self.messages = [*asked, {"role": "assistant", "content": "".join(heard)}]

        try:
            for piece in texts_of(self.speaker, Question(tuple(asked), self.tokens, self.sampling)):
                heard.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if heard:
                keep()
            raise
        keep()
