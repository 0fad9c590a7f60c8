"""A model's repository on the hub at one commit: its files by name, the small ones on disk, the others as remote files."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tsotsallm.errors import HubError, MissingExtraError
from tsotsallm.machine import cache_root
from tsotsallm.remote import transfer
from tsotsallm.remote.cache import PieceCache
from tsotsallm.remote.faults import RETRIED, explained, is_passing, kinds_of, retry_after, root_of, status_of
from tsotsallm.remote.file import RemoteFile
from tsotsallm.remote.names import HubName
from tsotsallm.remote.transfer import Facts

FOLDER = "hub"
TRIES = 3
"""How often a question is asked before anything of a model has arrived."""
LONGEST_S = 60.0
ANSWER_S = 20.0
_SHA256 = 64
_Answer = TypeVar("_Answer")


def client() -> Any:
    """The hub's client library; raises MissingExtraError where it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtraError("huggingface_hub", "hub", "reading a model of the hub") from None
    return huggingface_hub


class Repository:
    """A model on the hub, pinned to the commit that its revision names now.

    name    with the commit as its revision
    given   the name as the user gave it
    files   names of all files
    """

    def __init__(self, given: HubName) -> None:
        api = client().HfApi()
        info = asked(given, lambda: api.model_info(given.repository, revision=given.revision, timeout=ANSWER_S))
        if not isinstance(info.sha, str):
            raise HubError(f"the hub names no commit of {given}; download it with `hf download {given.repository}`, and "
                           "give its directory")
        self.given, self.commit = given, info.sha
        self.name = replace(given, revision=info.sha)
        self.files = tuple(one.rfilename for one in info.siblings or ())
        self._open: dict[str, RemoteFile] = {}

    @cached_property
    def cache(self) -> PieceCache:
        """Where pieces of its files are kept; unbounded until a bound is set."""
        folder = f"{self.name.repository.replace('/', '--')}--{self.commit[:12]}"
        return PieceCache(cache_root() / FOLDER, folder, 1 << 62)

    def folder(self, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
        """The directory of the client's own cache with the files that match patterns; what is missing is downloaded."""
        library = client()
        return Path(asked(self.given, lambda: library.snapshot_download(
            self.name.repository, revision=self.commit, allow_patterns=list(patterns), ignore_patterns=list(ignored))))

    def on_disk(self, name: str) -> Path | None:
        """Where the client's own cache has a file of this commit; None where it has not."""
        return on_disk(self.name, name)

    def file(self, name: str) -> RemoteFile:
        """A file that is read by range requests; raises HubError where the hub does not give it."""
        if name not in self._open:
            self._open[name] = RemoteFile(self._facts(name), self.cache)
        return self._open[name]

    def opened(self) -> list[RemoteFile]:
        """The files that are read by range requests."""
        return list(self._open.values())

    def _facts(self, name: str) -> Facts:
        library = client()
        url = library.hf_hub_url(self.name.repository, name, revision=self.commit)
        shown = f"{replace(self.given, file=None)}/{name}"
        found = asked(replace(self.given, file=name), lambda: library.get_hf_file_metadata(url, token=_token(),
                                                                                             timeout=ANSWER_S))
        if found.size is None:
            raise HubError(f"the hub does not say how long {shown} is; download it with `hf download "
                           f"{self.name.repository}`, and give its directory")
        if found.commit_hash not in (None, self.commit):
            raise HubError(f"{shown} belongs to commit {found.commit_hash[:12]}, where {self.commit[:12]} was asked for; "
                           "run the same command again")
        sha256 = found.etag if found.etag is not None and len(found.etag) == _SHA256 else None
        return Facts(shown, url, found.size, found.etag, sha256)


def on_disk(name: HubName, file: str) -> Path | None:
    """Where the client's own cache has a file of a model; None where it has not."""
    found = client().try_to_load_from_cache(name.repository, file, revision=name.revision)
    return Path(found) if isinstance(found, str) else None


def say_whole(name: HubName) -> None:
    """Report on stderr that all of a model is downloaded now."""
    print(f"downloading {name} whole, into the cache of the hub's client", file=sys.stderr, flush=True)


def asked(name: HubName, question: Callable[[], _Answer]) -> _Answer:
    """The answer to a question of the hub's client, asked again where a fault may pass; raises HubError with the remedy."""
    for attempt in range(1, TRIES + 1):
        try:
            return question()
        except Exception as error:  # the client and its transport raise many types
            root = root_of(error)
            status = status_of(root)
            passing = status in RETRIED or (is_passing(root) and "ProxyError" not in kinds_of(root))
            wait = retry_after(root.response.headers) if status is not None else None  # type: ignore[attr-defined]
            if attempt == TRIES or not passing or (wait or 0) > LONGEST_S:
                raise explained(root, str(name)) from None
            time.sleep(transfer.PATIENCE.wait_s(attempt) if wait is None else wait)
    raise AssertionError("unreachable")


def _token() -> str | None:
    found = client().get_token()
    return found if isinstance(found, str) else None
