"""Where a checkpoint comes from: the one interface behind which a directory and a GGUF file are alike.

A source gives the config, the places of the tensors, and the files beside the weights by name, whether they are on disk or
made from a header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tsotsallm.checkpoint import adapter
from tsotsallm.checkpoint.shards import TensorRecord
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD, ModelSpec
from tsotsallm.checkpoint.stored import LocalFile, StoredFile, bytes_at
from tsotsallm.checkpoint.weights import of_text, read_weights, weight_files
from tsotsallm.errors import CheckpointError
from tsotsallm.files import SIDE_FILE_BYTES, quoted, read_bytes, read_json

PROVENANCE = "tsotsallm.json"
CONFIG = "config.json"
MORE_TEMPLATES = "additional_chat_templates"
HASHED_BYTES = 65536
_READ_WITH = (".json", ".model", ".txt", ".jinja")


class Source(Protocol):
    """What a checkpoint is read from.

    path     the directory or file, as messages name it
    title    the model's name
    spec     widths and layout
    records  the tensors by the names that transformers knows them by
    notes    what the user should know, a sentence each
    lossy    the types and bits a weight of weights that were quantised before; empty where none were, or by ourselves
    """

    path: Path
    title: str
    spec: ModelSpec
    records: dict[str, TensorRecord]
    notes: tuple[str, ...]
    lossy: str

    @property
    def keeps_types(self) -> bool:
        """Whether an export writes every dense tensor in the type that it has here."""

    def names(self) -> list[str]:
        """Names of the files beside the weights, sorted."""

    def read(self, name: str, limit: int = SIDE_FILE_BYTES) -> bytes:
        """A file beside the weights; raises FileNotFoundError where there is none, CheckpointError where it is too large."""

    def read_json(self, name: str) -> Any:
        """A JSON file beside the weights; FileNotFoundError where there is none, CheckpointError where it is damaged."""

    def files(self) -> set[Path]:
        """The files on disk, besides those of the tensors, on which answers of the model depend."""

    def stored(self, path: Path) -> StoredFile:
        """What one of the files that hold tensors is read from."""

    def header(self, path: Path) -> bytes:
        """What stands before the tensors in one of the files that hold them."""

    def release(self) -> None:
        """Delete what is on disk only because it was read; it is fetched again where it is read again."""


def digest_of_ends(source: Source, path: Path) -> str:
    """SHA-256 of the header and of the last 64 KiB of one of the files that hold tensors."""
    file = source.stored(path)
    ends = source.header(path) + bytes_at(file, max(0, file.size - HASHED_BYTES), HASHED_BYTES)
    return hashlib.sha256(ends).hexdigest()


class DirectorySource:
    """A directory with config.json and safetensors files, ours or another's.

    folder  where the files beside the weights are
    """

    keeps_types = False
    lossy = ""

    def __init__(self, directory: Path) -> None:
        self.folder, self.title = directory, directory.resolve().name
        self._read(directory, None)

    def _read(self, shown: Path, listed: Collection[str] | None) -> None:
        """Read config and headers; `shown` is the directory as messages name it, `listed` the names of all its files."""
        directory, self.path = self.folder, shown
        self.spec = ModelSpec.read(directory)
        files = weight_files(directory, listed)
        if listed is not None:
            files = replace(files, files=tuple(shown / path.name for path in files.files))
        self.records = read_weights(files, None if listed is None else self.stored)
        pictures: tuple[str, ...] = ()
        if self.spec.whole:
            stored, self.records = len(self.records), of_text(self.records)
            pictures = (f"the checkpoint is a {self.spec.whole}, which sees pictures too: its text model is read, and the "
                        f"{stored - len(self.records)} tensors of what sees are left out",)
        if self.spec.tied and EMBEDDING not in self.records and HEAD in self.records:
            self.records[EMBEDDING] = self.records.pop(HEAD)    # transformers ties both to whichever is stored
        for name in self.records:
            if name.endswith(adapter.PEFT):
                raise CheckpointError(f"{shown}: {quoted(name)} is stored among the weights of its base, where "
                                      "transformers ignores it; merge it into the base with PEFT first")
        corrections, notes = adapter.read_adapter(directory, ours=(directory / PROVENANCE).exists())
        self.records |= corrections
        self.notes = files.notes + pictures + notes

    def names(self) -> list[str]:
        """Names of the files in the directory, and of the chat templates below it."""
        more = self.folder / MORE_TEMPLATES
        return sorted(path.relative_to(self.folder).as_posix() for path in (
            *self.folder.iterdir(), *(more.glob("*.jinja") if more.is_dir() else ())) if not path.is_dir())

    def read(self, name: str, limit: int = SIDE_FILE_BYTES) -> bytes:
        """A file of the directory."""
        return read_bytes(self.folder / name, CheckpointError, limit)

    def read_json(self, name: str) -> Any:
        """A JSON file of the directory."""
        return read_json(self.folder / name, CheckpointError)

    def files(self) -> set[Path]:
        """Config, tokenizer, templates and lists, except what says how the model was made."""
        return {path for path in self.folder.iterdir() if path.suffix in _READ_WITH
                and not path.name.startswith("tsotsallm") and path.is_file()}

    def stored(self, path: Path) -> StoredFile:
        """A file of the directory."""
        return LocalFile(path)

    def release(self) -> None:
        """Nothing is on disk only because it was read."""

    def header(self, path: Path) -> bytes:
        """The header of a safetensors file, with its length."""
        file = self.stored(path)
        return bytes_at(file, 0, 8 + int.from_bytes(bytes_at(file, 0, 8), "little"))
