"""A report as a page: one HTML file with everything in it, and its pictures beside it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tsotsallm.analysis.pictures import pyplot
from tsotsallm.errors import ReportError
from tsotsallm.report.document import Document, Number
from tsotsallm.version import __version__

MOST_BYTES = 3 << 20


def render(document: Document) -> str:
    """The page as HTML."""
    files = resources.files("tsotsallm.report")

    def part(name: str) -> str:
        return files.joinpath(name).read_text("utf-8")

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["number"] = lambda cell: isinstance(cell, Number)
    return environment.from_string(part("page.html.j2")).render(
        document=document, version=__version__, style=Markup(part("page.css")), script=Markup(part("page.js")),
        svg=Markup, data=Markup(json.dumps(document.data, default=str).replace("<", "\\u003c")))


def check_page(out: Path) -> None:
    """Raise ReportError where a page's name does not end in .html, MissingExtraError where its pictures cannot be drawn."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ReportError(f"{out} does not end in .html; give the name of a page, such as report.html")
    pyplot()


def write(document: Document, out: Path) -> list[Path]:
    """Write OUT (.html) and a folder OUT-pictures with every picture as SVG and PNG; returns the files written.

    Raises ReportError where the name does not end in .html, or where a file cannot be written.
    """
    check_page(out)
    text = render(document)
    if len(text.encode()) > MOST_BYTES:
        text = render(Document(document.title, document.glance, document.sections, {}))
    folder = out.with_name(f"{out.stem}-pictures")
    written = [out]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.with_name(f".{out.name}.draft")
        draft.write_text(text, "utf-8", errors="replace")     # file names may not be valid text
        for figure in document.figures:
            folder.mkdir(exist_ok=True)
            standing = figure.svg.replace("<svg", '<?xml version="1.0" encoding="utf-8"?>\n<svg', 1)
            (folder / f"{figure.name}.svg").write_text(standing, "utf-8", errors="replace")
            (folder / f"{figure.name}.png").write_bytes(figure.png)
            written += [folder / f"{figure.name}.svg", folder / f"{figure.name}.png"]
        draft.replace(out)
    except OSError as error:
        raise ReportError(f"{out} cannot be written ({error.strerror or error}); choose another place with -o") from None
    return written
