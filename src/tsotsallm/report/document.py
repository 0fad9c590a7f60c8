"""The content of a report before it becomes a page: sections of paragraphs, tables, figures, code and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Number:
    """A number as measured, and as shown with its error."""

    value: float
    shown: str
    error: str = ""

    @classmethod
    def of(cls, value: float | None, spec: str = ".4g", *, error: float | None = None, unit: str = "") -> Number | str:
        """A number in the format `spec`, with its standard error; an empty cell where there is none."""
        if value is None:
            return ""
        return cls(float(value), format(value, spec) + unit, "" if error is None else f" ± {format(error, spec)}{unit}")


Cell = Number | str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str
    kind: str = "paragraph"


@dataclass(frozen=True)
class DataTable:
    """A table in which the first cell of a row is its heading; `marks` are the rows to highlight, a `long` one is folded."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marks: frozenset[int] = frozenset()
    long: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """A picture as SVG for the page and as PNG; `name` is that of its files, `description` says in words what it shows."""

    name: str
    caption: str
    description: str
    svg: str
    png: bytes
    kind: str = "figure"


@dataclass(frozen=True)
class Code:
    """Text to copy, folded where it is long."""

    caption: str
    text: str
    long: bool = False
    kind: str = "code"


@dataclass(frozen=True)
class TextSamples:
    """Continuations of several prompts, by model."""

    prompts: Sequence[str]
    answers: dict[str, Sequence[str]]
    kind: str = "samples"


Block = Paragraph | DataTable | Figure | Code | TextSamples


@dataclass(frozen=True)
class Section:
    """A titled sequence of blocks."""

    title: str
    blocks: Sequence[Block]

    @property
    def key(self) -> str:
        """The title as an HTML id."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.title.lower())


@dataclass(frozen=True)
class Document:
    """A report: its title, a summary, its sections, and the numbers behind it."""

    title: str
    lead: str
    sections: Sequence[Section]
    data: dict[str, object] = field(default_factory=dict)

    @property
    def figures(self) -> list[Figure]:
        """All pictures, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]
