"""What nobody should send: too large, malformed, misaddressed, without a key, too much at a time; it stays alive."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.serve.running import Scripted, serving, until, with_scripted
from tsotsallm.api.serve import serve
from tsotsallm.errors import ServeError, TsotsallmError
from tsotsallm.serve.guard import Rules, is_local

KEY = "a-key-of-tests"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def one() -> Scripted:
    return Scripted()


@pytest.fixture
def address(one: Scripted) -> Iterator[str]:
    with serving(with_scripted(one), Rules(key=KEY, body_bytes=200_000)) as found:
        yield found
        assert answer(found, "/health")[0] == 200           # alive after all


def answer(address: str, path: str, body: bytes | dict[str, Any] | None = None, *, method: str | None = None,
           **headers: str) -> tuple[int, Any, dict[str, str]]:
    content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    given = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"} | {
        name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(address + path, content, given, method=method)
    try:
        with urllib.request.urlopen(request, timeout=30) as found:
            status, text, told = found.status, found.read(), dict(found.headers)
    except urllib.error.HTTPError as error:
        status, told = error.code, dict(error.headers)
        try:
            text = error.read()
        except ConnectionResetError:            # a service that read no further resets the connection behind its answer
            text = b""
    return status, json.loads(text) if text[:1] == b"{" else text.decode(errors="replace"), told


def test_keys(address: str) -> None:
    for key in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xe9"):
        status, told, headers = answer(address, "/v1/models", Authorization=key)
        assert (status, told["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
    for path in ("/metrics", "/openapi.jsonx", "/v1/models/x", "/models/x/report", "/process"):
        assert answer(address, path, Authorization="")[0] == 401
    assert answer(address, "/health", Authorization="")[0] == 200
    status, state, _ = answer(address, "/page/state", Authorization="")
    assert (status, state["models"], state["key_ok"], state["studio"]) == (200, [], False, False)
    assert len(answer(address, "/page/state")[1]["models"]) == 1


def test_large_bodies(address: str) -> None:
    """A hundred megabytes are refused by their length alone, or once more has come than is allowed."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=20)
    connection.putrequest("POST", "/v1/completions")
    for name, value in (("Authorization", f"Bearer {KEY}"), ("Content-Type", "application/json"),
                        ("Content-Length", "100000000")):
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    with socket.create_connection((where.hostname, where.port), timeout=20) as plain:
        plain.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
                      "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        try:
            for _ in range(1000):
                plain.sendall(b"186A0\r\n" + b" " * 100_000 + b"\r\n")
                sent += 100_000
        except OSError:
            pass
        assert sent < 50_000_000
        plain.settimeout(20)
        try:
            told = plain.recv(100)
        except ConnectionResetError:
            told = b""
        assert told[9:12] in (b"413", b"")
    assert answer(address, "/v1/completions", {"prompt": "x" * 300_000})[0] == 413
    assert answer(address, "/v1/completions", b"{}", Content_Length="many")[0] in (400, 413)


@pytest.mark.parametrize("body", [
    b"\xff\xfe{", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"prompt": ' + b'["x",' * 20_000, b"", b"null", b"[]", b'"x"',
    b"{",
    b'{"prompt": "\\ud800"}', b'{"prompt": 5}', b'{"prompt": []}', b'{"prompt": [-1]}', b'{"prompt": [1e99]}',
    b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": 1e400}', b'{"prompt": "x", "top_p": 0}',
    b'{"prompt": "x", "max_tokens": 1e400}', b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": "x", "seed": 1.5}',
    b'{"prompt": "x", "logit_bias": {"1": NaN}}', b'{"prompt": "x", "min_p": Infinity}',
    b'{"prompt": "x", "guided_json": {"a": NaN}}',
    b'{"prompt": "x", "json_schema": ' + b'{"items":' * 300 + b"{}" + b"}" * 300 + b"}",
    b'{"prompt": "x", "metadata": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    b'{"prompt": "x", "n": 1000}',
    b'{"prompt": "x", "stop": ""}', b'{"prompt": "x", "stop": 7}', b'{"prompt": "x", "logprobs": -1}',
    b'{"prompt": "x", "max_tokens": "5"}', b'{"prompt": "x", "stream": "yes"}',
    b'{"prompt": "x", "model": null, "echo": true}'])
def test_malformed_bodies(address: str, body: bytes) -> None:
    status, told, _ = answer(address, "/v1/completions", body)
    assert status == 400, told
    assert told["error"]["message"]
    assert "Traceback" not in told["error"]["message"]


def test_ten_thousand_messages(address: str) -> None:
    status, told, _ = answer(address, "/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 5000})
    assert status == 400
    assert "1024" in told["error"]["message"]
    assert answer(address, "/v1/chat/completions", {"messages": MESSAGES * 10_000})[0] == 413


@pytest.mark.parametrize("path", [
    "/page/../../../etc/passwd", "/page/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/page/..%5c..%5cwin.ini",
    "/models/..%2f..%2fetc/report", "/models/%2Fetc%2Fpasswd/report", "/v1/models/..%2F..%2Fetc%2Fpasswd",
    "/page/page.html%00", "/page/app.py", "//etc/passwd",
    "/studio/choices", "/docs", "/models/scripted/report"])
def test_paths_lead_nowhere(address: str, path: str) -> None:
    status, told, _ = answer(address, path)
    assert status in (400, 404), told
    assert "root:" not in str(told)
    status, told, _ = answer(address, "/v1/completions", {"model": path, "prompt": "x"})
    assert (status, told["error"]["code"]) == (404, "model_not_found")


def test_other_sites(address: str) -> None:
    """A page of another site, or a name of its own that leads here, gets nothing."""
    assert answer(address, "/v1/models", Host="evil.example")[1]["error"]["code"] == "wrong_host"
    assert answer(address, "/v1/models", Host="localhost:80")[0] == 200
    assert answer(address, "/v1/models", Host="[::1]:80")[0] == 200
    status, told, headers = answer(address, "/v1/completions", {"prompt": "x", "max_tokens": 1},
        Origin="https://evil.example")
    assert (status, told["error"]["code"]) == (403, "wrong_origin")
    assert not any(name.lower().startswith("access-control") for name in headers)
    assert answer(address, "/v1/completions", {"prompt": "x", "max_tokens": 1}, Origin=address)[0] == 200
    assert answer(address, "/v1/completions", {"prompt": "x"}, Content_Type="text/plain")[0] == 400


def test_every_answer_keeps_to_itself(address: str) -> None:
    for path in ("/", "/page/page.css", "/health", "/nowhere", "/v1/models"):
        headers = {name.lower(): value for name, value in answer(address, path)[2].items()}
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    assert answer(address, "/v1/models", method="DELETE")[0] == 405


def test_hostile_text_is_text(address: str) -> None:
    for text in ("<script>alert(1)</script>", "\x00\x01\x02", "‮", "{{7*7}}", "%s%n", "A" * 90_000, "🦙" * 1000):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        status, _, _ = answer(address, "/v1/chat/completions", body)
        assert status == 200


def test_too_many_at_a_time(one: Scripted) -> None:
    """One answers, two wait, the others are turned away and told when to come again."""
    one.held.clear()
    with serving(with_scripted(one, queue=2)) as address:
        found: list[tuple[int, Any, dict[str, str]]] = []
        asked = {"prompt": "x", "max_tokens": 2}
        asking = [threading.Thread(target=lambda: found.append(answer(address, "/v1/completions", asked))) for _ in range(6)]
        for thread in asking:
            thread.start()
        until(lambda: len(found) == 3)
        assert [status for status, _, _ in found] == [429] * 3
        assert all(headers["retry-after"] == "2" and told["error"]["code"] == "queue_full" for _, told, headers in found)
        assert 'tsotsallm_waiting{model="scripted"} 2.0' in answer(address, "/metrics")[1]
        one.held.set()
        for thread in asking:
            thread.join()
        assert [status for status, _, _ in found][3:] == [200] * 3


def test_a_client_that_goes_away_ends_its_answer(one: Scripted) -> None:
    with serving(with_scripted(one), most_tokens=100_000) as address:
        where = urlsplit(address)
        for stream in (True, False):
            body = json.dumps({"prompt": "x", "max_tokens": 100_000, "stream": stream}).encode()
            plain = socket.create_connection((where.hostname, where.port))
            plain.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                          + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            ended, before = one.ended, one.said
            until(lambda before=before: one.said > before + 3)          # type: ignore[misc]
            plain.close()
            until(lambda ended=ended: one.ended == ended + 1, 5)        # type: ignore[misc]
            assert one.said < 5000
        until(lambda: 'tsotsallm_running{model="scripted"} 0.0' in answer(address, "/metrics")[1])


def test_time_is_limited(one: Scripted) -> None:
    with serving(with_scripted(one, timeout_s=0.4), most_tokens=100_000) as address:
        status, told, _ = answer(address, "/v1/completions", {"prompt": "x", "max_tokens": 100_000})
        assert (status, told["error"]["code"]) == (408, "timeout")
        until(lambda: one.ended == 1, 5)
        text = answer(address, "/v1/completions", {"prompt": "x", "max_tokens": 100_000, "stream": True})[1]
        events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line and "[DONE]" not in line]
        assert events[-1]["error"]["code"] == "timeout"         # told in the stream that had begun
        assert len(events) > 3


def test_a_service_that_ends_ends_its_answers(one: Scripted) -> None:
    began = time.monotonic()
    found: list[Any] = []
    with serving(with_scripted(one), most_tokens=100_000) as address:
        def ask() -> None:
            try:
                found.append(answer(address, "/v1/completions", {"prompt": "x", "max_tokens": 100_000, "stream": True}))
            except (OSError, http.client.HTTPException) as error:
                found.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: one.said > 3)
    thread.join(10)
    assert found
    until(lambda: one.ended == 1, 5)
    assert time.monotonic() - began < 20


def test_what_cannot_be_served() -> None:
    for given, message in (({"models": []}, "name a model"), ({"host": "0.0.0.0"}, "api_key=KEY"),
                           ({"host": "0.0.0.0", "key": "short"}, "8 or more"), ({"max_body": "much"}, "max_body"),
                           ({"models": ["a b=embedded"]}, "cannot be a model's name"), ({"port": 99999}, "cannot listen"),
                           ({"models": ["nowhere.gguf"]}, "nowhere.gguf"),
                           ({"studio": Path(__file__)}, "cannot be a folder")):
        with pytest.raises(ServeError if "max_body" in given else TsotsallmError, match=message):
            serve(**({"models": ["embedded"], "port": 0} | given))      # type: ignore[arg-type]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServeError, match="choose another"):
            serve(["embedded"], port=taken.getsockname()[1])
    assert is_local("127.9.9.9")
    assert is_local("::1")
    assert not is_local("0.0.0.0")
    assert not is_local("192.168.1.5")
