"""A service that really listens, in a thread of the test, and speakers that answer as a test wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from tsotsallm.engine.interface import Answer, Heard, Piece, Question, Token
from tsotsallm.serve.app import create_app, listening
from tsotsallm.serve.guard import Rules
from tsotsallm.serve.jobs import Jobs
from tsotsallm.serve.served import Models, Served


@contextmanager
def serving(models: Models, rules: Rules | None = None, *, most_tokens: int = 64,
            studio: Path | Jobs | None = None) -> Iterator[str]:
    """The address of a service with these models, and with the studio of a folder or of jobs."""
    jobs = Jobs(studio) if isinstance(studio, Path) else studio
    app = create_app(models, rules or Rules(), most_tokens=most_tokens, jobs=jobs)
    place = listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11", timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{place.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        place.close()
        assert not thread.is_alive()


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class Scripted:
    """A speaker that says `word` until it is stopped; `held` keeps it from saying anything."""

    context, converses, notes, no_chat = 4096, True, (), ""

    def __init__(self, slots: int = 1) -> None:
        self.slots, self.said, self.ended = slots, 0, 0
        self.held = threading.Event()
        self.held.set()

    def speak(self, question: Question, heard: Heard) -> Answer:
        made, finish = 0, "length"
        for _ in range(question.tokens):
            while not self.held.wait(0.01):
                if heard(Piece("")):
                    break
            made += 1
            self.said += 1
            if heard(Piece("word ", (Token("word ", b"word ", -1.0),))):
                finish = "cancelled"
                break
            time.sleep(0.002)
        self.ended += 1
        return Answer(finish, 3, made, 0.001, 0.01)

    def tokenize(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def prompt_tokens(self, ids: Sequence[int], likeliest: int, stopped: Callable[[], bool]) -> Iterator[Token]:
        for place, _ in enumerate(ids):
            yield Token("word ", b"word ", None if place == 0 else -2.0)


def with_scripted(one: Scripted, *, queue: int = 2, timeout_s: float = 20.0) -> Models:
    models = Models(queue, timeout_s)
    models.add(Served("scripted", "nowhere", "checkpoint", one, 10, 10, None, None, None, None, None))
    return models
