"""Files from strangers: what is no regular file, too large, too deep or no text is refused at once, in one line."""

from __future__ import annotations

import csv
import io
import os
import time
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.texts import YAML_TRICKS
from tsotsallm.errors import RecipeError
from tsotsallm.files import (
    csv_rows,
    json_lines,
    lines,
    one_line,
    parse_json,
    parse_yaml,
    quoted,
    read_bytes,
    read_json,
    read_utf8,
    utf8_lines,
)

NO_FILES = ("a directory", "a FIFO", "/dev/zero", "/dev/urandom", "/proc/kmsg", "/proc/self/status",
            "a link to itself", "a name that is too long", "\0")


@pytest.mark.parametrize("kind", NO_FILES)
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if kind == "a directory":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a link to itself":
        path.symlink_to("x")
    elif kind == "a name that is too long":
        path = tmp_path / ("x" * 1000)
    elif kind == "\0":
        path = tmp_path / "a\0b"
    else:
        path.symlink_to(kind)
    began = time.monotonic()
    with pytest.raises(RecipeError) as found:
        read_bytes(path, RecipeError)
    assert time.monotonic() - began < 1
    assert "\n" not in str(found.value)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "nothing", RecipeError)


def test_files_are_read_up_to_a_limit_and_links_to_files_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes("\ufeffé\r\n".encode())
    (tmp_path / "link").symlink_to("file")
    assert read_utf8(tmp_path / "link", RecipeError) == "é\r\n"
    with pytest.raises(RecipeError, match="more than the 3"):
        read_bytes(tmp_path / "file", RecipeError, 3)
    (tmp_path / "latin").write_bytes(b"a\n\xe9")
    with pytest.raises(RecipeError, match="line 2 is not UTF-8"):
        read_utf8(tmp_path / "latin", RecipeError)


@pytest.mark.parametrize(("text", "value"), [
    ("- a: 1", [{"a": 1}]), ("{a: [1, 2.5, true, null, 'x']}", {"a": [1, 2.5, True, None, "x"]}), ("", None),
    ("- &a [1]\n- *a", [[1], [1]]), ("a: \"2001-01-01\"", {"a": "2001-01-01"}), ("1: b", {1: "b"}), ('a: "\\U0001F600"',
                                                                                                     {"a": "\U0001f600"})])
def test_yaml_is_read_as_it_is(text: str, value: Any) -> None:
    assert parse_yaml(text, "x.yaml", RecipeError) == value


@pytest.mark.parametrize("text", [
    *(trick.decode() for trick in YAML_TRICKS if trick not in (b"<<: [{a: 1}]", b"0o7", b"0x", b"1_000", b"1:60", b".inf",
                                                               b"-.NaN", b"~")),
    "[" * 100_000, "- " * 100_000, '{"a":' * 100_000, "[" * 150 + "]" * 150, "x" * 2_000_000, "[x,x]" * 1000, "a: \0",
    '"\\ud800"', "\ud800", "{[a]: 1}", "[" + "1," * 20_000 + "*a]", "a: 9223372036854775808", "a: 1" + "0" * 5000,
    "a: 2001-01-01",
    "2001-01-01: a", "!!set {a}", "!!binary aGVsbG8="])
def test_yaml_that_is_none_or_blows_up_is_refused(text: str) -> None:
    began = time.monotonic()
    with pytest.raises(RecipeError, match=r"^x\.yaml ") as found:
        parse_yaml(text, "x.yaml", RecipeError)
    assert time.monotonic() - began < 15
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 101 + "]" * 101, '"\\ud800"', '{"\\udfff": 1}',
                                  "{", "",
                                  "1" + "0" * 5000])
def test_json_that_is_none_or_too_deep_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"^x\.json ") as found:
        parse_json(text, "x.json", RecipeError)
    assert len(str(found.value)) < 500


def test_a_name_twice_is_refused_where_that_is_asked_for(tmp_path: Path) -> None:
    assert parse_json('{"a": 1, "a": 2}', "x", RecipeError) == {"a": 2}
    with pytest.raises(RecipeError, match="'a' occurs twice"):
        parse_json('{"b": {"a": 1, "a": 2}}', "x", RecipeError, unique=True)
    (tmp_path / "x.json").write_text('\ufeff{"a": "\u2028"}', "utf-8")
    assert read_json(tmp_path / "x.json", RecipeError) == {"a": "\u2028"}


def test_lines_of_json_end_at_line_feeds_alone() -> None:
    text = '\ufeff{"a": "\u2028\u2029\x85"}\r\n\n[2]\n'
    assert list(json_lines(text, "x", RecipeError)) == [(1, {"a": "\u2028\u2029\x85"}), (3, [2])]
    with pytest.raises(RecipeError, match=r"x, line 2, is not valid JSON"):
        list(json_lines("1\n{", "x", RecipeError))


def test_lines_of_text_end_at_line_feeds_alone() -> None:
    inside = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    text = f"\ufeff{inside}\r\n\n{inside}\n"
    assert lines(text) == [inside, "", inside]
    assert lines("") == []
    assert lines("\n") == [""]
    assert lines("a") == lines("a\n") == ["a"]
    assert list(utf8_lines(io.BytesIO(text.encode()), "x", RecipeError)) == [(1, inside), (2, ""), (3, inside)]
    with pytest.raises(RecipeError, match="x, line 2 is not UTF-8 text"):
        list(utf8_lines(io.BytesIO(b"a\n\xff"), "x", RecipeError))


@pytest.mark.parametrize("limit", [10, 1 << 30])
def test_rows_of_csv_do_not_depend_on_what_others_allow(limit: int) -> None:
    """The limit of Python's reader holds for the whole process, and other libraries change it."""
    before = csv.field_size_limit()
    try:
        read = csv_rows(['a,"b\n', 'c"\n', "\n", "d" * 100 + "\n", "e" * 101], "x.csv", RecipeError, longest=100)
        for expected in ((2, ["a", "b\nc"]), (3, []), (4, ["d" * 100])):
            csv.field_size_limit(limit)
            assert next(read) == expected
        with pytest.raises(RecipeError, match=r"x\.csv, line 5 has a cell of 101 characters"):
            next(read)
    finally:
        csv.field_size_limit(before)
    with pytest.raises(RecipeError, match=r"x\.csv, line 1 cannot be read as CSV"):
        next(csv_rows(["a\rb"], "x.csv", RecipeError))


def test_messages_are_short_and_printable() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise ValueError

    assert quoted("a" * 100) == "'" + "a" * 76 + "..."
    assert quoted(Odd()) == "<Odd>"
    assert quoted("\ud800\n") == "'\\ud800\\n'"
    assert one_line("a\n  b\x1b[3\u2028c\ud800") == "a b\N{REPLACEMENT CHARACTER}[3 c\N{REPLACEMENT CHARACTER}"
    assert len(one_line("x" * 10_000)) == 300
