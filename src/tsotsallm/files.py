"""Untrusted files: only regular ones of bounded size are read, and errors of decoding and parsing fit on one line."""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from tsotsallm.errors import TsotsallmError

SIDE_FILE_BYTES = 16 << 20
"""Limit in bytes of a JSON file beside the weights: config, index, provenance, adapter config."""
TOKENIZER_BYTES = 200 << 20
"""Limit in bytes of tokenizer.json; the largest vocabularies in use take about 35 MB."""
DATA_BYTES = 4 << 30
"""Limit in bytes of a data set or text that is read whole."""
YAML_CHARACTERS, YAML_VALUES, YAML_NUMBER = 1 << 17, 100_000, 1 << 63
"""Limits of a recipe, a study or a task: YAML parses slowly, 100 kB in a second or two."""
MOST_DEPTH = 100
"""Deepest nesting of objects and lists in JSON and YAML."""
PSEUDO = ("/proc/", "/sys/")
"""Folders whose files report a size of 0, whatever they hold, and may block."""
Json: TypeAlias = Any
"""A value of JSON or YAML: whoever reads one knows its form, or checks it. (A recursive type would refuse dictionaries of
numbers where values of JSON are expected, since dictionaries are invariant.)"""
JsonObject: TypeAlias = dict[str, Json]

QUOTED_CHARACTERS = 80
MESSAGE_CHARACTERS = 300
CSV_CHARACTERS = 10_000_000
"""Limit of a CSV cell where the caller sets none."""
_HALVES = re.compile("[\ud800-\udfff]")


def quoted(value: object, most: int = QUOTED_CHARACTERS) -> str:
    """The repr of a value for a message: one line, at most `most` characters, halves of surrogate pairs replaced."""
    try:
        text = repr(value)
    except Exception:  # repr of a strange object must not hide the error that is reported
        text = f"<{type(value).__name__}>"
    text = _HALVES.sub("\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= most else f"{text[:most - 3]}..."


def one_line(message: object, most: int = MESSAGE_CHARACTERS) -> str:
    """A library's message on one line, cut to at most `most` characters, with characters that do not print replaced."""
    try:
        text = " ".join(str(message).split())
    except Exception:  # as above
        text = type(message).__name__
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:10 * most])
    return text if len(text) <= most else f"{text[:most - 3]}..."


def regular_size(path: Path, kind: type[TsotsallmError]) -> int:
    """The size in bytes of a regular file, links followed.

    Raises `kind` for a directory, device, FIFO or socket and for whatever the file system refuses, FileNotFoundError where
    there is no such file.
    """
    try:
        facts = path.stat()
    except ValueError:
        raise kind(f"{quoted(str(path))} is not a possible file name") from None
    except FileNotFoundError:
        raise
    except OSError as error:            # a loop of links, a name that is too long, a folder that may not be entered
        raise kind(f"{quoted(str(path), MESSAGE_CHARACTERS)} cannot be read ({error.strerror}); replace it") from None
    if not stat.S_ISREG(facts.st_mode):
        names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise kind(f"{path} is {names.get(stat.S_IFMT(facts.st_mode), 'a device')}, where a regular file is expected; "
                   "replace it")
    if facts.st_size == 0 and os.path.realpath(path).startswith(PSEUDO):
        raise kind(f"{path} is a file of the kernel, where a file on disk is expected; replace it")
    return facts.st_size


def require_new(path: Path, kind: type[TsotsallmError], remedy: str = "choose another name, or delete it first") -> None:
    """Raise `kind` where an output exists already."""
    if path.exists():
        raise kind(f"{path} exists already; {remedy}")


def read_bytes(path: Path, kind: type[TsotsallmError], limit: int = SIDE_FILE_BYTES) -> bytes:
    """The bytes of a regular file of at most `limit` bytes; raises `kind` otherwise, FileNotFoundError where there is none.

    Reads no more than the size that the file system reports, so that a file of /proc cannot block.
    """
    size = regular_size(path, kind)
    if size > limit:
        raise kind(f"{path} has {size} bytes, more than the {limit} that such a file may have; it is damaged, or a "
                   "file of another kind")
    if size == 0:
        return b""
    try:
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise kind(f"{path} cannot be read ({error.strerror}); check its permissions and the disk") from None


def read_utf8(path: Path, kind: type[TsotsallmError], limit: int = SIDE_FILE_BYTES) -> str:
    """The text of a UTF-8 file without its byte-order mark; line ends stay as they are. Raises like `read_bytes`."""
    content = read_bytes(path, kind, limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise kind(f"{path}, line {line} is not UTF-8 text ({error.reason} at byte {error.start}); convert it "
                   "first") from None


def read_json(path: Path, kind: type[TsotsallmError], limit: int = SIDE_FILE_BYTES) -> Json:
    """The content of a JSON file; raises `kind` with the fault, FileNotFoundError where there is no such file."""
    return parse_json(read_utf8(path, kind, limit), str(path), kind)


def parse_json(text: str, where: str, kind: type[TsotsallmError], *, unique: bool = False) -> Json:
    """Parse JSON of bounded depth and without halves of surrogate pairs; raises `kind`, naming `where`.

    With `unique`, an object with a duplicate name is refused, since readers differ in which of the two they use.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise kind(f"{where} nests objects and lists too deeply (more than {MOST_DEPTH}); it is damaged") from None
    except ValueError as error:
        raise kind(f"{where} is not valid JSON ({one_line(error)})") from None
    if _too_deep(content):
        raise kind(f"{where} nests objects and lists too deeply (more than {MOST_DEPTH}); it is damaged")
    if "\\u" in text and _has_half(content):
        raise kind(f"{where} holds half of a surrogate pair (such as \\ud800), which is not a character; remove it")
    return content


def parse_yaml(text: str, where: str, kind: type[TsotsallmError]) -> Json:
    """Parse YAML of bounded size, depth and numbers, aliases counted each time they occur; raises `kind`, naming `where`."""
    import yaml

    if len(text) > YAML_CHARACTERS:
        raise kind(f"{where} has {len(text)} characters, more than the {YAML_CHARACTERS} that such a file may have")
    try:
        content = yaml.safe_load(text)
    except RecursionError:
        raise kind(f"{where} nests its values too deeply (more than {MOST_DEPTH}); it is damaged") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:   # the last four from odd scalars
        raise kind(f"{where} is not valid YAML ({one_line(error)})") from None
    count, level = 0, [content]
    for _ in range(MOST_DEPTH):
        count += len(level)
        if count > YAML_VALUES:
            break
        for value in level:
            if not isinstance(value, (str, int, float, dict, list, type(None))):
                raise kind(f"{where} holds {quoted(value)}, a {type(value).__name__}; write it in quotes if it is text")
            if isinstance(value, int) and abs(value) >= YAML_NUMBER:
                raise kind(f"{where} holds the number {quoted(value, 30)}, which is too large")
        level = [inner for outer in level if isinstance(outer, (dict, list))
                 for inner in ((*outer, *outer.values()) if isinstance(outer, dict) else outer)]
        if not level:
            if "\\" in text and _has_half(content):
                raise kind(f"{where} holds half of a surrogate pair (such as \\ud800), which is not a character; remove it")
            return content
    raise kind(f"{where} holds more than {YAML_VALUES} values, or nests them more than {MOST_DEPTH} deep; it is damaged")


def lines(text: str) -> list[str]:
    """The lines of a text, which end only at \\n or \\r\\n.

    `str.splitlines` would also split at U+2028 and the like, which occur in ordinary text.
    """
    found = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").split("\n")
    return [line.removesuffix("\r") for line in (found if found[-1] else found[:-1])]


def utf8_lines(file: Iterable[bytes], where: str, kind: type[TsotsallmError]) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of an open UTF-8 file of any size, split as `lines` does; raises `kind` with the line."""
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise kind(f"{where}, line {number} is not UTF-8 text ({error.reason}); convert it first") from None
        yield number, text.removesuffix("\n").removesuffix("\r")


def json_lines(text: str, where: str, kind: type[TsotsallmError]) -> Iterator[tuple[int, Json]]:
    """Yield (line number, value) of JSON lines, empty ones skipped; raises `kind` with the line."""
    for number, line in enumerate(lines(text), 1):
        if line.strip():
            yield number, parse_json(line, f"{where}, line {number},", kind)


def csv_rows(lines: Iterable[str], where: str, kind: type[TsotsallmError], *, delimiter: str = ",",
             longest: int = CSV_CHARACTERS) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of its last line, cells) for every row of CSV, empty rows included; raises `kind` with the line.

    A cell has at most `longest` characters. The library's own limit is global to the process and any reader of CSV may
    change it, so it is set again for each row, and every cell is measured here.
    """
    rows = csv.reader(lines, delimiter=delimiter)
    while True:
        csv.field_size_limit(CSV_CHARACTERS)
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise kind(f"{where}, line {rows.line_num} cannot be read as CSV ({one_line(error)}); is a quotation mark never "
                       "closed?") from None
        if max(map(len, row), default=0) > longest:
            raise kind(f"{where}, line {rows.line_num} has a cell of {max(map(len, row))} characters, more than the "
                       f"{longest} that are read; close its quotation mark, or split the cell")
        yield rows.line_num, row


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{quoted(twice)} occurs twice")
    return found


def _too_deep(content: object) -> bool:
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(MOST_DEPTH):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def _has_half(content: object) -> bool:
    waiting: list[object] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            if _HALVES.search(value):
                return True
        elif isinstance(value, dict):
            waiting += value.keys()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return False
