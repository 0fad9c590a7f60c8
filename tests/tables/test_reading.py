"""Tables in any encoding and form; what cannot be read says what, where and what to do."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.conftest import shared
from tsotsallm.errors import TablesError
from tsotsallm.tables.reading import find_tables, read_table, separators
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
    (b"\n\n", "is empty"), (b'"a' + b"x" * 200_000 + b'",b\n', "has a cell of 200001 characters, .*quotation mark")])
def test_what_is_no_table_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TablesError, match=message):
        read_table(table(tmp_path, content))


def test_a_cell_without_end_is_no_table_whatever_others_allow(tmp_path: Path) -> None:
    """Other libraries raise the limit that csv has for the whole process."""
    before = csv.field_size_limit(1 << 30)
    try:
        with pytest.raises(TablesError, match="close its quotation mark"):
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
        assert separators(text)[0] == mark
    numbered = read_table(table(tmp_path, b",0,1\n0,Rome,Italy\n1,Paris,France\n"))
    assert (numbered.rows, numbered.first_row) == ((("Rome", "Italy"), ("Paris", "France")), 0)


@pytest.mark.parametrize(("text", "first", "mark"), [
    ("Date;Visitors;Guide\nApril 15, 2023;4028;Smith, John\nMay 3, 2023;512;Doe, Jane\n",
     ("April 15, 2023", "4028", "Smith, John"), ";"),
    ("April 15, 2023;4028;Smith, John, Jr., Dr.\nMay 3, 2023;512;Doe, Jane, Jr., Dr.\n",
     ("April 15, 2023", "4028", "Smith, John, Jr., Dr."), ";"),
    ("April 15, 2023\t4028\nMay 3, 2023\t512\n", ("April 15, 2023", "4028"), "\t"),
    ("April 15, 2023|4028\nMay 3, 2023|512\n", ("April 15, 2023", "4028"), "|"),
    ("1,5;2,5\n3,5;4,5\n", ("1,5", "2,5"), ";"), ("x;y\n1,5;2,5\n3,5;4,5\n", ("1,5", "2,5"), ";"),
    ("1,5;2,5;3,5;4,5;5,5\n1,5;2,5;3,5;4,5;5,5\n", ("1,5", "2,5", "3,5", "4,5", "5,5"), ";"),
    ("1.234,56;7.890,12\n1.234,56;7.890,12\n", ("1.234,56", "7.890,12"), ";"),
    ("1,234;5,678\n1,234;5,678\n", ("1,234", "5,678"), ";"), ("1,234\t5,678\n1,234\t5,678\n", ("1,234", "5,678"), "\t"),
    ('"1,234","5,678"\n"1,234","5,678"\n', ("1,234", "5,678"), ","),
    ("id,name,tags\n1,Rome,x; y; z\n2,Oslo,v; w; u\n", ("1", "Rome", "x; y; z"), ","),
    ("1,Rome,x; y; z\n2,Oslo,v; w; u\n", ("1", "Rome", "x; y; z"), ","),
    ("name;notes\nRome;\"a,b,c\"\nOslo;\"d,e,f\"\n", ("Rome", "a,b,c"), ";"),
    ("name, town\nA, Rome\nB, Oslo\n", ("A", "Rome"), ","), ("a;b;c\n1;;\n;2;\n", ("1", "", ""), ";"),
    ("town,note\nRome,\"Smith; Doe\"\nOslo,\"a; b; c\"\n", ("Rome", "Smith; Doe"), ","),
    ("url|name\nhttp://x/a,b;c|A\nhttp://x/d,e;f|B\n", ("http://x/a,b;c", "A"), "|")])
def test_the_separator_is_what_cuts_lines_and_header_alike_and_no_cell(tmp_path: Path, text: str, first: tuple[str, ...],
                                                                       mark: str) -> None:
    found = read_table(table(tmp_path, text.encode()))
    assert found.rows[0] == first
    assert {len(row) for row in found.rows} == {len(first)}
    assert (f"cells are separated by {mark!r}: guessed" in " ".join(found.notes)) == (mark != ",")


@pytest.mark.parametrize("text", [
    "date\nApril 15, 2023\nMay 3, 2024\n", "April 15, 2023\nMay 3, 2024\n", "number\n1,5\n2,5\n",
    "city\nParis, Texas\nOslo, Norway\n", "day\nSaturday, April 15, 2023\nMonday, May 3, 2024\n",
    "sum\n1,234,567\n7,654,321\n"])
def test_commas_inside_one_column_cut_nothing(tmp_path: Path, text: str) -> None:
    found = read_table(table(tmp_path, text.encode()))
    assert found.rows[-2:] == tuple((line,) for line in text.splitlines()[-2:])
    assert "one column" in found.notes[0]


@pytest.mark.parametrize(("line", "mark"), [
    ("sep=;", ";"), ('"sep=;"', ";"), ("sep=,", ","), ("sep=\t", "\t"), ("SEP=\\t", "\t"), ("sep=;;", ";"), ("sep=:", ":"),
    ("\ufeffsep=|\r", "|")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le"])
def test_a_first_line_that_names_the_separator_is_no_header(tmp_path: Path, line: str, mark: str, encoding: str) -> None:
    rows = [("name", "town"), ("A, x", "Rome"), ("B", "Oslo")]
    text = "\n".join([line, *(mark.join(f'"{cell}"' for cell in row) for row in rows), "C"])
    found = read_table(table(tmp_path, text.encode(encoding)))
    assert (found.header, found.rows, found.first_row) == (rows[0], (*rows[1:], ("C", "")), 1)
    assert f"cells are separated by {mark!r}, as the first line says" in found.notes
    assert "1 of 4 lines are longer or shorter than the first (5): filled up with empty cells" in found.notes


def test_a_header_that_only_looks_like_a_separator_line(tmp_path: Path) -> None:
    assert read_table(table(tmp_path, b"sep=ration,town\nx,Rome\n")).header == ("sep=ration", "town")


@pytest.mark.parametrize("content", [
    "name,town\nZo\0e,Rome\n", "name,town\n\0\0\0Zoe,Rome\n", "n\0,town\nZoë,Rome\n",
    "name,town\n" + "Zo\0e,Rome!\n" * 3 + "x,y\n" * 100])
def test_a_few_null_bytes_are_left_out_and_noted(tmp_path: Path, content: str) -> None:
    found = read_table(table(tmp_path, content.encode()))
    assert found.rows == tuple(tuple(line.split(",")) for line in content.replace("\0", "").splitlines()[1:])
    count = content.count("\0")
    assert found.notes == (f"{count} null character{'s' * (count > 1)} left out",)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [
    "名前,町\n山田太郎という人,東京都\n鈴木一郎という人,大阪府\n", "имя,город\nЗоя,Рим\n", "name,town\nZoë,Rome",
    "a,b\n" * 5000, "name,town\nA\u2028B,Rome\n"])
def test_utf_16_without_a_mark_in_any_script(tmp_path: Path, encoding: str, text: str) -> None:
    found = read_table(table(tmp_path, text.encode(encoding)))
    assert (found.header, *found.rows) == tuple(tuple(line.split(",")) for line in text.strip().split("\n"))
    assert found.notes[0] == f"{encoding.upper()} without a mark"


def test_nulls_at_places_of_one_kind_do_not_make_utf_16(tmp_path: Path) -> None:
    """Lines of even length with a null byte at the same place: the old rule made Chinese of it."""
    content = b"ab,cdef\0,gh\n" * 40
    with pytest.raises(TablesError, match="null bytes and is not text"):
        read_table(table(tmp_path, content))
    assert read_table(table(tmp_path, content + b"ab,cdefg,gh\n" * 4000)).rows[-1] == ("ab", "cdefg", "gh")


def test_utf_32_by_its_mark(tmp_path: Path) -> None:
    assert read_table(table(tmp_path, "name,town\nZoë,Rome\n".encode("utf-32"))).rows == (("Zoë", "Rome"),)


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_lines(tmp_path: Path, mark: str) -> None:
    found = read_table(table(tmp_path, f"name,town\r\nA{mark}B,Rome\r\n".encode()))
    assert (found.header, found.rows) == (("name", "town"), ((f"A{mark}B", "Rome"),))


def test_what_is_uncertain_is_said(tmp_path: Path) -> None:
    found = read_table(table(tmp_path, b"a,b;c\nd,e;f\ng,h;i\n"))
    assert any("is nearly as likely" in note for note in found.notes)


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


def test_a_table_has_no_more_columns_than_people_name(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "1," * 1000 + "\n")
    with pytest.raises(TablesError, match="1001 columns"):
        read_table(path)
