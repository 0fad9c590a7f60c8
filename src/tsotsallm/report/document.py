"""The content of a report before it becomes a page: sections of paragraphs, tables, figures, code and samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tsotsallm.units import with_error


@dataclass(frozen=True)
class Number:
    """A number as measured, and as shown with its error."""

    value: float
    shown: str
    error: str = ""

    @classmethod
    def of(cls, value: float | None, spec: str = ".4g", *, error: float | None = None, unit: str = "") -> Number | str:
        """A number in the format `spec`, or to the place that its standard error allows; an empty cell for None."""
        if value is None:
            return ""
        if error is None:
            return cls(float(value), format(value, spec) + unit)
        shown, deviation = with_error(float(value), float(error))
        return cls(float(value), shown + unit, f" ± {deviation}{unit}")

    @classmethod
    def share(cls, value: float, error: float | None) -> Number:
        """A share in per cent, to the place that its standard error allows, or to a tenth."""
        if error is None:
            return cls(value, f"{100 * value:.1f} %")
        shown, deviation = with_error(100 * value, 100 * error)
        return cls(value, f"{shown} %", f" ± {deviation}")

    @classmethod
    def difference(cls, value: float, low: float, high: float, *, scale: float = 1.0, mark: str = "") -> Number:
        """A difference with its interval, to two significant digits of half the interval."""
        half = scale * (high - low) / 2
        if half == 0:
            return cls(value, f"{mark}{scale * value:+.3g}", f" [{scale * low:.3g}, {scale * high:.3g}]")
        shown, below, above = (with_error(scale * number, half)[0] for number in (value, low, high))
        return cls(value, f"{mark}{shown if shown.startswith('-') else '+' + shown}", f" [{below}, {above}]")


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
    """Continuations of several prompts, by model; `remarks` says of each what is wrong with it, in a few words or none."""

    prompts: Sequence[str]
    answers: dict[str, Sequence[str]]
    remarks: dict[str, Sequence[str]] = field(default_factory=dict)
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
class Glance:
    """The first screen of every report: what it is about, how small that is, what was lost, and how to run it."""

    what: str
    small: str
    lost: str
    run: str


@dataclass(frozen=True)
class Document:
    """A report: its title, its first screen, its sections, and the numbers behind it."""

    title: str
    glance: Glance
    sections: Sequence[Section]
    data: dict[str, object] = field(default_factory=dict)

    @property
    def figures(self) -> list[Figure]:
        """All pictures, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Figure)]
