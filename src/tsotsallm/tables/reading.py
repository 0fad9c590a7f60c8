"""Read tables as people have them: in any encoding, with any separator, with ragged rows, with or without a header."""

from __future__ import annotations

import codecs
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tsotsallm.errors import TablesError
from tsotsallm.files import DATA_BYTES, csv_rows, read_bytes
from tsotsallm.tables.words import is_literal

SEPARATORS = ",;\t|"
ONE_COLUMN = "\x1f"
"""The separator of a table of one column whose cells hold separators: the unit separator, which nobody writes."""
SAMPLE_LINES, SAMPLE_CHARACTERS = 60, 1 << 18
CLOSE = 0.8
"""Share of the best separator's likelihood from which another separator is mentioned."""
FEW_NULLS, LEAST_NULLS = 3, 0.02
"""Null bytes that are left out of any text; and the least share of characters that have a null byte in UTF-16: at least the
separators and line feeds do, whatever the script."""
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
GOLD = "__URI"
"""End of the name of a column that holds the right entities of another column (ToughTables): kept apart from the table."""
LONGEST_CELL = 100_000
"""Most characters of a cell."""
MOST_COLUMNS = 1000
"""Most columns of a table; rows shorter than the widest are filled up."""
_NUMBERED = re.compile(r"\d+")
_SEPARATOR_LINE = re.compile(r'"?sep=(\\t|[^"\r\n])\1*"?\r?(?:\n|\Z)', re.IGNORECASE)
"""Excel's first line in a file with a separator other than the usual one."""
_DAY = r"[^\W\d]{3,12}\.? \d{1,2}(?:st|nd|rd|th)?"
_COMMA_DATE = re.compile(rf"\b(?:[^\W\d]+day, )?{_DAY}, ?\d{{4}}\b|\b[^\W\d]+day, {_DAY}\b")
"""April 15, 2023; Saturday, April 15."""
_COMMA_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_TIGHT_COMMA = re.compile(r"(?<!\d),(?=\S)|(?<=\S),(?=[^\s\d])")


@dataclass(frozen=True)
class Table:
    """Rows of a table, each as long as the header.

    `first_row` is the number of the first row (1 below a header, as SemTab counts), `columns` are the columns' numbers.
    """

    name: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    first_row: int
    columns: tuple[int, ...]
    notes: tuple[str, ...] = ()
    gold: tuple[tuple[int, int, str], ...] = ()        # (row, column, entities), of columns that end in __URI

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.header)


def find_tables(sources: Sequence[str | Path]) -> list[Path]:
    """The tables of files and folders, sorted by name.

    Raises TablesError where a source does not exist or holds no tables, or where two tables have the same name, by which
    submissions identify them.
    """
    tables: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise TablesError(f"{path} holds no tables; they end in {', '.join(SUFFIXES)}")
            tables += inside
        elif path.is_file():
            tables.append(path)
        else:
            raise TablesError(f"{path} does not exist; give tables as files or folders, or 'embedded'")
    twice = [name for name, count in Counter(path.stem for path in tables).items() if count > 1]
    if twice:
        raise TablesError(f"{len(twice)} names belong to two tables each, such as {twice[0]}; submissions identify tables "
                          "by name, so rename one, or annotate them into two folders")
    return sorted(tables, key=lambda path: path.stem)


def decode(content: bytes, name: str) -> tuple[str, list[str]]:
    """(text of a table, notes): UTF-8, UTF-16 or UTF-32 by its byte-order mark or its content, else Windows-1252.

    Raises TablesError where the content is none of them.
    """
    notes: list[str] = []
    marked = next((encoding for mark, encoding in MARKS if content.startswith(mark)), None)
    encoding = marked or _utf16(content) or "utf-8"
    if encoding.startswith("utf-16-"):
        notes.append(f"{encoding.upper()} without a mark")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        if marked is not None:
            raise TablesError(f"{name} begins like {encoding}, but it is not ({error.reason} at byte {error.start}); save "
                              "it again as UTF-8") from None
        text = _windows(content, name, error.start)
        notes.append("not UTF-8: read as Windows-1252 (Latin-1)")
    if nulls := text.count("\0"):
        if nulls > max(FEW_NULLS, len(text) // 100):
            raise TablesError(f"{name} holds null bytes and is not text; save the table as CSV in UTF-8")
        notes.append(f"{nulls} null character{'s' * (nulls > 1)} left out")
    return text.replace("\0", ""), notes


def _utf16(content: bytes) -> str | None:
    """The encoding where the content is UTF-16 without a byte-order mark, else None.

    It is where many null bytes stand at odd places and few at even ones, or the reverse, and where line feeds are characters
    of their own; a few null bytes in another encoding do not make it UTF-16.
    """
    sample = content[:1 << 16]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    for encoding, here, there in (("utf-16-le", odd, even), ("utf-16-be", even, odd)):
        if here > FEW_NULLS and here >= LEAST_NULLS * (len(sample) // 2) and there <= here / 4:
            try:
                text = content.decode(encoding)
            except UnicodeDecodeError:
                continue
            if text.count("\n") >= content.count(b"\n") / 2 and (b"\n" in content or here > len(sample) / 4):
                return encoding
    return None


def _windows(content: bytes, name: str, place: int) -> str:
    try:
        return content.decode("cp1252")
    except UnicodeDecodeError as error:
        line = content[:place].count(b"\n") + 1
        raise TablesError(f"{name}, line {line}: byte 0x{content[place]:02x} is not UTF-8, and 0x{content[error.start]:02x} "
                          f"at byte {error.start} is not Windows-1252 either; save the table again as UTF-8") from None


def read_table(path: Path) -> Table:
    """Read a table from a file; rows shorter than the widest are filled up, which is noted, as is everything guessed.

    The first line is the header unless it contains a number or a date; a first line `sep=;` only names the separator. A
    table that was written with numbered rows and columns (an empty cell first, then 0, 1, 2, ...) is read without the
    numbers. Raises TablesError where the file is missing, empty, too wide or not text.
    """
    try:
        content = read_bytes(path, TablesError, DATA_BYTES)
    except FileNotFoundError:
        raise TablesError(f"{path.name} no longer exists; keep tables in place until they are annotated") from None
    text, notes = decode(content, path.name)
    named = _SEPARATOR_LINE.match(text)
    if named is not None:
        mark = "\t" if named[1] == "\\t" else named[1]
        text = text[named.end():]
        notes.append(f"cells are separated by {mark!r}, as the first line says")
    else:
        mark, other = separators(text)
        if mark == ONE_COLUMN:
            notes.append("one column: commas and similar marks stand inside its cells (guessed)")
        elif mark != _usual(path) or other:
            doubt = f", and {other!r} is nearly as likely" if other else ""
            notes.append(f"cells are separated by {mark!r}: guessed{doubt}")
    first = 1 if named is None else 2
    lines = [row for _, row in csv_rows(io.StringIO(text, newline=""), path.name, TablesError, delimiter=mark,
                                        longest=LONGEST_CELL)]
    while lines and not any(cell.strip() for cell in lines[-1]):
        lines.pop()
    if not lines:
        raise TablesError(f"{path.name} is empty; a table has at least one row")
    width = max(map(len, lines))
    if width > MOST_COLUMNS:
        raise TablesError(f"{path.name} has {width} columns; a table takes at most {MOST_COLUMNS}: leave out those that "
                          "name nothing")
    ragged = [number for number, line in enumerate(lines, first) if len(line) != len(lines[0])]
    if ragged:
        few = ", ".join(map(str, ragged[:5])) + (", ..." if len(ragged) > 5 else "")
        notes.append(f"{len(ragged)} of {len(lines)} lines are longer or shorter than the first ({few}): filled up with "
                     "empty cells")
    full = [tuple(cell.strip() for cell in line) + ("",) * (width - len(line)) for line in lines]
    if _numbered(full):
        notes.append("numbered rows and columns: read without the numbers")
        return Table(path.stem, ("",) * (width - 1), tuple(line[1:] for line in full[1:]), 0, tuple(range(width - 1)),
                     tuple(notes))
    if any(is_literal(cell) or _COMMA_DATE.fullmatch(cell) for cell in full[0]):
        return Table(path.stem, ("",) * width, tuple(full), 0, tuple(range(width)), (*notes, "no header"))
    return _without_gold(Table(path.stem, full[0], tuple(full[1:]), 1, tuple(range(width)), tuple(notes)))


def _usual(path: Path) -> str:
    return "\t" if path.suffix.lower() in (".tsv", ".tab") else ","


def separators(text: str) -> tuple[str, str]:
    """(the likeliest separator, another one that is nearly as likely or "").

    Both are judged by the first lines, see `_likelihood`; a text in which no separator makes sense is one column.
    """
    sample = text[:SAMPLE_CHARACTERS]
    if len(sample) < len(text):
        sample = sample[:sample.rfind("\n") + 1] or sample
    ranked = sorted(((_likelihood(sample, mark), -place, mark) for place, mark in enumerate(SEPARATORS)), reverse=True)
    (best, _, mark), (next_best, _, other) = ranked[:2]
    return (mark if best else ONE_COLUMN if any(mark in sample for mark in SEPARATORS) else ","), (
        other if next_best > CLOSE * best else "")


def _likelihood(sample: str, mark: str) -> float:
    """How well a separator splits a sample: s·h·t²·(w − 1)/w·(1 − b/2).

    s is the share of lines with the commonest number of cells, w; h is 1 where the header has w cells, 1/2 where it has only
    one, else 0.8; t is the share of cells that are whole (they hold no other separator and no half of a quotation); b is the
    share of cells that begin with a space, as after a comma in running text. As in van den Burg et al.
    (doi:10.1007/s10618-019-00646-y), the pattern of the lines and the types of the cells decide.
    """
    try:
        rows = csv_rows(io.StringIO(sample, newline=""), "the sample", TablesError, delimiter=mark)
        lines = [row for _, row in islice(rows, SAMPLE_LINES) if row]
    except TablesError:
        return 0.0
    if not lines:
        return 0.0
    width, count = Counter(map(len, lines)).most_common(1)[0]
    cells = [cell for line in lines for cell in line if cell.strip()]
    after = [cell for line in lines for cell in line[1:] if cell.strip()]
    if width < 2 or not cells or _within_cells(sample, mark, alone=len(lines[0]) == 1, spaced=all(
            cell.startswith(" ") for cell in after)):
        return 0.0
    header = 1.0 if len(lines[0]) == width else 0.8 if len(lines[0]) > 1 else 0.5
    whole = sum(_is_whole(cell, mark) for cell in cells) / len(cells)
    spaced = sum(cell.startswith(" ") for cell in after) / max(len(after), 1)
    return count / len(lines) * header * whole ** 2 * (width - 1) / width * (1 - spaced / 2)


def _within_cells(sample: str, mark: str, *, alone: bool, spaced: bool) -> bool:
    """Whether commas stand only inside dates or, below a header of one cell, only inside numbers or before spaces."""
    if mark != ",":
        return False
    return (alone and spaced) or "," not in _COMMA_DATE.sub("", sample) or (
        alone and "," not in _COMMA_NUMBER.sub("", sample))


def _is_whole(cell: str, mark: str) -> bool:
    text = cell.strip()
    if is_literal(text):
        return True
    return text.count('"') % 2 == 0 and not any(other in text for other in SEPARATORS if other not in (mark, ",")) and (
        mark == "," or not _TIGHT_COMMA.search(text))


def _numbered(lines: Sequence[tuple[str, ...]]) -> bool:
    return (len(lines) > 1 and len(lines[0]) > 1 and lines[0][0] == ""
            and all(cell == str(place) for place, cell in enumerate(lines[0][1:]))
            and all(_NUMBERED.fullmatch(line[0]) for line in lines[1:]))


def _without_gold(table: Table) -> Table:
    """Move columns X__URI, which hold the right answers for X, to `gold`; the other columns are numbered without them."""
    answers = {place: table.header.index(name.removesuffix(GOLD)) for place, name in enumerate(table.header)
               if name.endswith(GOLD) and name.removesuffix(GOLD) in table.header}
    if not answers:
        return table
    kept = [place for place in range(table.width) if place not in answers]
    number = {place: new for new, place in enumerate(kept)}
    gold = tuple((table.first_row + row, number[about], cells[place]) for row, cells in enumerate(table.rows)
                 for place, about in answers.items() if cells[place])
    return Table(table.name, tuple(table.header[place] for place in kept),
                 tuple(tuple(cells[place] for place in kept) for cells in table.rows), table.first_row,
                 tuple(range(len(kept))), table.notes, gold)
