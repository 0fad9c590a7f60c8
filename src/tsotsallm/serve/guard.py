"""Who may send requests, how large and from where, checked before a request is read; and the headers of every answer."""

from __future__ import annotations

import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/", "/health", "/page/state", "/openapi.json")
"""Paths that need no key; without it, /page/state says only that one is needed."""
LARGE = {"/studio/texts": 20 << 20}
"""Paths whose requests may have larger bodies than all others, and how many bytes."""
LINK_S = 6 * 3600
"""Seconds for which a link to a file holds: a slow line takes hours for a large model, and may have to begin again."""
LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})
HEADERS = (
    (b"content-security-policy", b"default-src 'self'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'; "
                                 b"form-action 'none'"),
    (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"), (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"))


@dataclass(frozen=True)
class Rules:
    """What a service allows.

    key         of `Authorization: Bearer KEY`; None: everybody on this computer may send requests
    body_bytes  most bytes of a request's body
    any_host    whether requests may call the service by any name; otherwise only by the names of this computer, so that no
                page of another site reaches it under a name of its own
    secret      signs links to single files, which a browser follows without the key
    """

    key: str | None = None
    body_bytes: int = 1 << 20
    any_host: bool = False
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def knows(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request carries the key; the comparison takes constant time."""
        if self.key is None:
            return True
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(given.strip(), self.key.encode()) and kind.lower() == b"bearer"

    def link(self, path: str) -> str:
        """A link to what is at a path, good for LINK_S seconds without the key, and for reading alone."""
        until = int(time.time()) + LINK_S
        return f"{quote(path)}?until={until}&proof={self._proof(path, until)}"

    def linked(self, scope: Scope) -> bool:
        """Whether a request follows such a link."""
        given = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        until, proof = given.get("until", [""])[0], given.get("proof", [""])[0]
        if scope["method"] not in ("GET", "HEAD") or not until.isdecimal() or not until.isascii() or len(until) > 12:
            return False
        signed = self._proof(scope["path"], int(until))
        return hmac.compare_digest(proof.encode(), signed.encode()) and time.time() < int(until)

    def _proof(self, path: str, until: int) -> str:
        return hmac.new(self.secret, f"{until} {path}".encode(), "sha256").hexdigest()


def is_local(host: str) -> bool:
    """Whether an address can be reached only from this computer."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Checks host name, key and size of every request, and adds the headers that isolate a page."""

    def __init__(self, app: App, rules: Rules) -> None:
        self.app, self.rules = app, rules

    def _most(self, scope: Scope) -> int:
        return max(LARGE.get(scope["path"], 0), self.rules.body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = False

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(header for header in HEADERS if header[0] not in given)]
            await send(message)

        async def unless_refused(message: Message) -> None:
            if not refused:
                await answer(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        if (refusal := self._refusal(scope, headers)) is not None:
            await _refuse(answer, *refusal)
            return
        read = 0

        async def body() -> Message:
            """The next part of the body; once it is larger than allowed, the request is refused and disconnected."""
            nonlocal read, refused
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._most(scope):
                    if not refused:
                        refused = True
                        await _refuse(answer, *_too_large(self._most(scope)))
                    return {"type": "http.disconnect"}
            return message

        await self.app(scope, body, unless_refused)

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        if not self.rules.any_host and _host(headers.get(b"host", b"")) not in LOCAL:
            return 400, ("this service answers only to the names of this computer; send the request to 127.0.0.1 or "
                         "localhost"), "wrong_host"
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] not in ("GET", "HEAD") and (
                origin.partition(b"://")[2] != headers.get(b"host", b"")):
            return 403, "requests from pages of other sites are not answered; use the service's own page", "wrong_origin"
        path = scope["path"]
        if not (path in OPEN or path.startswith("/page/") or self.rules.knows(headers) or self.rules.linked(scope)):
            return 401, "the key is missing or wrong; give it as Authorization: Bearer KEY", "invalid_api_key"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._most(scope):
            return _too_large(self._most(scope))
        return None


def _too_large(most: int) -> tuple[int, str, str]:
    return 413, f"the request is larger than {most} bytes; send less", "too_large"


def _host(given: bytes) -> str:
    """The name in a Host header, without its port."""
    text = given.decode("latin-1").lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    fault = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    content = json.dumps({"error": fault}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()),
               (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
