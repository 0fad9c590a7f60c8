"""Files from strangers: only regular ones, of bounded size, decoded and parsed with errors of one line."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tsotsallm.errors import TsotsallmError

SIDE_FILE_BYTES = 16 << 20
"""Limit of a JSON file beside the weights: config, index, provenance, adapter config."""
TOKENIZER_BYTES = 200 << 20
"""Limit of tokenizer.json; the largest vocabularies in use take some 35 MB."""
MOST_DEPTH = 100
"""Nesting of objects and lists in JSON."""
QUOTED_CHARACTERS = 80
MESSAGE_CHARACTERS = 300
_HALVES = re.compile("[\ud800-\udfff]")


def quoted(value: object, most: int = QUOTED_CHARACTERS) -> str:
    """A value as a message quotes it: on one line, at most `most` characters."""
    try:
        text = repr(value)
    except Exception:  # repr of a strange object must not hide the error that is reported
        text = f"<{type(value).__name__}>"
    text = _HALVES.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= most else f"{text[:most - 3]}..."


def one_line(message: object, most: int = MESSAGE_CHARACTERS) -> str:
    """A library's message on one line, cut to at most `most` characters."""
    try:
        text = " ".join(str(message).split())
    except Exception:  # as above
        text = type(message).__name__
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in _HALVES.sub("\N{REPLACEMENT CHARACTER}", text))
    return text if len(text) <= most else f"{text[:most - 3]}..."


def regular_size(path: Path, kind: type[TsotsallmError]) -> int:
    """Bytes of a regular file, links followed; raises `kind` for a directory, device, FIFO or socket, FileNotFoundError for
    nothing at all."""
    try:
        facts = path.stat()
    except ValueError:
        raise kind(f"{quoted(str(path))} is no possible file name") from None
    if not stat.S_ISREG(facts.st_mode):
        names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise kind(f"{path} is {names.get(stat.S_IFMT(facts.st_mode), 'a device')}, where a regular file is expected; "
                   "replace it")
    return facts.st_size


def read_bytes(path: Path, kind: type[TsotsallmError], limit: int = SIDE_FILE_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; raises `kind` otherwise, FileNotFoundError where there is none.

    No more than the size that the file system reports is read, so that a file of /proc cannot block.
    """
    size = regular_size(path, kind)
    if size > limit:
        raise kind(f"{path} has {size} bytes, more than the {limit} that such a file may have; it is damaged, or something "
                   "else")
    if size == 0:
        return b""
    with path.open("rb") as file:
        return file.read(size)


def read_utf8(path: Path, kind: type[TsotsallmError], limit: int = SIDE_FILE_BYTES) -> str:
    """The text of a UTF-8 file, a byte-order mark left out; line ends stay as they are."""
    try:
        return read_bytes(path, kind, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first") from None


def read_json(path: Path, kind: type[TsotsallmError], limit: int = SIDE_FILE_BYTES) -> Any:
    """The content of a JSON file from a stranger; raises `kind` with what is wrong, FileNotFoundError where there is none."""
    return parse_json(read_utf8(path, kind, limit), str(path), kind)


def parse_json(text: str, where: str, kind: type[TsotsallmError]) -> Any:
    """JSON of bounded depth without halves of surrogate pairs; raises `kind`, naming `where`."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise kind(f"{where} nests objects and lists too deeply (more than {MOST_DEPTH}); it is damaged") from None
    except ValueError as error:
        raise kind(f"{where} is not valid JSON ({one_line(error)})") from None
    if _too_deep(content):
        raise kind(f"{where} nests objects and lists too deeply (more than {MOST_DEPTH}); it is damaged")
    if "\\u" in text and _has_half(content):
        raise kind(f"{where} holds half of a surrogate pair (such as \\ud800), which is no character; remove it")
    return content


def json_lines(text: str, where: str, kind: type[TsotsallmError]) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) of JSON lines: lines end at line feeds alone, as the format says, and empty ones are skipped.

    `str.splitlines` would also cut at U+2028 and its like, which a JSON string may hold.
    """
    for number, line in enumerate(text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{where}, line {number},", kind)


def _too_deep(content: Any) -> bool:
    level: list[Any] = [content]
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))] if isinstance(content, (dict, list)) else []
        if not level:
            return False
    return True


def _has_half(content: Any) -> bool:
    waiting: list[Any] = [content]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            if _HALVES.search(one):
                return True
        elif isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return False
