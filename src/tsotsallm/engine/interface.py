"""The interface that every engine offers: questions and sampling, answers as text and tokens, and their likelihoods."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tsotsallm.errors import TsotsallmError

WAIT_S = 0.5


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, alike on every engine; temperature 0 takes the most likely.

    In this order: `logit_bias` is added to the logits of tokens; tokens among the last `repeat_last_n` of prompt and answer
    have a positive logit divided by `repetition_penalty` and any other multiplied by it, then `presence_penalty` subtracted
    once and `frequency_penalty` for each time that they occur there; temperature, top-k, top-p, min-p; a draw by `seed`.
    `grammar` is GBNF that the answer follows, in llama.cpp only. Raises TsotsallmError for values that are not possible.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    repeat_last_n: int = 64
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise TsotsallmError(f"sampling with temperature {self.temperature}, top-p {self.top_p} and top-k {self.top_k} "
                                 "is not possible; they take 0 or more, over 0 up to 1, and 0 (all) or more")
        if not 0 <= self.min_p <= 1 or self.repetition_penalty <= 0 or self.repeat_last_n < 0:
            raise TsotsallmError(f"sampling with min-p {self.min_p} and repetition penalty {self.repetition_penalty} over "
                                 f"{self.repeat_last_n} tokens is not possible; they take 0 to 1, over 0, and 0 or more")
        if self.grammar is not None and (self.grammar.startswith("%llguidance") or "\0" in self.grammar):
            raise TsotsallmError("the grammar is not GBNF: it begins with %llguidance or holds a zero byte; llama.cpp would "
                                 "ignore mistakes in it")

    @property
    def penalises(self) -> bool:
        """Whether repetition changes the logits of tokens."""
        return self.repeat_last_n > 0 and (self.presence_penalty != 0 or self.frequency_penalty != 0
                                           or self.repetition_penalty != 1)

    def require_tokens(self, vocabulary: int) -> None:
        """Raise TsotsallmError where `logit_bias` names a token that the model does not have."""
        wrong = next((token for token, _ in self.logit_bias if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise TsotsallmError(f"logit_bias names token {wrong}, which the model does not have; its tokens are 0 to "
                                 f"{vocabulary - 1}")


@dataclass(frozen=True)
class Alternative:
    """A token that was possible in some place, with its log-probability in nats."""

    text: str
    data: bytes
    logprob: float


@dataclass(frozen=True)
class Token:
    """A token of an answer or a prompt: its log-probability in nats given the text before it (None: there is none), and the
    most likely tokens in its place."""

    text: str
    data: bytes
    logprob: float | None
    likeliest: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer: text that will not change any more, and the tokens that it came with."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Question:
    """A prompt, and how to answer it.

    prompt    text, token ids, or the messages of a conversation, each with `role` and `content`
    tokens    limit of new tokens
    sampling  how tokens are chosen
    stop      texts that end the answer and are not part of it
    likeliest how many alternatives are reported with every token; None: tokens are not reported
    """

    prompt: str | Sequence[int] | Sequence[dict[str, str]]
    tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    likeliest: int | None = None

    @property
    def converses(self) -> bool:
        """Whether the prompt is a conversation."""
        return not isinstance(self.prompt, str) and bool(self.prompt) and isinstance(self.prompt[0], dict)


@dataclass(frozen=True)
class Answer:
    """How an answer ended: `stop` (by itself or at a stop text), `length` (no more tokens allowed) or `cancelled`; with the
    numbers of tokens, and the seconds for the prompt and for the answer."""

    finish: str
    prompt_tokens: int
    tokens: int
    prompt_s: float
    tokens_s: float


Heard = Callable[[Piece], bool]
"""Receives every piece of an answer; returns whether to end the answer there."""


class Speaker(Protocol):
    """A model in memory that answers up to `slots` questions at a time, each in a thread of its own.

    context    positions that the model knows
    converses  whether it has a chat template
    notes      what the user should know, a sentence each
    no_chat    why it does not converse, as it follows the model's name in a message
    """

    context: int
    converses: bool
    slots: int
    notes: tuple[str, ...]
    no_chat: str

    def speak(self, question: Question, heard: Heard) -> Answer:
        """Answer one question, piece by piece; raises TsotsallmError where it cannot be answered."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with the prefix that the tokenizer puts before it."""
        ...

    def prompt_tokens(self, ids: Sequence[int], likeliest: int, stopped: Callable[[], bool]) -> Iterator[Token]:
        """Yield a prompt's tokens with their log-probabilities, the first without; ends early once `stopped` is true."""
        ...


def require_prompt(ids: Sequence[int], context: int, known: int = 0) -> None:
    """Raise TsotsallmError where a prompt has no token, or leaves no room for an answer in the context.

    `known` is how many positions the model knows, where the context can have more.
    """
    if not ids:
        raise TsotsallmError("the prompt is empty, and this model cannot begin a text by itself; give it a beginning")
    if len(ids) >= context:
        if known > context:
            raise TsotsallmError(f"the prompt has {len(ids)} tokens, but the context is {context}; shorten it, or choose a "
                                 f"larger --context, at most {known}")
        raise TsotsallmError(f"the prompt has {len(ids)} tokens, but the model knows {context} positions; shorten it")


def never(_piece: Piece) -> bool:
    """A receiver of pieces that never ends the answer."""
    return False


def said(speaker: Speaker, question: Question) -> str:
    """The whole text of an answer."""
    heard: list[str] = []

    def take(piece: Piece) -> bool:
        heard.append(piece.text)
        return False

    speaker.speak(question, take)
    return "".join(heard)


def texts(speaker: Speaker, question: Question) -> Iterator[str]:
    """Yield the text of an answer as it arrives; errors are raised here, and closing the iterator ends the answer."""
    # not a Queue: Ctrl-C between the lines of its get() would leave its lock taken, and the speaker waiting for ever
    heard: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    gone = threading.Event()

    def take(piece: Piece) -> bool:
        if piece.text:
            heard.put(piece.text)
        return gone.is_set()

    def work() -> None:
        try:
            speaker.speak(question, take)
            heard.put(None)
        except BaseException as error:
            heard.put(error)

    # not a daemon: one that calls back from native code while the interpreter ends is cut off there, and the process aborts
    thread = threading.Thread(target=work)
    try:
        thread.start()
        while (piece := _next(heard)) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        gone.set()
        if thread.ident is not None:
            thread.join()


def _next(heard: queue.SimpleQueue[str | BaseException | None]) -> str | BaseException | None:
    """Wait for what comes next; in steps, because Ctrl-C does not end a wait without limit on Windows."""
    while True:
        with contextlib.suppress(queue.Empty):
            return heard.get(timeout=WAIT_S)
