"""llama-server from the PATH, over HTTP on this machine, with the same requests and answers as xllamacpp."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tsotsallm.errors import CheckpointError, TsotsallmError
from tsotsallm.files import Json

START_S = 600.0
"""Limit for loading a file: a large one on a slow disk takes minutes."""


class HttpServer:
    """A process of llama-server with one file, on a free port of 127.0.0.1, which ends with this object.

    Raises CheckpointError where it does not load the file.
    """

    def __init__(self, program: str, options: Sequence[str], key: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.address, self._key = f"http://127.0.0.1:{port}", key
        self._process = subprocess.Popen([program, *options, "--host", "127.0.0.1", "--port", str(port)],
                                         env=os.environ | {"LLAMA_API_KEY": key},      # users see options
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

    def handle_completions(self, asked: Mapping[str, object], take: Callable[[Any], bool] | None = None) -> Json:
        """Complete a prompt; see `ask`."""
        return self._post("/v1/completions", asked, take)

    def handle_chat_completions(self, asked: Mapping[str, object], take: Callable[[Any], bool] | None = None) -> Json:
        """Continue a conversation; see `ask`."""
        return self._post("/v1/chat/completions", asked, take)

    def _post(self, place: str, asked: Mapping[str, object], take: Callable[[Any], bool] | None) -> Json:
        return ask(self.address + place, asked, self._key, take)


def ask(address: str, asked: Mapping[str, object], key: str, take: Callable[[Any], bool] | None = None) -> Json:
    """POST JSON to a server of llama.cpp on this machine, and return its JSON.

    With `take` the answer is streamed: `take` receives every chunk and returns whether to stop, and None is returned.
    Raises TsotsallmError where the server does not answer.
    """
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
            return json.loads(content)      # llama.cpp's own message, under `error`
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
