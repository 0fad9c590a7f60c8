"""Files that a job reads: a worker that has them uses its own; otherwise they are sent to it once, in checked pieces."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tsotsallm.checkpoint.gguf_place import OLLAMA, parts_at
from tsotsallm.checkpoint.reader import locate
from tsotsallm.errors import ResourceError, TsotsallmError
from tsotsallm.store import key_of

PIECE = 4 << 20
WHOLE = ".whole"
"""The name of an empty file that marks a bundle's folder when all of its files are there and correct."""


@dataclass(frozen=True)
class Bundle:
    """A file or a directory by its content: `source` as the user gave it, and (name, bytes, SHA-256) of every file."""

    source: str
    files: tuple[tuple[str, int, str], ...]

    @classmethod
    def of(cls, source: str) -> Bundle:
        """What a path, a hub id or `embedded` stands for on this machine."""
        path = _root(source)
        files = [(one.name, one) for one in parts_at(path)] if path.is_file() else sorted(_files(path))
        return cls(source, tuple((name, one.stat().st_size, digest(one)) for name, one in files))

    @property
    def key(self) -> str:
        """Hash of names, sizes and contents: the name of the bundle's folder on a worker."""
        return key_of([name_size_hash[0:3] for name_size_hash in self.files])

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(size for _, size, _ in self.files)

    def at(self, path: Path) -> bool:
        """Whether a path holds exactly these files."""
        if path.is_file():
            return all(_is(path if len(self.files) == 1 else path.with_name(name), size, sha256)
                       for name, size, sha256 in self.files)
        return path.is_dir() and all(_is(path / name, size, sha256) for name, size, sha256 in self.files)


def _files(directory: Path) -> Iterable[tuple[str, Path]]:
    return ((path.relative_to(directory).as_posix(), path) for path in directory.rglob("*") if path.is_file())


def _is(path: Path, size: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == size and digest(path) == sha256


def digest(path: Path) -> str:
    """SHA-256 of a file, computed again only where its size or time changed."""
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_path(bundle: Bundle, folder: Path) -> Path | None:
    """Where a worker has a bundle: at the source's own path or hub id, or in `folder`, sent before; None if nowhere."""
    here = folder / bundle.key
    if (here / WHOLE).exists():
        names = [name for name, _, _ in bundle.files]
        own = Path(bundle.source).name
        return here / (own if own in names else names[0]) if _is_file(bundle) else here
    try:
        path = _root(bundle.source)
    except TsotsallmError:
        return None
    return path if bundle.at(path) else None


def _is_file(bundle: Bundle) -> bool:
    """Whether the source was a file, or a part of one, rather than a directory."""
    names = [name for name, _, _ in bundle.files]
    parts = len(names) == 1 or all(name.endswith(".gguf") for name in names)
    return bundle.source.startswith(OLLAMA) or (parts and Path(bundle.source).name in names)


def _root(source: str) -> Path:
    """Where a source is on this machine."""
    return Path(source) if Path(source).exists() else locate(source)


def received(bundle: Bundle, folder: Path) -> dict[str, int]:
    """Name -> bytes of each file of a bundle that have arrived already."""
    here = folder / bundle.key
    arrived = {}
    for name, size, _ in bundle.files:
        for path in (here / name, _part(here, name)):
            if path.exists():
                arrived[name] = min(path.stat().st_size, size)
                break
    return arrived


def receive(bundle: Bundle, folder: Path, name: str, offset: int, piece: bytes, sha256: str) -> dict[str, int]:
    """Append a piece to a file, check files and bundle once they are complete, and return what has arrived so far.

    A piece that changed on its way, or that does not follow what is there, is discarded: the sender resumes from the
    returned sizes. A complete file with the wrong hash is deleted and sent again. Raises ResourceError where the file cannot
    be written.
    """
    here = folder / bundle.key
    known = {file: (size, whole) for file, size, whole in bundle.files}
    part, target = _part(here, name), here / name
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        there = part.stat().st_size if part.exists() else 0
        if not target.exists() and offset == there and hashlib.sha256(piece).hexdigest() == sha256:
            with part.open("ab") as opened:
                opened.write(piece)
        size, whole = known[name]
        if not target.exists() and part.exists() and part.stat().st_size >= size:
            if digest(part) == whole:
                part.replace(target)
            else:
                part.unlink()
        if all((here / file).exists() for file in known):
            (here / WHOLE).write_text("")
    except OSError as error:
        raise ResourceError(f"{here} cannot take {name} ({error.strerror or error}); make room there, or start the worker "
                            "with another --work") from None
    return received(bundle, folder)


def _part(here: Path, name: str) -> Path:
    return here / f"{name}.part"


def next_piece(bundle: Bundle, there: Mapping[str, int]) -> tuple[str, int, bytes, str] | None:
    """The next piece that a worker lacks (file, offset, content, SHA-256), or None where it has everything.

    Raises TsotsallmError where a file became shorter while it was sent.
    """
    root = _root(bundle.source)
    for name, size, _ in bundle.files:
        offset = there.get(name, 0 if size else -1)
        if offset < size:
            with (root.with_name(name) if root.is_file() else root / name).open("rb") as file:
                file.seek(max(offset, 0))
                piece = file.read(PIECE)
            if not piece and size:
                raise TsotsallmError(f"{root / name} became shorter while it was sent; leave the files of a job as they are")
            return name, max(offset, 0), piece, hashlib.sha256(piece).hexdigest()
    return None


def with_local_paths(value: object, places: Mapping[str, str]) -> object:
    """Replace every source that plain data names by the worker's own path."""
    if isinstance(value, str):
        return places.get(value, value)
    if isinstance(value, Mapping):
        return {key: with_local_paths(part, places) for key, part in value.items()}
    return [with_local_paths(part, places) for part in value] if isinstance(value, (list, tuple)) else value


def files_named(value: object) -> set[str]:
    """The strings in plain data that name files on this machine."""
    if isinstance(value, str):
        return {value} if len(value) < 4096 and os.sep in value + os.sep and Path(value).is_file() else set()
    if isinstance(value, Mapping):
        value = list(value.values())
    return set().union(*map(files_named, value)) if isinstance(value, (list, tuple)) else set()
