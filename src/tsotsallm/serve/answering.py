"""From a request to an answer: which model answers, what is allowed, errors in OpenAI's form, clients that disconnect."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from fastapi import Request

from tsotsallm.engine.interface import Answer, Piece, Question, Token
from tsotsallm.errors import TsotsallmError
from tsotsallm.files import one_line
from tsotsallm.serve.metrics import Metrics
from tsotsallm.serve.served import Busy, Models, Served, TooLate
from tsotsallm.serve.wire import Timings, Usage

Result = TypeVar("Result")
LOG = logging.getLogger("tsotsallm.serve")
MOST_SHOWN = 1000
"""Most characters of an error's message."""
CHECK_S = 0.25
"""Seconds between checks whether a client is still connected."""
RETRY_S = 2
IMPOSSIBLE = -9999.0
"""Stands for the logarithm of zero, as in OpenAI's answers."""


class Refused(Exception):
    """A request that is refused, and why: an HTTP status and OpenAI's form of an error."""

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    def plain(self) -> dict[str, object]:
        """The error as OpenAI's API returns it."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Gone(Exception):
    """The client has disconnected."""


@dataclass
class Service:
    """What all routes share; an answer has at most `most_tokens` tokens."""

    models: Models
    metrics: Metrics
    most_tokens: int
    closing: bool = False

    def model(self, name: str | None) -> Served:
        """The model with a name, or the first one without; raises Refused (404) where there is none."""
        served = self.models.get(name)
        if served is None:
            known = ", ".join(self.models.by_name)
            raise Refused(404, f"no model named {name!r} is served here; there are: {known}", "model_not_found",
                          param="model")
        return served

    def tokens(self, asked: int | None, served: Served) -> int:
        """Most new tokens of an answer; one that is cut there ends with `length`."""
        most = min(self.most_tokens, served.speaker.context)
        return most if asked is None else min(asked, most)

    @property
    def deadline(self) -> float:
        """The time by which a request that arrives now must be answered, by time.monotonic()."""
        return time.monotonic() + self.models.timeout_s


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can hold; 0 for a token that nothing precedes."""
    return max(logprob or 0.0, IMPOSSIBLE)


def random_seed() -> int:
    """A random seed of 31 bits, for requests that give none."""
    return secrets.randbits(31)


@dataclass
class Heard:
    """A complete answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: Answer = field(default_factory=lambda: Answer("stop", 0, 0, 0.0, 0.0))


async def whole(pieces: AsyncGenerator[Piece | Answer, None]) -> Heard:
    """Join all pieces of an answer."""
    heard = Heard()
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if isinstance(piece, Answer):
                heard.end = piece
            else:
                heard.text += piece.text
                heard.tokens += piece.tokens
    return heard


def asked(service: Service, served: Served, question: Question, deadline: float) -> AsyncGenerator[Piece | Answer, None]:
    """The pieces of the answer to a question; errors of the engine become refusals, and tokens are counted."""
    async def counted() -> AsyncGenerator[Piece | Answer, None]:
        pieces = served.gate.answer(question, deadline)
        with refusing(service):
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if isinstance(piece, Answer):
                        service.metrics.note(served.name, piece.prompt_tokens, piece.tokens)
                        if piece.finish == "cancelled":         # only a service that is closing cancels a running answer
                            raise Refused(429, "the service is closing", "closing", headers={"Retry-After": "30"})
                    yield piece

    return counted()


@contextlib.contextmanager
def refusing(service: Service) -> Iterator[None]:
    """Raise every exception of the block as Refused (but Gone as itself)."""
    try:
        yield
    except (Refused, Gone):
        raise
    except Exception as error:
        raise refusal(error, service) from None


def refusal(error: Exception, service: Service) -> Refused:
    """The refusal for an error: a fault of the request is explained; anything else is described only in the log."""
    from jinja2 import TemplateError

    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(429, "too many requests are waiting already; try again in a moment", "queue_full",
                       headers={"Retry-After": str(RETRY_S)})
    if isinstance(error, TooLate):
        return Refused(408, f"no answer within {service.models.timeout_s:.0f} s; ask for fewer tokens, or try again when "
                       "the service is less busy", "timeout")
    if isinstance(error, TsotsallmError):
        return Refused(400, one_line(error, MOST_SHOWN), "not_possible")
    if isinstance(error, TemplateError):
        return Refused(400, f"the model's chat template refuses the conversation ({one_line(error)}); leave out or reorder "
                       "the messages that it does not accept", "not_possible", param="messages")
    if isinstance(error, IndexError | UnicodeError):
        return Refused(400, f"the model cannot read this prompt ({type(error).__name__}: {one_line(error)}); send another "
                       "one", "not_possible")
    return failure(error)


def failure(error: Exception) -> Refused:
    """The refusal for an unexpected error: its traceback goes to the log, its id to the log and to the client."""
    key = secrets.token_hex(6)
    LOG.error("failure %s: %s: %s", key, type(error).__name__, one_line(error), exc_info=error)
    return Refused(500, f"the service failed at this request; its log gives the reason under failure {key}",
                   "internal_error")


async def unless_gone(request: Request, work: Coroutine[object, object, Result]) -> Result:
    """Run `work` for a client and return its result; cancels it and raises Gone when the client disconnects."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=CHECK_S)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise Gone
    finally:
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def usage(ends: list[Answer]) -> Usage:
    """Tokens of a prompt and of all answers to it."""
    prompt, made = ends[0].prompt_tokens, sum(end.tokens for end in ends)
    return Usage(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)


def timings(served: Served, ends: list[Answer]) -> Timings:
    """Seconds for reading and answering, speed, memory and energy of all answers to one request."""
    reading, making = (sum(getattr(end, name) for end in ends) for name in ("prompt_s", "tokens_s"))
    made = sum(end.tokens for end in ends)
    return Timings(prompt_seconds=reading, seconds=making, tokens_per_s=made / making if making > 0 else None,
                   ram_bytes=served.memory_bytes, energy_wh=served.energy_wh(reading + making),
                   energy_label=served.energy_label)
