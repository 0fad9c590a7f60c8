"""Tables as people have them: any encoding, separator, ragged rows, with a header or without."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tsotsallm.errors import TablesError
from tsotsallm.tables.words import is_literal

SEPARATORS = ",;\t|"
SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
GOLD = "__URI"
"""End of the name of a column that holds the entities of the column before it (ToughTables): kept out of what is read."""
LONGEST_CELL = 100_000
"""Characters of a cell; the library's own limit is one for the whole process, which others change."""
_NUMBERED = re.compile(r"\d+")


@dataclass(frozen=True)
class Table:
    """Rows of a table, each as long as the header.

    `first_row` is the number of the first row (1 below a header, as SemTab counts), `columns` the numbers of the columns.
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
        return len(self.header)


def find_tables(sources: Sequence[str | Path]) -> list[Path]:
    """The tables of files and folders, by name; two of one name are refused, since submissions tell them by it."""
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = sorted(one for one in path.iterdir() if one.suffix.lower() in SUFFIXES and one.is_file())
            if not inside:
                raise TablesError(f"{path} holds no tables; they end in {', '.join(SUFFIXES)}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise TablesError(f"{path} does not exist; give tables as files or folders, or 'embedded'")
    twice = [name for name, count in Counter(path.stem for path in found).items() if count > 1]
    if twice:
        raise TablesError(f"{len(twice)} names belong to two tables each, such as {twice[0]}; submissions tell tables by "
                          "their names, so rename one or annotate them into two folders")
    return sorted(found, key=lambda path: path.stem)


def decode(content: bytes, name: str) -> tuple[str, list[str]]:
    """Text of a table, and notes: UTF-8 and UTF-16 by their marks or contents, else Windows-1252."""
    for mark, encoding in ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if content.startswith(mark):
            try:
                return content.decode(encoding), []
            except UnicodeDecodeError as error:
                raise TablesError(f"{name} begins like {encoding} but is not ({error.reason} at byte {error.start}); save "
                                  "it again as UTF-8") from None
    if b"\0" in content[:4096]:
        even, odd = content[0:4096:2].count(0), content[1:4096:2].count(0)
        encoding = "utf-16-le" if odd > even else "utf-16-be"
        try:
            text = content.decode(encoding)
            if "\0" not in text:
                return text, [f"{encoding.upper()} without a mark"]
        except UnicodeDecodeError:
            pass
        raise TablesError(f"{name} holds null bytes and is no text; save the table as CSV in UTF-8")
    try:
        return content.decode("utf-8"), []
    except UnicodeDecodeError as error:
        byte, place = content[error.start], error.start
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError as error:
        line = content[:place].count(b"\n") + 1
        raise TablesError(f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8, and 0x{content[error.start]:02x} at byte "
                          f"{error.start} is not Windows-1252 either; save the table again as UTF-8") from None
    return text, ["not UTF-8: read as Windows-1252 (Latin-1)"]


def read_table(path: Path) -> Table:
    """A table of a file. Rows shorter than the widest are filled up, which is noted, as is a guessed encoding.

    The first line is the header unless a number or a date stands in it. A table that was written with numbered rows and
    columns (an empty cell first, then 0, 1, 2, ...) is read without these.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TablesError(f"{path.name} cannot be read ({error.strerror}); mend its permissions") from None
    text, notes = decode(content, path.name)
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator(text)))
    except csv.Error as error:
        raise TablesError(f"{path.name} is no table ({error}); give CSV or TSV") from None
    while lines and not any(cell.strip() for cell in lines[-1]):
        lines.pop()
    if not lines:
        raise TablesError(f"{path.name} is empty; a table has a row at least")
    longest = max(len(cell) for line in lines for cell in line)
    if longest > LONGEST_CELL:
        raise TablesError(f"{path.name} is no table (a cell has {longest} characters, as where a quotation mark is never "
                          "closed); give CSV or TSV")
    width = max(map(len, lines))
    ragged = [number for number, line in enumerate(lines, 1) if len(line) != len(lines[0])]
    if ragged:
        few = ", ".join(map(str, ragged[:5])) + (", ..." if len(ragged) > 5 else "")
        notes.append(f"{len(ragged)} of {len(lines)} lines are longer or shorter than the first ({few}): filled up with "
                     "empty cells")
    full = [tuple(cell.strip() for cell in line) + ("",) * (width - len(line)) for line in lines]
    if _numbered(full):
        notes.append("numbered rows and columns: read without the numbers")
        return Table(path.stem, ("",) * (width - 1), tuple(line[1:] for line in full[1:]), 0, tuple(range(width - 1)),
                     tuple(notes))
    if any(is_literal(cell) for cell in full[0]):
        return Table(path.stem, ("",) * width, tuple(full), 0, tuple(range(width)), (*notes, "no header"))
    return _without_gold(Table(path.stem, full[0], tuple(full[1:]), 1, tuple(range(width)), tuple(notes)))


def separator(text: str) -> str:
    """The separator that cuts most of the first lines into equally many cells, more than one."""
    sample = "\n".join(text.splitlines()[:60])
    best, found = (0.0, 0), ","
    for one in SEPARATORS:
        try:
            widths = [len(line) for line in csv.reader(io.StringIO(sample), delimiter=one) if line]
        except csv.Error:
            continue
        if widths:
            width, count = Counter(widths).most_common(1)[0]
            if width > 1 and (count / len(widths), width) > best:
                best, found = (count / len(widths), width), one
    return found


def _numbered(lines: Sequence[tuple[str, ...]]) -> bool:
    return (len(lines) > 1 and len(lines[0]) > 1 and lines[0][0] == ""
            and all(cell == str(place) for place, cell in enumerate(lines[0][1:]))
            and all(_NUMBERED.fullmatch(line[0]) for line in lines[1:]))


def _without_gold(table: Table) -> Table:
    """Columns X__URI beside X are an answer and no part of the question; columns are numbered among the others."""
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
