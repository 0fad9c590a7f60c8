"""Errors of libraries: what is the request's is 400, anything else 500 with an id that is in the log, in streams too."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2
import pytest

from tests.serve.running import Scripted, serving, with_scripted
from tests.serve.test_hostile import answer
from tsotsallm.engine.interface import Answer, Heard, Piece, Question, Token
from tsotsallm.errors import CheckpointError
from tsotsallm.serve.guard import HEADERS

SECRET = "/home/somebody/secret.py"
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 3}, "/process": {"prompt": "Hello", "max_new_tokens": 3}}


class Panic(BaseException):
    """As pyo3 raises them: no Exception."""


class Failing(Scripted):
    """Says some words, then raises."""

    def __init__(self, error: BaseException, words: int = 0) -> None:
        super().__init__()
        self.error, self.words = error, words

    def speak(self, question: Question, heard: Heard) -> Answer:
        for _ in range(self.words):
            heard(Piece("word ", (Token("word ", b"word ", -1.0),)))
        raise self.error

    def tokenize(self, text: str) -> list[int]:
        raise self.error

    def prompt_tokens(self, ids: Sequence[int], likeliest: int, stopped: Callable[[], bool]) -> Iterator[Token]:
        raise self.error
        yield


def half() -> UnicodeEncodeError:
    try:
        "\ud800".encode()
    except UnicodeEncodeError as error:
        return error
    raise AssertionError


THEIRS = [jinja2.TemplateError("roles must alternate"), jinja2.UndefinedError("no such name"),
    IndexError("index out of range"), half(),
          CheckpointError("two\nlines " + "x" * 5000)]
OURS = [KeyError(SECRET), RuntimeError(f"in {SECRET}\n\nline"), TypeError(SECRET), MemoryError(), RecursionError(SECRET),
    OSError(5, SECRET), Panic(SECRET)]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("error", THEIRS, ids=lambda one: type(one).__name__)
def test_what_is_wrong_with_a_request(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with serving(with_scripted(Failing(error))) as address:
        for path, asked in ASKED.items():
            for more in ({}, {"echo_prompt": True} if path == "/process" else {"stream": True}):
                status, told, _ = answer(address, path, asked | more)
                assert status == 400, told
                message = told["error"]["message"]
                assert told["error"]["type"] == "invalid_request_error"
                assert "\n" not in message
                assert 10 < len(message) <= 1000
        assert answer(address, "/tokenize", {"text": "x"})[0] == 400
        assert answer(address, "/health")[0] == 200
    assert not [one for one in caplog.records if one.name.startswith("tsotsallm")]


@pytest.mark.parametrize("error", OURS, ids=lambda one: type(one).__name__)
def test_what_nobody_foresaw(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    with serving(with_scripted(Failing(error))) as address:
        for path, asked in [*ASKED.items(), ("/tokenize", {"text": "x"})]:
            for more in ({}, {"echo_prompt": True} if path == "/process" else {"stream": True} if "v1" in path else {}):
                caplog.clear()
                status, told, headers = answer(address, path, asked | more)
                assert status == 500, told
                check(told, caplog)
                assert {name.decode() for name, _ in HEADERS} <= {name.lower() for name in headers}
        assert answer(address, "/health")[0] == 200
        numbers = answer(address, "/metrics")[1]
        assert 'tsotsallm_requests_total{path="/v1/completions",status="500"} 2.0' in numbers
        assert 'tsotsallm_running{model="scripted"} 0.0' in numbers


def check(told: Any, caplog: pytest.LogCaptureFixture) -> None:
    """OpenAI's form with nothing of the error; one line in the log with the same id, its traceback below it."""
    assert told["error"]["type"] == "server_error"
    assert told["error"]["code"] == "internal_error"
    assert SECRET not in json.dumps(told)
    assert "Traceback" not in json.dumps(told)
    key = re.search(r"failure ([0-9a-f]{12})", told["error"]["message"])
    assert key is not None
    records = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert len(records) == 1
    assert key.group(1) in records[0].getMessage()
    assert "\n" not in records[0].getMessage()
    assert records[0].exc_info is not None


@pytest.mark.parametrize("error", [KeyError(SECRET), Panic(SECRET), jinja2.TemplateError("late")],
    ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("path", list(ASKED)[:2])
def test_failures_in_streams(path: str, error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """A stream that has begun ends with the error as an event."""
    caplog.set_level(logging.ERROR)
    with serving(with_scripted(Failing(error, words=2))) as address:
        status, text, _ = answer(address, path, ASKED[path] | {"stream": True})
    assert status == 200
    found = events(text)
    assert "word " in text
    if isinstance(error, jinja2.TemplateError):
        assert found[-1]["error"]["type"] == "invalid_request_error"
        assert "late" in found[-1]["error"]["message"]
    else:
        check(found[-1], caplog)


@pytest.mark.parametrize("begun", [False, True])
def test_failures_outside_of_models(begun: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A route of our own that fails, before its answer begins or within a stream."""
    from tsotsallm.serve import openai

    def fail(*_given: Any) -> Any:
        raise ZeroDivisionError(SECRET)

    caplog.set_level(logging.ERROR)
    monkeypatch.setattr(openai.TextReply, "piece" if begun else "whole", fail)
    with serving(with_scripted(Scripted())) as address:
        status, told, _ = answer(address, "/v1/completions", ASKED["/v1/completions"] | {"stream": begun})
        assert status == (200 if begun else 500)
        check(events(told)[-1] if begun else told, caplog)
        assert answer(address, "/v1/completions", {"prompt": [], "max_tokens": 1})[0] == 400


@pytest.mark.parametrize("body", [
    {"messages": [{"role": "user", "content": "\ud800"}]}, {"messages": [{"role": "user", "content": [{"type": "text",
    "text": "a\udfff"}]}]},
    {"messages": [{"role": "user", "content": "x", "name": "\ud800"}]}, {"messages": [{"role": "\ud800", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x", "\ud800": 1}]},
    {"messages": [{"role": "user", "content": [{"type": "\ud800"}]}]},
    {"stop": ["\ud800"]}, {"stop": "\ud800"}, {"logit_bias": {"\ud800": 1}}, {"grammar": "\ud800"},
    {"guided_json": '{"const": "\ud800"}'},
    {"guided_json": {"\ud800": {}}}, {"json_schema": {"enum": ["\\ud800", "\ud800"]}}, {"\ud800": 1}, {"model": "\ud800"},
    {"response_format": {"type": "\ud800"}}, {"response_format": {"type": "json_schema", "json_schema": {"name": "\ud800"}}},
    {"response_format": {"type": "json_object", "\ud800": 1}}, {"stream_options": {"\ud800": True}}, {"tools": ["\ud800"]},
    {"suffix": "\ud800"}])
def test_halves_of_characters(body: dict[str, Any]) -> None:
    with serving(with_scripted(Scripted())) as address:
        status, told, _ = answer(address, "/v1/chat/completions", ASKED["/v1/chat/completions"] | body)
        assert status == 400, told
        assert told["error"]["message"]
        assert answer(address, "/v1/chat/completions",
            ASKED["/v1/chat/completions"] | {"metadata": {"\ud800": "\ud800"}})[0] == 200
