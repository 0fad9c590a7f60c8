"""Statements of untrusted RDF files: those that do not parse are skipped, counted, and named by their line."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import IO, NamedTuple, Protocol, cast
from urllib.parse import quote
from xml.parsers import expat

from tsotsallm.errors import MissingExtraError, TsotsallmError
from tsotsallm.files import one_line, quoted, regular_size
from tsotsallm.units import human_bytes

SUFFIXES = (".ttl", ".nt", ".nq", ".trig", ".rdf", ".owl", ".n3", ".xml")
MOST_SKIPPED = 0.01
"""The largest share of a file's statements that may be skipped."""
SHOWN = 10
"""How many skipped statements are named."""
BLOCK = 1 << 20
LONGEST = 64 << 20
"""Limit of one statement, in bytes."""
_LANGUAGE_STRING = "http://www.w3.org/1999/02/22-rdf-syntax-ns#langString"
_WHERE = re.compile(r"^Parser error (?:at|between) line .*?column.*?: ", re.DOTALL)

# Tokens of Turtle, as far as they decide where a statement ends. A quotation mark that is not closed on its line matches the
# rest of the line without its last punctuation, so that the damage ends there.
_PLAIN = rb"""(?:[^\s"'<>#.;,\[\](){}\\]|\\[^\r\n])"""
_LONG = rb'"""(?:[^"\\]|\\.|"(?!""))*+"""|' + rb"'''(?:[^'\\]|\\.|'(?!''))*+'''"
_SHORT = rb'"(?!"")(?:[^"\\\r\n]|\\[^\r\n])*+"|' + rb"'(?!'')(?:[^'\\\r\n]|\\[^\r\n])*+'"
_EMPTY = rb'""(?!")|' + rb"''(?!')"
_REST = rb"[^\r\n]*?(?=\"\"\"|'''|[.;,]?[ \t]*(?:[\r\n]|\Z))"
_OPEN = rb"""(?:"(?!"")|'(?!'')|<)""" + _REST
_OPEN_LONG = rb"(?:\"\"\"|''')" + _REST
_WORD = rb"@[A-Za-z0-9_-]++|(?:\.(?=[0-9]))?" + _PLAIN + rb"++(?:\.++(?=" + _PLAIN + rb")" + _PLAIN + rb"++)*+"
_SPACE = rb"\s++|#[^\r\n]*+"
_TERM = b"|".join((_LONG, _EMPTY, _SHORT, rb"<[^<>\r\n]*+>", _WORD))
_DIRECTIVE = rb"""(?i:BASE\s*+<[^<>]*+>|PREFIX\s++[^\s:]*+:\s*+<[^<>]*+>|VERSION\s++(?:"[^"\r\n]*+"|'[^'\r\n]*+'))"""


def _pattern(ends: bytes, *, last: bool) -> re.Pattern[bytes]:
    """A pattern for a directive in SPARQL's form, or a statement up to the mark that ends it.

    `last` is for the end of a file, where a long string that is still open is never closed.
    """
    tokens = b"|".join((_SPACE, _TERM, rb"<<", _OPEN, *([_OPEN_LONG] if last else []), rb"[^" + ends + rb"\"'<]"))
    return re.compile(rb"(?:" + _SPACE + rb")*+" + _DIRECTIVE + rb"|(?:" + tokens + rb")*+(?P<end>[" + ends + rb"])",
                      re.DOTALL)


_TOKEN = re.compile(rb"(?P<space>" + _SPACE + rb")|(?P<term>" + _TERM + rb")|(?P<mark><<|>>|[^\"'<])|(?P<open>" + _OPEN_LONG
                    + b"|" + _OPEN + rb")", re.DOTALL)
_QUOTE = re.compile(rb"[\"']")
_LINE_END = re.compile(rb"[.;,][ \t]*\r?\n")


class Term(Protocol):
    """A term of a statement in pyoxigraph: an IRI, a blank node or a literal."""

    @property
    def value(self) -> str:
        """The IRI, the name of the blank node, or the text of the literal."""


class Quad(Protocol):
    """A statement in pyoxigraph, in its graph."""

    @property
    def subject(self) -> Term:
        """What it is about."""

    @property
    def predicate(self) -> Term:
        """Its property."""

    @property
    def object(self) -> Term:
        """The value of the property."""


class Unit(NamedTuple):
    """What is read or skipped as a whole: a line of N-Triples, or a statement of Turtle with the graph around it (TriG)."""

    line: int
    text: bytes
    graph: bytes = b""

    def begins_in(self, distrusted: tuple[int, bool]) -> bool:
        """Whether this may be the inside of a string that a fault left open.

        That is so where it begins on the line that a fault ended on, with a quotation mark before or after it.
        """
        line, quoted_before = distrusted
        begin = self.text.lstrip(b" \t")
        return self.line == line and begin != b"" and not begin.startswith((b"\n", b"\r", b"#")) and (
            quoted_before or _QUOTE.search(begin.partition(b"\n")[0]) is not None)

    def written(self) -> bytes:
        """The text to parse, inside its graph where it has one."""
        if not self.graph:
            return self.text
        return b"%s{%s" % (self.graph, self.text if self.text.endswith(b"}") else self.text + b"}")


def library(extra: str, what: str) -> ModuleType:
    """The module pyoxigraph; raises MissingExtraError, with the command that installs it, where it is missing."""
    try:
        import pyoxigraph
    except ImportError:
        raise MissingExtraError("pyoxigraph", extra, what) from None
    return pyoxigraph


def suffix_of(path: Path) -> str:
    """The suffix that names the format of a file: .ttl for a.ttl and for a.ttl.gz."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


@contextmanager
def opened(path: Path, kind: type[TsotsallmError]) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked where its name ends in .gz; raises `kind` where it cannot be read or unpacked."""
    regular_size(path, kind)
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield cast(IO[bytes], file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise kind(f"{path.name} cannot be unpacked ({one_line(error)}); it is damaged or cut short") from None


class Skipped:
    """Counts the statements of a file that could not be read, and keeps the lines of the first ten.

    Raises `kind` at the first one (`strict`), or in `judge` where they are more than 1%.
    """

    def __init__(self, path: Path, form: str, kind: type[TsotsallmError], *, strict: bool = False) -> None:
        self.path, self.form, self.kind, self.strict = path, form, kind, strict
        self.read = self.count = 0
        self._first: dict[tuple[int, str], None] = {}

    def add(self, line: int, message: object, statements: int = 1) -> None:
        """Record skipped statements; line 0 means that the line is not known. Raises `kind` where `strict`."""
        self.count += statements
        if len(self._first) < SHOWN:
            self._first[line, one_line(_WHERE.sub("", str(message)), 200)] = None
        if self.strict:
            raise self.kind(f"{self._begin()}; correct it, or leave out --strict to skip it")

    def judge(self) -> None:
        """Raise `kind` where more than 1% of the statements were skipped."""
        if self.count > MOST_SKIPPED * (self.read + self.count):
            raise self.kind(f"{self._begin()}; {self.count:,} of {self.read + self.count:,} statements are not, more than "
                            f"the {MOST_SKIPPED:.0%} that may be skipped: correct them, or give the file the suffix of its "
                            "format")

    @property
    def notes(self) -> list[str]:
        """One line that counts what was skipped, and one for each of the first ten; empty where nothing was."""
        if not self.count:
            return []
        return [f"{self.path.name}: {self.count:,} of {self.read + self.count:,} statements are not valid {self.form} and "
                f"were skipped{', the first' if len(self._first) == SHOWN else ''}:",
                *(f"{self.place(line)}: {message}" for line, message in self._first)]

    def place(self, line: int) -> str:
        """The name of the file, with the line where it is known (not 0)."""
        return f"{self.path.name}, line {line}" if line else self.path.name

    def _begin(self) -> str:
        line, message = next(iter(self._first))
        return f"{self.place(line)} is not valid {self.form} ({message})"


class Statements:
    """Iterates over the quads of a file in one pass; `skipped` then says what could not be read.

    Raises `kind` where too much was skipped, and where nothing after a fault can be trusted (RDF/XML that is not
    well-formed). The parser's own recovery is not used: it silently drops the statement after a fault, and reads a literal
    without its closing quotation mark together with the text after it.
    """

    def __init__(self, path: Path, kind: type[TsotsallmError], extra: str, *, strict: bool = False) -> None:
        self.path, self.kind = path, kind
        self._rdf = library(extra, f"reading the graph {path.name}")
        formats = self._rdf.RdfFormat
        self._format = formats.from_extension(suffix_of(path)[1:]) or formats.RDF_XML
        self._base = f"urn:tsotsallm:{quote(path.name)}"
        self._prefixes: dict[str, str] = {}
        self._by_line = self._format in (formats.N_TRIPLES, formats.N_QUADS)
        ends = rb".{}" if self._format == formats.TRIG else b"."
        self._statement, self._last = (_pattern(ends, last=last) for last in (False, True))
        self._graph = b""
        self._distrusted = (0, False)   # the line that a fault ended on, and whether a quotation mark came before
        self.skipped = Skipped(path, self._format.name, kind, strict=strict)
        self._faults: dict[tuple[str, str], int] = {}          # (value, what is wrong with it) -> statements

    def __iter__(self) -> Iterator[Quad]:
        with opened(self.path, self.kind) as file:
            yield from self._of_xml(file) if self._format == self._rdf.RdfFormat.RDF_XML else self._of_text(file)
        self._find_lines()
        self.skipped.judge()

    # -- N-Triples, N-Quads, Turtle, TriG, N3 -------------------------------------------------------------------------

    def _of_text(self, file: IO[bytes]) -> Iterator[Quad]:
        held, line, size, begun = b"", 1, BLOCK, False
        while True:
            more = file.read(size)
            held += more
            if not begun and held.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise self.kind(f"{self.path.name} is UTF-16, but RDF is written in UTF-8; convert it first")
            held = held if begun else held.removeprefix(b"\xef\xbb\xbf")
            begun = True
            taken, quads = self._take(held, line, last=not more)
            yield from quads
            if not more:
                return
            line += held.count(b"\n", 0, taken)
            size = BLOCK if taken else max(BLOCK, len(held))        # a long statement is not searched again and again
            held = held[taken:]
            if len(held) > LONGEST:
                raise self.kind(f"{self.skipped.place(line)} begins a statement of more than {human_bytes(LONGEST)}; the "
                                "file is damaged, or has the suffix of another format")

    def _take(self, held: bytes, line: int, *, last: bool) -> tuple[int, Iterator[Quad]]:
        """How many bytes make whole statements, and the quads in them."""
        if not self._graph and (end := len(held) if last else self._likely_end(held)):
            try:
                return end, iter(self._parsed(held[:end]))
            except SyntaxError:
                pass                        # it contains a fault, or ends within a statement
        end = len(held) if last else held.rfind(b"\n") + 1
        if self._by_line:
            return end, self._read([Unit(line + number, text + b"\n")
                                    for number, text in enumerate(held[:end].split(b"\n"))])
        units, end = self._split(held, end, line, last=last)
        return end, self._read(units)

    def _likely_end(self, held: bytes) -> int:
        """Where the last statement seems to end; it does end there if everything before parses."""
        if self._by_line:
            return held.rfind(b"\n") + 1
        mark = b"}" if self._format == self._rdf.RdfFormat.TRIG else b"."
        return max((held.rfind(mark + end) + len(mark + end) for end in (b"\n", b"\r\n") if mark + end in held), default=0)

    def _split(self, held: bytes, stop: int, line: int, *, last: bool) -> tuple[list[Unit], int]:
        """The whole statements up to `stop`, and where they end."""
        units, place = [], 0
        while (match := self._statement.match(held, place, stop) or (self._last.match(held, place, stop) if last else None)):
            text, end = held[place:match.end()], match["end"]
            if end == b"{":
                self._graph = b" ".join(text[:-1].split(b"\n")) or b" "
            else:
                units.append(Unit(line, text, self._graph))
                if end == b"}":
                    self._graph = b""
            line += text.count(b"\n")
            place = match.end()
        if last and held[place:].strip():
            units.append(Unit(line, held[place:], self._graph))
            place = stop
        return units, place

    def _parsed(self, text: bytes) -> list[Quad]:
        """The quads of some statements, read with the prefixes and the base so far; those that they declare are kept.

        Raises SyntaxError where any of them does not parse.
        """
        prefixes = b"" if self._by_line else b"".join(f"@prefix {name}: <{iri}> . ".encode()
                                                      for name, iri in self._prefixes.items())
        parser = self._rdf.parse(input=prefixes + text, format=self._format, base_iri=self._base)
        try:
            quads = list(parser)
        except MemoryError as error:        # the parser's limit of 16 MiB per term
            raise SyntaxError(str(error)) from None
        if not self._by_line:
            self._prefixes, self._base = parser.prefixes, parser.base_iri or self._base
        self.skipped.read += len(quads)
        return quads

    def _read(self, units: list[Unit]) -> Iterator[Quad]:
        """Yield the quads of statements; where some do not parse, of each half by itself."""
        while units and units[0].begins_in(self._distrusted):
            self.skipped.add(units[0].line, "after a statement that does not parse")
            units = units[1:]
        try:
            quads = self._parsed(b"".join(unit.written() for unit in units))
        except SyntaxError as error:
            if len(units) == 1:
                yield from self._salvage(units[0], error)
            else:
                yield from self._read(units[:len(units) // 2])
                yield from self._read(units[len(units) // 2:])
            return
        yield from quads

    def _salvage(self, unit: Unit, error: SyntaxError) -> Iterator[Quad]:
        """Yield the quads of those predicates and objects of a statement that parse."""
        if not self._by_line:
            self._distrusted = (unit.line + unit.text.count(b"\n"), _QUOTE.search(unit.text) is not None)
        parts, rest = ([], None) if self._by_line else _parts(unit)
        if len(parts) < 2 and rest is None:
            self.skipped.add(self._line(unit, error), error.msg, _about(unit.text))
            return
        message = error.msg
        for part in parts:
            try:
                yield from self._parsed(part.written())
            except SyntaxError as fault:
                self.skipped.add(self._line(part, fault), fault.msg)
                message = "no list of predicates and objects"
        if rest is not None:
            mark = unit.text[rest:rest + 1].decode("latin-1")
            self.skipped.add(unit.line + unit.text.count(b"\n", 0, rest),
                             f"{mark} without its end" if mark in ('"', "'", "<") else message, _about(unit.text[rest:]))

    def _line(self, unit: Unit, error: SyntaxError) -> int:
        text = unit.text.rstrip()           # a fault at the end of the text belongs to its last line
        return unit.line + min((error.lineno or 1) - 1, text.count(b"\n"))

    # -- RDF/XML ------------------------------------------------------------------------------------------------------

    def _of_xml(self, file: IO[bytes]) -> Iterator[Quad]:
        """Parse leniently, then check every term: after a bad term the strict parser continues with wrong statements."""
        parser = self._rdf.parse(input=file, format=self._format, base_iri=self._base, lenient=True)
        while True:
            try:
                quad = next(parser, None)
            except SyntaxError as error:
                line, message = self._malformed() or (error.lineno or 0, error.msg)
                raise self.kind(f"{self.skipped.place(line)} is not valid {self._format.name} ({one_line(message, 120)}), "
                                "and nothing after it can be read; correct it there") from None
            if quad is None:
                return
            for term in (quad.subject, quad.predicate, quad.object):
                value, fault = _fault(self._rdf, term)
                if fault:
                    place = (value, fault) if (value, fault) in self._faults or len(self._faults) < SHOWN else ("", "")
                    self._faults[place] = self._faults.get(place, 0) + 1
                    if self.skipped.strict:
                        self._find_lines()
                    break
            else:
                self.skipped.read += 1
                yield quad

    def _malformed(self) -> tuple[int, str] | None:
        parser = expat.ParserCreate()
        try:
            with opened(self.path, self.kind) as file:
                parser.ParseFile(file)
        except expat.ExpatError as error:
            return error.lineno, expat.ErrorString(error.code)
        return None

    def _find_lines(self) -> None:
        """Record the faults with the line where each value first occurs; a value composed of several parts has none."""
        wanted: dict[str, list[bytes]] = {}
        for value in {value: None for value, _ in self._faults if value}:
            last = re.split("[/#]", value)[-1]          # all that the file spells out where the rest is a base
            wanted[value] = [form.replace("&", "&amp;").encode() for form in (value, last) if re.search(r"[^\w.]", form)]
        lines: dict[str, int] = {}
        with opened(self.path, self.kind) as file:
            for number, text in enumerate(file if wanted else (), 1):
                for value in [sought for sought in wanted if any(form in text for form in wanted[sought])]:
                    lines[value] = number
                    del wanted[value]
                if not wanted:
                    break
        for (value, fault), count in sorted(self._faults.items(), key=lambda item: lines.get(item[0][0], 1 << 60)):
            self.skipped.add(lines.get(value, 0), f"{fault} in {quoted(value)}", count)


def _parts(unit: Unit) -> tuple[list[Unit], int | None]:
    """Split a statement of Turtle into one statement per object, each with its object's line.

    Also returns where the rest begins that cannot be split (None: there is no rest). That is everything after a quotation
    mark that is left open, or after an object that is not one term: text there may resemble statements, and predicates may
    belong to another subject. A subject in brackets is not split either, since it would be a new node in every part.
    """
    parts: list[Unit] = []
    terms: list[bytes] = []                     # subject, predicate, object
    line = begun = unit.line
    depth, begin, before = 0, 0, b""
    for token in _TOKEN.finditer(unit.text):
        text, mark = token[0], token["mark"]
        line += text.count(b"\n")
        if token["space"] is not None:
            continue
        if depth == 0 and (mark in (b",", b";", b".") or (mark == b"}" and unit.graph)):
            if len(terms) == 3:
                parts.append(Unit(begun, b" ".join((*terms, b".")), unit.graph))
            elif len(terms) == 2 or mark == b"," or not parts:
                return parts, token.start()
            terms = terms[:2] if mark == b"," else terms[:1]
            continue
        opening, closing = mark in (b"[", b"(", b"{", b"<<"), mark in (b"]", b")", b"}", b">>")
        if token["open"] is not None or depth < closing or (opening and not terms):
            return parts, token.start()
        if depth or text.startswith((b"@", b"^^")) or before == b"^^":
            if not terms:
                return parts, token.start()
            if (depth == 1 and closing) or depth == 0:
                terms[-1] = unit.text[begin:token.end()]
        elif len(terms) == 3:
            return parts, token.start()
        else:
            terms.append(text)
            begin, begun = token.start(), line - text.count(b"\n")
        depth += opening - closing
        before = text
    return parts, None


def _about(text: bytes) -> int:
    """Roughly how many statements a text holds: the lines that end one, since it may have swallowed others."""
    return max(1, len(_LINE_END.findall(text.rstrip() + b"\n")))


def _fault(rdf: ModuleType, term: Term) -> tuple[str, str]:
    """The value of a term that RDF does not allow, and the fault; both are empty where the term is valid."""
    if isinstance(term, rdf.NamedNode):
        return term.value, _iri_fault(rdf, term.value)
    if isinstance(term, rdf.Literal):
        if term.language is not None:
            return term.language, _language_fault(rdf, term.language)
        if term.datatype.value == _LANGUAGE_STRING:
            return term.value, "The datatype of a literal without a language tag must not be rdf:langString"
        return term.datatype.value, _iri_fault(rdf, term.datatype.value)
    return "", ""


@lru_cache(maxsize=65536)
def _iri_fault(rdf: ModuleType, value: str) -> str:
    try:
        rdf.NamedNode(value)
    except ValueError as error:
        return str(error)
    return ""


@lru_cache(maxsize=1024)
def _language_fault(rdf: ModuleType, value: str) -> str:
    try:
        rdf.Literal("", language=value)
    except ValueError as error:
        return str(error)
    return ""
