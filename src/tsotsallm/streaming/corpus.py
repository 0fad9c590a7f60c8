"""Text -> token windows for calibration and evaluation, drawn by a seed."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tsotsallm import hub
from tsotsallm.checkpoint.codec import TextCodec
from tsotsallm.errors import CorpusError
from tsotsallm.files import DATA_BYTES, lines, read_utf8

ENCODED_CHARACTERS = 100_000
TEXT_SUFFIXES = (".txt", ".md", ".text", ".raw")
HUB_DATASETS = {"allenai/c4": ("en", "train", "text"), "c4": ("en", "train", "text")}


@dataclass(frozen=True)
class Corpus:
    """Token windows of any lengths, and their source."""

    windows: tuple[Tensor, ...]         # each (tokens,) int64
    source: str
    bytes_scored: tuple[int, ...] | None = None     # UTF-8 bytes of the predicted tokens of each window
    learned: tuple[Tensor, ...] | None = None       # each (tokens,) bool: what training predicts; None means all

    @property
    def tokens(self) -> int:
        """Tokens of all windows together."""
        return sum(len(window) for window in self.windows)

    @property
    def starts(self) -> list[int]:
        """Where each window begins when all are joined, and where the last one ends."""
        return [0, *itertools.accumulate(len(window) for window in self.windows)]

    def take(self, places: Sequence[int]) -> Corpus:
        """The windows at some places, in the given order."""
        sizes, learned = self.bytes_scored, self.learned
        return Corpus(tuple(self.windows[place] for place in places), self.source,
                      None if sizes is None else tuple(sizes[place] for place in places),
                      None if learned is None else tuple(learned[place] for place in places))

    def parts(self, most_tokens: int) -> list[Corpus]:
        """Neighbouring windows in parts of at most `most_tokens` tokens, or of one longer window."""
        ends, tokens = [0], 0
        for index, window in enumerate(self.windows):
            if tokens and tokens + len(window) > most_tokens:
                ends.append(index)
                tokens = 0
            tokens += len(window)
        return [self.take(range(start, end)) for start, end in itertools.pairwise([*ends, len(self.windows)])]

    def first(self, windows: int | None) -> Corpus:
        """The first `windows` windows; None: all of them."""
        return self.take(range(len(self.windows))[:windows])

    def fingerprint(self) -> str:
        """The SHA-256 of the windows and of what is learned in them, in hexadecimal."""
        digest = hashlib.sha256()
        for window in self.windows:
            digest.update(len(window).to_bytes(4, "little"))
            digest.update(window.to(torch.int32).numpy().tobytes())
        for learned in self.learned or ():
            digest.update(learned.numpy().tobytes())
        return digest.hexdigest()


def read_text(source: str | Path, option: str = "") -> str:
    """The text of a file, or of all text files in a directory in the order of their names.

    Raises CorpusError where there is none, or it is empty or not UTF-8; the message names the `option` that gave it.
    """
    path = Path(source)
    given = f"{option} {source}".strip()
    try:
        files = [path]
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in TEXT_SUFFIXES
                           and file.name != "SOURCE.txt")
            if not files:
                raise CorpusError(f"{given} holds no text file ({', '.join(TEXT_SUFFIXES)})")
        text = "\n\n".join(read_utf8(file, CorpusError, DATA_BYTES) for file in files)
    except FileNotFoundError:
        raise CorpusError(f"{given} does not exist; give a UTF-8 text file or a directory of .txt files") from None
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise CorpusError(f"{given} is empty; give a text of at least one window")
    return text


def calibration(text: str, codec: TextCodec, *, windows: int, length: int, seed: int, source: str) -> Corpus:
    """Draw `windows` token windows of `length` tokens from a text, without overlap where it is long enough.

    Each begins with the prefix that the tokenizer puts before a text, usually BOS. Raises CorpusError where the text is
    shorter than one window.
    """
    ids = _encode(text, codec)
    body = length - len(codec.prefix)
    if body < 1 or len(ids) < body:
        raise CorpusError(f"{source} has {len(ids)} tokens, fewer than one window of {length}; give more text or a "
                          "smaller --window")
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    slots = len(ids) // body
    if slots >= windows:
        slack = len(ids) - slots * body
        offset = int(torch.randint(slack + 1, (1,), generator=generator))
        starts = [offset + body * slot for slot in sorted(torch.randperm(slots, generator=generator)[:windows].tolist())]
    else:
        starts = sorted(torch.randint(len(ids) - body + 1, (windows,), generator=generator).tolist())
    first = torch.tensor(codec.prefix, dtype=torch.int64)
    return Corpus(tuple(torch.cat([first, ids[start:start + body]]) for start in starts), source)


class Cutter(Protocol):
    """Anything that splits a text into tokens: the codec of a checkpoint, or a GGUF file in llama.cpp."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Tokens that are put before a text."""

    def encode_with_ends(self, text: str) -> tuple[Sequence[int], Sequence[int] | None]:
        """Tokens without prefix, and where in the text each ends, in characters; None where that is not known."""


def evaluation_windows(text: str, codec: Cutter, context: int, source: str) -> Corpus:
    """Protocol `windows`: the whole text in windows of `context` tokens without overlap, each with the prefix if any.

    Raises CorpusError where there are too few tokens to score.
    """
    ids, ends = codec.encode_with_ends(text)
    bos = list(codec.prefix)
    body = context - len(bos)
    if body < 1 or len(ids) + len(bos) < 2:
        raise CorpusError(f"{source} has {len(ids)} tokens: too few to score; give more text")
    windows, sizes = [], []
    for start in range(0, len(ids), body):
        part = [*bos, *ids[start:start + body]]
        if len(part) > 1:
            windows.append(torch.tensor(part))
            sizes.append(_predicted_bytes(text, ends, start, min(start + body, len(ids)), first_predicted=bool(bos)))
    return _evaluation_corpus(windows, sizes, source)


def _predicted_bytes(text: str, ends: Sequence[int] | None, start: int, end: int, *,
                     first_predicted: bool) -> int | None:
    """UTF-8 bytes of the predicted tokens from `start` to `end`; None where it is not known where tokens end.

    A token's text ends at its own offset and begins where the token before it ended, so that spaces in between count.
    """
    if ends is None:
        return None
    first = start if first_predicted else start + 1
    begin = ends[first - 1] if first else 0
    return len(text[begin:ends[end - 1] if end < len(ends) else len(text)].encode())


def _evaluation_corpus(windows: Sequence[Tensor], sizes: Sequence[int | None], source: str) -> Corpus:
    known = [size for size in sizes if size is not None]
    return Corpus(tuple(windows), source, tuple(known) if len(known) == len(windows) else None)


def evaluation_rows(text: str, codec: TextCodec, context: int, source: str) -> Corpus:
    """Protocol `rows`: each non-empty line by itself, with the prefix if any, cut at `context` tokens.

    Raises CorpusError where no line has two tokens or more.
    """
    windows, sizes = [], []
    for line in lines(text):
        if line.strip():
            ids, ends = codec.encode_with_ends(line)
            kept = ids[:context - len(codec.prefix)]
            if len(codec.prefix) + len(kept) > 1:
                windows.append(torch.tensor([*codec.prefix, *kept]))
                sizes.append(_predicted_bytes(line, ends, 0, len(kept), first_predicted=bool(codec.prefix)))
    if not windows:
        raise CorpusError(f"{source} has no line of two tokens or more")
    return _evaluation_corpus(windows, sizes, source)


def _encode(text: str, codec: TextCodec) -> Tensor:
    """Token ids of a text, (tokens,) int64, encoded in pieces of about 100,000 characters split at line breaks.

    A tokenizer uses about 200 bytes of memory for each character that it is given at once.
    """
    pieces, start = [], 0
    while start < len(text):
        end = min(start + ENCODED_CHARACTERS, len(text))
        if end < len(text) and (line_break := text.rfind("\n", start, end)) > start:
            end = line_break + 1
        pieces.append(torch.tensor(codec.encode(text[start:end], prefix=False), dtype=torch.int64))
        start = end
    return torch.cat(pieces)


def hub_text(repository: str, characters: int = 8_000_000) -> str:
    """At least `characters` characters of text from a hub data set, or all of it; raises CorpusError where it has none."""
    configuration, split, column = HUB_DATASETS.get(repository, (None, "train", "text"))
    texts, size = [], 0
    instead = "give a local text with --calibration FILE"
    for row in hub.rows(repository, configuration, split=split, kind=CorpusError, instead=instead):
        if not isinstance(row.get(column), str):
            raise CorpusError(f"the data set {repository} of the hub has no column {column!r} of text; {instead}")
        texts.append(row[column])
        size += len(row[column])
        if size >= characters:
            break
    return "\n\n".join(texts)
