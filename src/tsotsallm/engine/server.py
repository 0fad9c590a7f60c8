"""llama-server from the PATH, asked over HTTP on this machine: the same questions and answers as in xllamacpp."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from tsotsallm.errors import CheckpointError, TsotsallmError

START_S = 600.0
"""A large file on a slow disk takes minutes to load."""


class HttpServer:
    """A process of llama-server with one file, on a free port of 127.0.0.1; it ends with this object."""

    def __init__(self, program: str, options: Sequence[str], key: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self._key = f"http://127.0.0.1:{port}", key
        self._process = subprocess.Popen([program, *options, "--host", "127.0.0.1", "--port", str(port)],
                                         env=os.environ | {"LLAMA_API_KEY": key},      # others see a process's options
                                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        self.stop = weakref.finalize(self, _end, self._process)
        self._wait(program)

    def _wait(self, program: str) -> None:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise CheckpointError(f"{program} ended with code {self._process.returncode} while it loaded the file; is "
                                      "the file whole, its architecture known, and memory free?")
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.stop()
        raise CheckpointError(f"{program} did not load the file within {START_S:.0f} s; try a smaller file")

    def handle_completions(self, asked: dict[str, Any], take: Callable[[Any], Any] | None = None) -> Any:
        return self._post("/v1/completions", asked, take)

    def handle_chat_completions(self, asked: dict[str, Any], take: Callable[[Any], Any] | None = None) -> Any:
        return self._post("/v1/chat/completions", asked, take)

    def _post(self, place: str, asked: dict[str, Any], take: Callable[[Any], Any] | None) -> Any:
        """The answer; with `take` its chunks as they come, and None. What `take` answers with true ends it."""
        return ask(self.address + place, asked, self._key, take)


def ask(address: str, asked: dict[str, Any], key: str, take: Callable[[Any], Any] | None = None) -> Any:
    """POST JSON to a server of llama.cpp on this machine."""
    request = urllib.request.Request(address, json.dumps(asked).encode(),
                                     {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request) as answer:
            if take is None:
                return json.load(answer)
            for line in answer:
                content = line.decode().strip().removeprefix("data:").strip()
                if content and content != "[DONE]" and take(json.loads(content)):
                    break
            return None
    except urllib.error.HTTPError as error:
        content = error.read().decode(errors="replace")
        try:
            return json.loads(content)      # llama.cpp's own words, under `error`
        except ValueError:
            raise TsotsallmError(f"llama-server answered {error.code}: {content[:200]}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise TsotsallmError(f"llama-server does not answer ({error}); did it run out of memory?") from None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
