"""Ranges of a file on the hub: received in order, resumed within a range, with waits that grow."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tsotsallm.errors import HubError
from tsotsallm.files import one_line
from tsotsallm.remote.faults import RETRIED, PassingError, explained, is_passing, retry_after
from tsotsallm.units import human_bytes

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_ERROR_BYTES = 1 << 20


@dataclass(frozen=True)
class Patience:
    """How long broken connections are tried again.

    tries      in a row without a single new byte, before an error
    first_s    wait before the second of them, in seconds; each later one is twice as long, up to `most_s`
    again_s    wait after a connection that brought something
    longest_s  of a Retry-After that is obeyed; where a server asks for more, the error says so
    silence_s  without a byte before a connection counts as broken
    """

    tries: int = 8
    first_s: float = 1.0
    most_s: float = 60.0
    again_s: float = 0.2
    longest_s: float = 900.0
    silence_s: float = 60.0

    def wait_s(self, tries: int) -> float:
        """The wait before the next of `tries` attempts without a new byte."""
        return self.again_s if tries == 0 else min(self.most_s, self.first_s * 2 ** (tries - 1))


PATIENCE = Patience()


@dataclass(frozen=True)
class Facts:
    """What the hub says of a file at a commit.

    name    of the file with its model, for messages
    url     where it is asked for
    size    in bytes
    etag    which changes with the content
    sha256  of the content, where the hub knows it
    """

    name: str
    url: str
    size: int
    etag: str | None
    sha256: str | None


def receive(facts: Facts, start: int, end: int, take: Callable[[bytes], object], done: Callable[[], int]) -> None:
    """Pass the bytes [start, end) of a file to `take`, in order and each once, however often the connection breaks.

    `done` gives the bytes of all files that have been received, for the message. Raises HubError, with the remedy, after
    `PATIENCE.tries` attempts without a new byte, and at once for answers that another try would not change.
    """
    place, tries = start, 0
    while place < end:
        before, fault = place, PassingError("the connection ended early")
        try:
            for chunk in _chunks(facts, place, end):
                take(chunk)
                place += len(chunk)
        except HubError:
            raise
        except PassingError as error:
            fault = error
        except Exception as error:  # the client's transport raises types of its own
            if not is_passing(error):
                raise explained(error, facts.name) from None
            fault = PassingError(f"{type(error).__name__}: {one_line(error, 120)}")
        if place == end:
            return
        tries = 0 if place > before else tries + 1
        if tries >= PATIENCE.tries or (fault.wait_s or 0) > PATIENCE.longest_s:
            raise _given_up(facts, fault, tries, done()) from None
        time.sleep(PATIENCE.wait_s(tries) if fault.wait_s is None else fault.wait_s)


def _given_up(facts: Facts, fault: PassingError, tries: int, done: int) -> HubError:
    if fault.status is not None and fault.wait_s is not None and fault.wait_s > PATIENCE.longest_s:
        why = f"the hub asks to wait {fault.wait_s:.0f} s ({fault.status})"
    elif fault.status == 429:
        why = f"the hub still answers 429, too many requests, at try {tries}; HF_TOKEN allows more"
    elif fault.status is not None:
        why = f"the hub still answers {fault.status} at try {tries}"
    else:
        why = f"no new byte in {tries} tries ({fault})"
    return HubError(f"{facts.name}: {why}; {human_bytes(done)} have arrived and are kept: run the same command again when "
                    "the connection is better")


def _chunks(facts: Facts, start: int, end: int) -> Iterator[bytes]:
    """Yield what one connection brings of [start, end)."""
    from huggingface_hub.utils import build_hf_headers, get_session

    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
    # redirects are followed by the client, which leaves the token out where they lead to another host or port
    with get_session().stream("GET", facts.url, headers=headers, timeout=PATIENCE.silence_s,
                              follow_redirects=True) as response:
        _check(facts, response, start, end)
        left = end - start
        for chunk in response.iter_raw():
            yield chunk[:left]
            left -= min(left, len(chunk))
            if not left:
                return


def _check(facts: Facts, response: Any, start: int, end: int) -> None:
    """Raise unless an answer is the range that was asked for, of the file that is meant."""
    from huggingface_hub.utils import hf_raise_for_status

    status = response.status_code
    # a link to a storage host may have expired on the way
    if status in RETRIED or (status == 403 and response.history):
        raise PassingError(f"the answer was {status}", retry_after(response.headers), status)
    if status == 416:
        raise HubError(f"{facts.name}: the server has no bytes {start} to {end - 1}, where the hub says that there are "
                       f"{facts.size}; the file was replaced or cut: run the same command again with --restart")
    if status >= 400:
        if int(response.headers.get("Content-Length") or 0) < _ERROR_BYTES:
            response.read()
        hf_raise_for_status(response)
    if status == 200:
        raise HubError(f"{facts.name}: the server does not give parts of files (it ignores Range); download the model whole "
                       "with `hf download`, and give its directory")
    found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if status != 206 or found is None:
        raise PassingError(f"the answer was {status} without the range that was asked for")
    if found[3] not in ("*", str(facts.size)):
        raise HubError(f"{facts.name} has {found[3]} bytes now, where the hub said {facts.size}; the file was replaced: run "
                       "the same command again with --restart")
    if int(found[1]) != start or int(found[2]) + 1 > end:
        raise PassingError(f"the answer was bytes {found[1]} to {found[2]}, where {start} to {end - 1} were asked for")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise HubError(f"{facts.name}: the server compresses what it sends; a proxy in between may do so: go around it, or "
                       "download the model whole with `hf download`")
    _require_same(facts, response)


def _require_same(facts: Facts, response: Any) -> None:
    """Raise HubError where the hub's answers name another content than at the start."""
    for answer in (*response.history, response):
        linked = answer.headers.get("X-Linked-Etag")
        etag = linked or (answer.headers.get("ETag") if not response.history else None)
        if etag is not None and facts.etag is not None and (found := etag.removeprefix("W/").strip('"')) != facts.etag:
            raise HubError(f"{facts.name} has changed while it was read (its ETag was {facts.etag[:12]} and is "
                           f"{found[:12]}); run the same command again with --restart, which begins with what is there now")
