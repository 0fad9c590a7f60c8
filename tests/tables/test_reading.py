"""Tables in any encoding and form; what cannot be read says what, where and what to do."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.conftest import shared
from tsotsallm.errors import TablesError
from tsotsallm.tables.reading import find_tables, read_table, separator
from tsotsallm.tables.words import is_literal, normalise, same_literal, similarity, trigrams


def table(folder: Path, content: bytes, name: str = "one.csv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("encoding", "note"), [("utf-8", False), ("utf-8-sig", False), ("utf-16", False),
                                                ("utf-16-le", True), ("utf-16-be", True), ("cp1252", True)])
def test_encodings(tmp_path: Path, encoding: str, note: bool) -> None:
    found = read_table(table(tmp_path, "name,town\nZoë,Besançon\nÉric,Orléans\n".encode(encoding)))
    assert found.header == ("name", "town")
    assert found.rows == (("Zoë", "Besançon"), ("Éric", "Orléans"))
    assert (len(found.notes) > 0) == note
    assert found.first_row == 1


@pytest.mark.parametrize(("content", "message"), [
    (b"name,town\nZo\xeb,Bes\x81on\n", "line 2: byte 0xeb is not UTF-8, and 0x81"),
    (b"\xff\xfea\x00\x00", "begins like utf-16"), (b"a\0\0\0b,c\0\0\0", "null bytes"), (b"", "is empty"),
    (b"\n\n", "is empty"), (b'"a' + b"x" * 200_000 + b'",b\n', "is no table")])
def test_what_is_no_table_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TablesError, match=message):
        read_table(table(tmp_path, content))


def test_a_cell_without_end_is_no_table_whatever_others_allow(tmp_path: Path) -> None:
    """Other libraries raise the limit that csv has for the whole process."""
    before = csv.field_size_limit(1 << 30)
    try:
        with pytest.raises(TablesError, match="never closed"):
            read_table(table(tmp_path, b'"a' + b"x" * 200_000 + b'",b\n'))
    finally:
        csv.field_size_limit(before)


def test_ragged_rows_are_filled_up_and_noted(tmp_path: Path) -> None:
    found = read_table(table(tmp_path, b"a,b,c\n1 x,2 x\nu,v,w,z\n"))
    assert found.rows == (("1 x", "2 x", "", ""), ("u", "v", "w", "z"))
    assert "2 of 3 lines are longer or shorter than the first (2, 3)" in found.notes[0]


def test_headers_separators_and_numbers(tmp_path: Path) -> None:
    assert read_table(table(tmp_path, b"Rome,2873000\nParis,2161000\n")).first_row == 0
    assert read_table(table(tmp_path, b"city;people\nRome;2873000\n")).rows == (("Rome", "2873000"),)
    for text, mark in (("a,b\nc,d", ","), ("a\tb\nc\td", "\t"), ("a|b|c\nd|e|f", "|"), ("one column\nonly", ",")):
        assert separator(text) == mark
    numbered = read_table(table(tmp_path, b",0,1\n0,Rome,Italy\n1,Paris,France\n"))
    assert (numbered.rows, numbered.first_row) == ((("Rome", "Italy"), ("Paris", "France")), 0)


def test_columns_of_gold_are_kept_apart(tmp_path: Path) -> None:
    found = read_table(table(tmp_path, b"a,a__URI,b\nRome,http://x/Rome,1 x\nOslo,,2 x\n"))
    assert found.header == ("a", "b")
    assert found.gold == ((1, 0, "http://x/Rome"),)


def test_tables_of_folders(tmp_path: Path) -> None:
    one = table(tmp_path, b"a\nb\n", "b.csv")
    table(tmp_path, b"a\nb\n", "a.tsv")
    assert [path.stem for path in find_tables([tmp_path])] == ["a", "b"]
    with pytest.raises(TablesError, match="2 names belong to two tables each"):
        find_tables([tmp_path, one, tmp_path / "a.tsv"])
    with pytest.raises(TablesError, match="does not exist"):
        find_tables([tmp_path / "none.csv"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(TablesError, match="holds no tables"):
        find_tables([tmp_path / "empty"])


def test_words() -> None:
    assert normalise("  École d'Été -- No.3 ") == "ecole d ete no 3"
    assert normalise("Straße") == normalise("STRASSE")
    assert trigrams("abab") == ["aba", "bab"]
    literals = ["12", "-3.5", "1 234,5", "42.56 km", "15%", "$3", "1.2e5", "2019-05-03", "3/4/2001", "0.5 ± 0.1"]
    assert [is_literal(text) for text in literals] == [True] * len(literals)
    assert not any(is_literal(text) for text in ("12 Mill Lane", "Henry VIII", "7 Up drinks", "B2B", ""))
    assert same_literal("1,234", "1234.0")
    assert same_literal("1969", "1969-07-20T00:00:00Z")
    assert not same_literal("1234", "1334")


def test_similarity_knows_slips_order_initials_and_parts() -> None:
    assert similarity("gandhi", "gandhi") == 1
    assert similarity("gnadhi", "gandhi") == pytest.approx(1 - 1 / 6)
    assert similarity("kalson ara", "ara kalson") == pytest.approx(0.97)
    assert similarity("a kalson", "ara kalson") >= 0.9
    assert similarity("ferrari", "scuderia ferrari") == pytest.approx(0.6 + 0.25 * 7 / 16)
    assert similarity("rome", "oslo") < 0.5


def test_every_table_at_hand_can_be_read() -> None:
    folders = [shared("data", "semtab", *parts) for parts in (
        ("HardTablesR1-valid", "tables"), ("toughtables-dbpedia",), ("TSOTSATable", "tables"))]
    assert sum(bool(read_table(path).rows) for path in find_tables(folders)) == 479
