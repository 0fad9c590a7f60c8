"""From a request to an answer: who is asked, what may be asked, the errors in OpenAI's form, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from tsotsallm.engine.interface import Answer, Piece, Question, Token
from tsotsallm.errors import TsotsallmError
from tsotsallm.files import one_line
from tsotsallm.serve.metrics import Metrics
from tsotsallm.serve.served import Busy, Models, Served, TooLate
from tsotsallm.serve.wire import Timings, Usage

Found = TypeVar("Found")
LOG = logging.getLogger("tsotsallm.serve")
MOST_TOLD = 1000
"""Characters of an error's message."""
LOOK_S = 0.25
"""Seconds after which it is looked whether a client is still there."""
RETRY_S = 2
IMPOSSIBLE = -9999.0
"""Stands for the logarithm of zero, as in OpenAI's answers."""


class Refused(Exception):
    """A request that is not answered, and why: an HTTP status and OpenAI's form of an error."""

    def __init__(self, status: int, message: str, code: str, *, param: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}

    def plain(self) -> dict[str, Any]:
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Gone(Exception):
    """The client does not listen any more."""


@dataclass
class Service:
    """What all routes share; `most_tokens` is what an answer may have."""

    models: Models
    metrics: Metrics
    most_tokens: int
    closing: bool = False

    def model(self, name: str | None) -> Served:
        found = self.models.get(name)
        if found is None:
            known = ", ".join(self.models.by_name)
            raise Refused(404, f"no model named {name!r} is served here; there are: {known}", "model_not_found",
                          param="model")
        return found

    def tokens(self, asked: int | None, one: Served) -> int:
        """New tokens of an answer at most; one that is cut there ends with `length`."""
        most = min(self.most_tokens, one.speaker.context)
        return most if asked is None else min(asked, most)

    @property
    def deadline(self) -> float:
        return time.monotonic() + self.models.timeout_s


def finite(logprob: float | None) -> float:
    """A log-probability that JSON can hold; 0 for a token that nothing precedes."""
    return max(logprob or 0.0, IMPOSSIBLE)


def random_seed() -> int:
    return secrets.randbits(31)


@dataclass
class Heard:
    """An answer as a whole."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: Answer = field(default_factory=lambda: Answer("stop", 0, 0, 0.0, 0.0))


async def whole(pieces: AsyncGenerator[Piece | Answer, None]) -> Heard:
    """All pieces of an answer together."""
    found = Heard()
    async with contextlib.aclosing(pieces):
        async for one in pieces:
            if isinstance(one, Answer):
                found.end = one
            else:
                found.text += one.text
                found.tokens += one.tokens
    return found


def asked(service: Service, one: Served, question: Question, deadline: float) -> AsyncGenerator[Piece | Answer, None]:
    """The answer to a question; errors of the engine are the request's, and tokens are counted."""
    async def counted() -> AsyncGenerator[Piece | Answer, None]:
        pieces = one.gate.answer(question, deadline)
        with refusing(service):
            async with contextlib.aclosing(pieces):
                async for piece in pieces:
                    if isinstance(piece, Answer):
                        service.metrics.note(one.name, piece.prompt_tokens, piece.tokens)
                        if piece.finish == "cancelled":         # only a service that ends cancels what it is still asked for
                            raise Refused(429, "the service is closing", "closing", headers={"Retry-After": "30"})
                    yield piece

    return counted()


@contextlib.contextmanager
def refusing(service: Service) -> Iterator[None]:
    """Raise what goes wrong inside as a refusal."""
    try:
        yield
    except (Refused, Gone):
        raise
    except Exception as error:
        raise refusal(error, service) from None


def refusal(error: Exception, service: Service) -> Refused:
    """What a client is told of an error: what is the request's fault is explained, anything else is in the log alone."""
    from jinja2 import TemplateError

    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(429, "too many questions wait already; try again in a moment", "queue_full",
                       headers={"Retry-After": str(RETRY_S)})
    if isinstance(error, TooLate):
        return Refused(408, f"no answer within {service.models.timeout_s:.0f} s; ask for fewer tokens, or try again when "
                       "there is less to do", "timeout")
    if isinstance(error, TsotsallmError):
        return Refused(400, one_line(error, MOST_TOLD), "not_possible")
    if isinstance(error, TemplateError):
        return Refused(400, f"the model's chat template refuses the conversation ({one_line(error)}); leave out or reorder "
                       "what it does not know", "not_possible", param="messages")
    if isinstance(error, IndexError | UnicodeError):
        return Refused(400, f"the model cannot read this prompt ({type(error).__name__}: {one_line(error)}); send another",
                       "not_possible")
    return failure(error)


def failure(error: Exception) -> Refused:
    """An error that nobody foresaw: its traceback goes to the log, its id to both."""
    key = secrets.token_hex(6)
    LOG.error("failure %s: %s: %s", key, type(error).__name__, one_line(error), exc_info=error)
    return Refused(500, f"the service failed at this request; its log has the reason, under failure {key}", "internal_error")


async def unless_gone(request: Request, work: Coroutine[Any, Any, Found]) -> Found:
    """Do something for a client, and end it when the client goes away."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=LOOK_S)
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
    prompt, made = ends[0].prompt_tokens, sum(end.tokens for end in ends)
    return Usage(prompt_tokens=prompt, completion_tokens=made, total_tokens=prompt + made)


def timings(one: Served, ends: list[Answer]) -> Timings:
    reading, making = (sum(getattr(end, name) for end in ends) for name in ("prompt_s", "tokens_s"))
    made = sum(end.tokens for end in ends)
    return Timings(prompt_seconds=reading, seconds=making, tokens_per_s=made / making if making > 0 else None,
                   ram_bytes=one.memory_bytes, energy_wh=one.energy_wh(reading + making), energy_label=one.energy_label)
