"""Texts that models write."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

from tsotsallm.api.computers import Computers
from tsotsallm.cluster.generation import continuations_on
from tsotsallm.engine.factory import continuations, speaker
from tsotsallm.engine.interface import Question, Sampling
from tsotsallm.engine.interface import texts as texts_of
from tsotsallm.engine.llama import CacheType
from tsotsallm.errors import ConversationError, CorpusError, TsotsallmError
from tsotsallm.files import DATA_BYTES, lines, read_utf8

PART = 16
"""Prompts that are continued in one job."""


def generate_many(model: str | Path, prompts: str | Path, out: str | Path, *, tokens: int = 64, temperature: float = 0.0,
                  top_p: float = 1.0, top_k: int = 0, seed: int = 0, workers: Computers | None = None,
                  say: Callable[[str], None] = print) -> int:
    """Continue every line of a file; a JSON line for each goes to `out`, in their order. The number of lines.

    What an interrupted attempt wrote is not done again.
    """
    asked = read_prompts(prompts)
    path, sampling = Path(out), Sampling(temperature, top_p, top_k, seed)
    done = _answered(path, asked)
    left = asked[done:]
    parts = [left[first:first + PART] for first in range(0, len(left), PART)]
    ready: dict[int, list[str]] = {}
    written = 0
    with contextlib.ExitStack() as stack:
        if workers is None:
            found: Iterator[tuple[int, list[str]]] = (
                (number, continuations(str(model), part, tokens, sampling)) for number, part in enumerate(parts))
        else:
            found = continuations_on(stack.enter_context(workers.cluster(say)), str(model), parts, tokens, sampling)
        for number, answers in found:
            ready[number] = answers
            while written in ready:
                with path.open("a", encoding="utf-8") as file:
                    for prompt, answer in zip(parts[written], ready.pop(written), strict=True):
                        file.write(json.dumps({"prompt": prompt, "text": answer}, ensure_ascii=False) + "\n")
                written += 1
                say(f"{done + sum(map(len, parts[:written]))} of {len(asked)} prompts")
    return len(asked)


def read_prompts(source: str | Path) -> list[str]:
    """The prompts of a text file, one a line."""
    try:
        found = lines(read_utf8(Path(source), CorpusError, DATA_BYTES))
    except FileNotFoundError:
        raise CorpusError(f"{source} does not exist; give a text file with one prompt a line") from None
    if not any(found):
        raise CorpusError(f"{source} holds no prompts; give a text file with one a line")
    return found


def _answered(path: Path, prompts: Sequence[str]) -> int:
    """How many prompts an interrupted attempt answered; a line that it was cut off in is taken away."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[:content.rfind(b"\n") + 1]
    try:
        begun = [json.loads(line)["prompt"] for line in whole.split(b"\n")[:-1]]
    except (ValueError, TypeError, KeyError):
        begun = [None]
    if begun != list(prompts[:len(begun)]) or (not whole and content and not content.startswith(b"{")):
        raise TsotsallmError(f"{path} holds something else than answers to these prompts; choose another name with -o, or "
                             "delete it first")
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return len(begun)


def generate(model: str | Path, prompt: str, *, tokens: int = 64, temperature: float = 0.0, top_p: float = 1.0,
             top_k: int = 0, seed: int = 0, kv: str = "f16", adapter: str | Path | None = None,
             say: Callable[[str], None] = lambda _note: None) -> Iterator[str]:
    """The pieces of a text's continuation as they come: GGUF files in llama.cpp, checkpoints in transformers.

    `say` is given what a user should know of how the model reads prompts.
    """
    if tokens < 1:
        raise TsotsallmError(f"{tokens} new tokens cannot be written; ask for 1 or more")
    question = Question(prompt, tokens, Sampling(temperature, top_p, top_k, seed))
    loaded = speaker(model, kv=cast(CacheType, kv), adapter=None if adapter is None else Path(adapter))
    for note in loaded.notes:
        say(f"note: {note}")
    return texts_of(loaded, question)


class Conversation:
    """Questions and answers one after another, with one model."""

    def __init__(self, model: str | Path, *, tokens: int = 256, temperature: float = 0.0, top_p: float = 1.0,
                 top_k: int = 0, seed: int = 0, kv: str = "f16", adapter: str | Path | None = None,
                 say: Callable[[str], None] = lambda _note: None) -> None:
        self.messages: list[dict[str, str]] = []
        self.tokens, self.sampling = tokens, Sampling(temperature, top_p, top_k, seed)
        self.speaker = speaker(model, kv=cast(CacheType, kv), adapter=None if adapter is None else Path(adapter))
        for note in self.speaker.notes:
            say(f"note: {note}")
        if not self.speaker.converses:
            raise ConversationError(f"{model} {self.speaker.no_chat}: it completes text, but does not converse; use "
                                    "`tsotsallm generate`")

    def answer(self, question: str) -> Iterator[str]:
        """Yield the pieces of the answer; both become part of the conversation."""
        asked = [*self.messages, {"role": "user", "content": question}]
        heard: list[str] = []
        for piece in texts_of(self.speaker, Question(tuple(asked), self.tokens, self.sampling)):
            heard.append(piece)
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(heard)}]
