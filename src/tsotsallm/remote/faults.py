"""What went wrong between here and the hub, as one line with the remedy."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tsotsallm.errors import HubError
from tsotsallm.files import one_line

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
RETRIED = (408, 429, 500, 502, 503, 504)
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_PASSING = {"TimeoutException", "NetworkError", "RemoteProtocolError", "ProxyError"}


class PassingError(Exception):
    """A fault that may be gone with the next try; `wait_s` is how long the server asks to wait."""

    def __init__(self, message: str, wait_s: float | None = None, status: int | None = None) -> None:
        super().__init__(message)
        self.wait_s, self.status = wait_s, status


def kinds_of(error: BaseException) -> set[str]:
    """The names of an error's classes: the hub's client has changed its transport library, but not the names."""
    return {kind.__name__ for kind in type(error).__mro__}


def is_passing(error: BaseException) -> bool:
    """Whether a fault of the transport may be gone with the next try."""
    return bool(kinds_of(error) & _PASSING)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """How many seconds a server asks to wait; None where it does not say."""
    from email.utils import parsedate_to_datetime
    from time import time

    text = headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time()) if text else None
    except ValueError:
        return None


def root_of(error: BaseException) -> BaseException:
    """The fault behind what the hub's client raises where it finds nothing on disk either."""
    seen = 0
    while "LocalEntryNotFoundError" in kinds_of(error) and error.__cause__ is not None and seen < 10:
        error, seen = error.__cause__, seen + 1
    return error


def status_of(error: BaseException) -> int | None:
    """The status of the answer that an error is about; None where there was no answer."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def explained(error: BaseException, name: str) -> HubError:
    """The error, with the remedy, for what the hub's client or its transport raised about the model `name`."""
    if isinstance(error, HubError):
        return error
    error = root_of(error)
    kinds, status = kinds_of(error), status_of(error)
    if isinstance(error, PassingError):
        status = error.status
    bare = name.removeprefix("hub:")
    if "OfflineModeIsEnabled" in kinds:
        return HubError(f"{name} cannot be read: offline mode is on; unset {_offline()}, or give a local directory or a "
                        "GGUF file")
    if "GatedRepoError" in kinds:
        return HubError(f"{name} is gated: accept its licence on its hub page, then set HF_TOKEN to an access token or run "
                        "`hf auth login`; HuggingFaceTB/SmolLM2-1.7B-Instruct is open and similar in size")
    if "RevisionNotFoundError" in kinds:
        return HubError(f"{name} has no such revision; give a branch, a tag or a commit of it after @, or leave it out")
    if "EntryNotFoundError" in kinds and status == 404:
        return HubError(f"{name} has no such file; see its hub page for the names of its files")
    if "RepositoryNotFoundError" in kinds or status == 404:
        return HubError(f"{name} is neither a local directory nor on the hub, or it is private; check the name, and for a "
                        "private model set HF_TOKEN or run `hf auth login`")
    if status in (401, 403) or "DisabledRepoError" in kinds:
        return HubError(f"the hub refuses to give {name} ({status or 403}): accept its licence on its hub page if it is "
                        "gated, and set HF_TOKEN to an access token that may read it")
    if status == 407 or "ProxyError" in kinds:
        return HubError(f"{name} cannot be reached through the proxy ({one_line(error, 120)}); correct "
                        f"{_proxies() or PROXIES[0]}, or unset it where no proxy is needed")
    if status == 429:
        return HubError(f"the hub answers {name} with 429, too many requests: wait some minutes, or set HF_TOKEN, which "
                        "allows more, and run the same command again")
    if status is not None and status >= 500:
        return HubError(f"the hub answers {name} with {status}, a fault of its own; run the same command again later")
    if kinds & _PASSING or "LocalEntryNotFoundError" in kinds or "OSError" in kinds:
        return HubError(f"{name} was not downloaded before, and the hub cannot be reached{_through()} "
                        f"({one_line(error, 120)}); connect to the internet, or give a local directory, a GGUF file, or "
                        "'embedded' for the embedded model")
    return HubError(f"{name} cannot be read from the hub ({type(error).__name__}: {one_line(error, 160)}); download it with "
                    f"`hf download {bare}` and give its directory")


def _offline() -> str:
    return next((name for name in OFFLINE if os.environ.get(name)), OFFLINE[0])


def _proxies() -> str:
    """The variables that name a proxy, if any."""
    return " and ".join(name for name in (*PROXIES, *map(str.lower, PROXIES)) if os.environ.get(name))


def _through() -> str:
    """What a proxy may have to do with it."""
    return f" through the proxy of {_proxies()}" if _proxies() else ""
