"""Hidden states of a corpus on disk, in float32, read and written a few windows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.shards import byte_view
from tsotsallm.timing import counted

BATCH_TOKENS = 1024
BATCH_VALUES = 1 << 21
"""Numbers of a batch at most: what a layer computes for it is several times as large."""


def batch_tokens(width: int) -> int:
    """Tokens of a batch of states of this width at most, unless a single window has more."""
    return min(BATCH_TOKENS, BATCH_VALUES // width)


class HiddenStates:
    """A file of float32 states (tokens, width) for windows of given lengths; a batch holds windows of one length."""

    def __init__(self, path: Path, lengths: Sequence[int], width: int) -> None:
        self.path, self.width = path, width
        self.lengths = list(lengths)
        self.starts = [0]
        for length in self.lengths:
            self.starts.append(self.starts[-1] + length)

    def like(self, path: Path) -> HiddenStates:
        """Another file for states of the same shape."""
        return HiddenStates(path, self.lengths, self.width)

    def like_lengths(self, lengths: Sequence[int]) -> HiddenStates:
        """The same file read as windows of other lengths."""
        return HiddenStates(self.path, lengths, self.width)

    @property
    def tokens(self) -> int:
        """Tokens of all windows together."""
        return self.starts[-1]

    def batches(self) -> Iterator[list[int]]:
        """Yield the indices of neighbouring windows of one length, at most `batch_tokens` together."""
        batch: list[int] = []
        most = batch_tokens(self.width)
        for index, length in enumerate(self.lengths):
            if batch and (length != self.lengths[batch[0]] or (len(batch) + 1) * length > most):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @counted("disk")
    def read(self, batch: Sequence[int]) -> Tensor:
        """The states of neighbouring windows, (windows, tokens, width); raises OSError where the file is too short."""
        states = torch.empty(len(batch), self.lengths[batch[0]], self.width)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.starts[batch[0]] * self.width * 4)
            view, filled = byte_view(states), 0
            while filled < len(view) and (got := file.readinto(view[filled:])):
                filled += got
        if filled < len(view):
            raise OSError(f"{self.path} is too short")
        return states

    @counted("disk")
    def write(self, batch: Sequence[int], states: Tensor) -> None:
        """Write the states of neighbouring windows, (windows, tokens, width)."""
        with self.path.open("r+b" if self.path.exists() else "w+b", buffering=0) as file:
            file.seek(self.starts[batch[0]] * self.width * 4)
            view = byte_view(states.float())
            while view:
                view = view[file.write(view):]

    @contextmanager
    def drafted(self) -> Iterator[HiddenStates]:
        """A draft to write to; it takes this file's name once the block ends and it is on disk."""
        draft = self.like(self.path.with_name(self.path.name + ".draft"))
        draft.remove()
        yield draft
        draft.flush()
        os.replace(draft.path, self.path)

    def exists(self) -> bool:
        """Whether the file is there."""
        return self.path.exists()

    @counted("disk")
    def flush(self) -> None:
        """Flush the file to disk."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Delete the file if it is there."""
        self.path.unlink(missing_ok=True)
