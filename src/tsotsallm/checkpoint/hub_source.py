"""A model on the hub as the source of a checkpoint: small files on disk, tensors by range requests as they are read."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.checkpoint import adapter
from tsotsallm.checkpoint.gguf_source import GgufSource
from tsotsallm.checkpoint.reader import KEPT_FILES
from tsotsallm.checkpoint.shards import TensorRecord
from tsotsallm.checkpoint.source import CONFIG, MORE_TEMPLATES, DirectorySource, Source
from tsotsallm.checkpoint.spec import EMBEDDING
from tsotsallm.checkpoint.stored import LocalFile, StoredFile
from tsotsallm.checkpoint.weights import INDEX, SINGLE, files_to_fetch
from tsotsallm.errors import CheckpointError, HubError
from tsotsallm.files import quoted
from tsotsallm.remote.file import PIECE_BYTES, RemoteFile, Span
from tsotsallm.remote.names import HubName
from tsotsallm.remote.repository import Repository, on_disk

SMALL = (".json", ".model", ".jinja", ".txt")
TINY_BYTES = 64
"""Smaller tensors are pieces of their own: shapes of packed matrices are read when a checkpoint is opened."""
_LAYER = re.compile(r"(?:layers|blk)\.(\d+)\.")
_ENDS = "token_embd.weight"


@dataclass(frozen=True)
class Sizes:
    """What a source on the hub has, in bytes.

    whole       all files that a download would bring
    layers      the tensors of each stored layer
    ends        the tensors outside the layers, by name
    headers     what is read before any tensor
    """

    whole: int
    layers: dict[int, int]
    ends: dict[str, int]
    headers: int

    @property
    def tensors(self) -> int:
        """All tensors."""
        return sum(self.layers.values()) + sum(self.ends.values())


class Streamed:
    """What the sources on the hub have in common; `pinned` is the model's name with its commit."""

    repository: Repository
    records: dict[str, TensorRecord]
    _keeps = False

    @property
    def pinned(self) -> str:
        """The model's name with the commit that it is read at."""
        return str(self.repository.name)

    def sizes(self) -> Sizes:
        """How large the parts are."""
        layers: dict[int, int] = {}
        ends: dict[str, int] = {}
        for name, record in self.records.items():
            size = record.stored_bytes
            if match := _LAYER.search(name):
                layers[int(match[1])] = layers.get(int(match[1]), 0) + size
            else:
                ends[name] = size
        files = self.repository.opened()
        return Sizes(sum(file.size for file in files), layers, ends, sum(file.head_bytes for file in files))

    def least_cache_bytes(self, *, embeddings: bool = False) -> int:
        """The smallest cache in which a recipe that reads every layer once fetches nothing twice.

        With `embeddings`, they stay there while the layers pass.
        """
        sizes = self.sizes()
        kept = max((size for name, size in sizes.ends.items() if name.startswith(EMBEDDING.removesuffix(".weight"))),
                   default=0)
        layer = max(sizes.layers.values(), default=0) + (kept if embeddings else 0)
        largest = max(layer, sum(sizes.ends.values()))      # what is outside the layers is checked first, and then copied
        heads = 4 * (1 << 20) + min(sizes.headers, 2 * PIECE_BYTES) if sizes.headers > 1 << 20 else 1 << 20
        return largest + heads + min(PIECE_BYTES, largest)

    def bound(self, limit_bytes: int, *, keeps: bool = False) -> None:
        """Set how many bytes of it may be on disk; `keeps`: they stay when a model that was read is written."""
        self.repository.cache.limit_bytes, self._keeps = limit_bytes, keeps

    def release(self) -> None:
        """Delete what is on disk of its tensors, to make room for a result that is put together, unless it is to stay."""
        if not self._keeps:
            self.repository.cache.release()

    def forget(self) -> None:
        """Delete what is on disk of its tensors."""
        self.repository.cache.forget()

    def unverified(self) -> list[str]:
        """Names of files of which not all bytes have passed in order, so that their checksum was not compared."""
        return [file.facts.name for file in self.repository.opened() if not file.verified]


class HubSource(Streamed, DirectorySource):
    """A checkpoint in safetensors on the hub.

    Raises HubError where the hub does not give it, CheckpointError where it is not a sound checkpoint.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.folder = repository.folder([glob.escape(name) for name in repository.files if _is_small(name)])
        self.title = repository.name.repository.rpartition("/")[2]
        if CONFIG not in repository.files:
            raise _without_config(repository)
        self._read(Path(str(repository.given)), repository.files)
        _divide(self.records.items())
        self.bound(self.least_cache_bytes())

    def stored(self, path: Path) -> StoredFile:
        """A weights file on the hub, or a small file on disk."""
        return self.repository.file(path.name) if path.parent == self.path else LocalFile(path)


class HubGgufSource(Streamed, GgufSource):
    """A GGUF file on the hub, or all parts of a split one."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        assert repository.name.file is not None
        if repository.name.file not in repository.files:
            known = [name for name in repository.files if name.endswith(".gguf")]
            raise HubError(f"{repository.given} does not exist; the GGUF files there are "
                           f"{', '.join(known[:6]) or 'none'}{', ...' * (len(known) > 6)}")
        super().__init__(Path(str(repository.given)), self._file)
        spans: dict[Path, list[Span]] = {}
        for tensor in self.file.tensors.values():
            spans.setdefault(self._paths[tensor.name], []).append(
                _span(tensor.name, tensor.start, tensor.size))
        for path, found in spans.items():
            self._file(path).divide(self._starts[path], found)
        self.bound(self.least_cache_bytes())

    def _file(self, path: Path) -> RemoteFile:
        return self.repository.file(_beside(self.repository, path))


def hub_files(name: HubName) -> Path | tuple[Path, Callable[[Path], StoredFile]]:
    """A GGUF file on the hub as messages name it, and what it and its parts are read from; its place on disk if downloaded.

    Raises HubError where the hub does not give it.
    """
    if (found := whole_on_disk(name)) is not None:
        return found
    repository = Repository(name)
    return Path(str(name)), lambda path: repository.file(_beside(repository, path))


def streamed(name: HubName) -> Source | Path:
    """The source of a model on the hub; its place on disk where all of it was downloaded before.

    Raises HubError where the hub does not give it, CheckpointError where it is unsound.
    """
    try:
        repository = Repository(name)
    except HubError:
        if (found := whole_on_disk(name)) is not None:      # as it was when it was downloaded
            return found
        raise
    if (found := whole_on_disk(repository.name)) is not None:
        return found
    return HubSource(repository) if name.file is None else HubGgufSource(repository)


def _beside(repository: Repository, path: Path) -> str:
    """The name in a repository of a part in the folder of its GGUF file."""
    folder = (repository.name.file or "").rpartition("/")[0]
    return f"{folder}/{path.name}" if folder else path.name


def whole_on_disk(name: HubName) -> Path | None:
    """Where all of a model was downloaded to before; None where it was not."""
    if name.file is not None:
        return on_disk(name, name.file)
    found = on_disk(name, CONFIG)
    if found is None:
        return None
    folder = found.parent
    try:
        missing = files_to_fetch(folder)
    except CheckpointError:
        return None
    return folder if not missing and any((folder / one).exists() for one in (SINGLE, INDEX)) else None


def _is_small(name: str) -> bool:
    """Whether a file belongs to a checkpoint beside its weights."""
    folder, _, last = name.rpartition("/")
    if folder:
        return (folder == MORE_TEMPLATES and last.endswith(".jinja")) or (
            folder == adapter.FOLDER and last in (adapter.WEIGHTS, adapter.CONFIG))
    return name.endswith(SMALL) or KEPT_FILES.fullmatch(name) is not None


def _without_config(repository: Repository) -> CheckpointError:
    if files := [name for name in repository.files if name.endswith(".gguf")]:
        return CheckpointError(f"{repository.given} holds GGUF files and no {CONFIG}; give one of the files, such as "
                               f"hub:{repository.name.repository}/{files[0]}")
    return CheckpointError(f"{repository.given} has no {CONFIG}: it is not a Hugging Face checkpoint (it holds "
                           f"{quoted(', '.join(repository.files))})")


def _divide(records: Iterable[tuple[str, TensorRecord]]) -> None:
    """Cut every file into pieces by the layers of its tensors."""
    spans: dict[int, list[Span]] = {}
    files: dict[int, RemoteFile] = {}
    for name, record in records:
        if isinstance(record.file, RemoteFile):
            files[id(record.file)] = record.file
            spans.setdefault(id(record.file), []).append(_span(name, record.start, record.size))
    for key, file in files.items():
        file.divide(min(span.start for span in spans[key]), spans[key])


def _span(name: str, start: int, size: int) -> Span:
    match = _LAYER.search(name)
    group = "tiny" if size <= TINY_BYTES else f"layer {match[1]}" if match else name
    return Span(start, start + size, group, kept=name in (_ENDS, EMBEDDING, f"{EMBEDDING}_blocks"))
