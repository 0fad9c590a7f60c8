"""A server on this machine that speaks the hub's protocol, with faults on purpose.

Weights are on a second server at another port, to which the first redirects, as the hub does to its storage.
"""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf")
BLOCK = 1 << 16
MIB = 1 << 20


@dataclass
class Faults:
    """What goes wrong, in requests for weights.

    cuts       connections are closed after so many bytes, one request after another, then no more
    answers    (status, headers) instead of the next answers
    gated      files are refused, while what the hub says of the model is not
    refused    status and X-Error-Code of every answer of the hub
    no_ranges  Range is ignored
    length     is claimed for the whole file
    etag       is claimed instead of the file's
    slow       bytes a second
    quota      bytes that are sent before every connection is closed
    rate       chance that a connection is closed, for every MiB that it sends
    flipped    a byte of the storage's answers is wrong
    """

    cuts: list[int] = field(default_factory=list)
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    gated: bool = False
    refused: tuple[int, str] | None = None
    no_ranges: bool = False
    length: int | None = None
    etag: str | None = None
    slow: float | None = None
    quota: int | None = None
    rate: float = 0.0
    flipped: bool = False


class Hub:
    """The models that the server has, what it was asked for, and how many bytes of weights it sent."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, Path]] = {}
        self.main: dict[str, str] = {}
        self.faults = Faults()
        self.requests: list[tuple[str, str, str, str]] = []
        self.sent = self.broken = 0
        self.random = random.Random(0)
        self.lock = threading.Lock()
        self._hashes: dict[Path, str] = {}
        hub = self

        class Front(_Handler):
            def answer(self) -> None:
                hub.front(self)

        class Storage(_Handler):
            def answer(self) -> None:
                hub.storage(self)

        self.servers = [_Quiet(("127.0.0.1", 0), one) for one in (Front, Storage)]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.url, self.storage_url = (f"http://127.0.0.1:{one.server_address[1]}" for one in self.servers)

    def close(self) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, directory: Path, commit: str = "a" * 40) -> str:
        """Put a directory under a name, at a commit that is the main branch's from now on."""
        self.models.setdefault(name, {})[commit] = directory
        self.main[name] = commit
        return commit

    def sha256(self, path: Path) -> str:
        if path not in self._hashes:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while piece := file.read(MIB):
                    digest.update(piece)
            self._hashes[path] = digest.hexdigest()
        return self._hashes[path]

    # -- the hub itself -------------------------------------------------------------------------------------------

    def front(self, request: _Handler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        self.note("hub", request)
        if self.faults.refused is not None:
            status, code = self.faults.refused
            request.finish_with(status, b"{}", {"X-Error-Code": code} if code else {})
            return
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
            self.api(request, name, rest)
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve(request, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            request.finish_with(404, b"{}", {})

    def found(self, request: _Handler, name: str, revision: str) -> tuple[str, Path] | None:
        if name not in self.models:
            request.finish_with(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return None
        commit = self.main[name] if revision == "main" else revision
        if commit not in self.models[name]:
            request.finish_with(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return None
        return commit, self.models[name][commit]

    def api(self, request: _Handler, name: str, rest: list[str]) -> None:
        found = self.found(request, name, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return
        commit, directory = found
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        content: Any
        if rest[:1] == ["tree"]:
            content = [{"type": "file", "oid": _git_hash(path), "size": path.stat().st_size,
                        "path": path.relative_to(directory).as_posix(),
                        **({"lfs": {"oid": self.sha256(path), "size": path.stat().st_size, "pointerSize": 134}}
                           if path.name.endswith(LARGE) else {})} for path in files]
        else:
            content = {"_id": "0", "id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "downloads": 0,
                       "likes": 0, "siblings": [{"rfilename": path.relative_to(directory).as_posix()} for path in files]}
        request.finish_with(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def resolve(self, request: _Handler, name: str, revision: str, file: str) -> None:
        found = self.found(request, name, revision)
        if found is None:
            return
        commit, directory = found
        path = directory / file
        if self.faults.gated:
            request.finish_with(401, b"", {"X-Error-Code": "GatedRepo", "X-Repo-Commit": commit})
            return
        if not path.is_file():
            request.finish_with(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        size = path.stat().st_size
        if not file.endswith(LARGE):
            request.finish_with(200, path.read_bytes(), {"ETag": f'"{_git_hash(path)}"', "X-Repo-Commit": commit})
            return
        request.finish_with(302, b"", {
            "Location": f"{self.storage_url}/{name}/{commit}/{file}?signed=1", "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{self.faults.etag or self.sha256(path)}"', "X-Linked-Size": str(size)})

    # -- its storage ----------------------------------------------------------------------------------------------

    def storage(self, request: _Handler) -> None:
        owner, model, commit, file = unquote(urlsplit(request.path).path).strip("/").split("/", 3)
        self.note("storage", request)
        if self.faults.answers:
            status, headers = self.faults.answers.pop(0)
            request.finish_with(status, b"", headers)
            return
        path = self.models[f"{owner}/{model}"][commit] / file
        size, asked = path.stat().st_size, request.headers.get("Range")
        first, last = 0, size - 1
        if asked and not self.faults.no_ranges:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or size - 1), size - 1)
            if first >= size:
                request.finish_with(416, b"", {"Content-Range": f"bytes */{size}"})
                return
        ranged = asked and not self.faults.no_ranges
        request.send_response(206 if ranged else 200)
        request.send_header("ETag", f'"{_git_hash(path)}"')
        request.send_header("Content-Length", str(last - first + 1))
        if ranged:
            request.send_header("Content-Range", f"bytes {first}-{last}/{self.faults.length or size}")
        request.end_headers()
        left = last - first + 1
        cut = self.faults.cuts.pop(0) if self.faults.cuts else None
        with path.open("rb") as content:
            content.seek(first)
            while left:
                data = bytearray(content.read(min(left, BLOCK, left if cut is None else max(cut, 1))))
                if self.faults.flipped:
                    data[0] ^= 1
                broken = self.random.random() < self.faults.rate * len(data) / MIB
                if cut == 0 or broken or (self.faults.quota is not None and self.sent >= self.faults.quota):
                    with self.lock:
                        self.broken += 1
                    request.close_connection = True
                    request.connection.close()
                    return
                if self.faults.slow is not None:
                    time.sleep(len(data) / self.faults.slow)
                request.wfile.write(data)
                left -= len(data)
                cut = None if cut is None else cut - len(data)
                with self.lock:
                    self.sent += len(data)

    def note(self, server: str, request: _Handler) -> None:
        with self.lock:
            self.requests.append((server, request.command, request.path, request.headers.get("Authorization", "")))


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        raise NotImplementedError

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def finish_with(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


def _git_hash(path: Path) -> str:
    content = path.read_bytes() if path.stat().st_size < MIB else str(path).encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub while the block runs."""
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()
