"""Links between the documents lead somewhere, pages have contents, and README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, blocks

README_BYTES = 10_000
DOCUMENTS = (*PAGES, ROOT / "CHANGELOG.md")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^\s*```.*?^\s*```\s*$", re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its fenced blocks and code spans."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text("utf-8")))


def anchors(page: Path) -> set[str]:
    """The names under which GitHub reaches the headings of a page."""
    headings = re.findall(r"^#+\s+(.+?)\s*$", _FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"`", "", heading).lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    wrong = []
    for target in (one or two for one, two in _LINK.findall(prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(path)):
            wrong.append(target)
    assert not wrong, wrong


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_a_page_has_a_table_of_contents_with_every_section(page: Path) -> None:
    text = _FENCE.sub("", page.read_text("utf-8"))
    sections = re.findall(r"^## +(.+?)\s*$", text, re.MULTILINE)
    assert sections[:1] == ["Contents"], f"{page.name} has no contents at its top"
    contents = text.split("## Contents", 1)[1].split("\n## ", 1)[0]
    missing = [name for name in sections[1:] if f"[{name}](#" not in contents]
    assert not missing, missing


def test_readme_is_short() -> None:
    size = len((ROOT / "README.md").read_bytes())
    assert size <= README_BYTES, f"README.md has {size} bytes; move details to docs/"


def test_readme_links_every_page() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name})" not in text]
    assert not missing, missing


def test_a_block_has_its_marks_and_commands() -> None:
    one, two = blocks("<!-- slow: minutes -->\n```sh\n# a comment\na \\\n  b\n\nc\n```\ntext\n```text\nd\n```\n")
    assert one.marks == {"slow": "minutes"}
    assert one.commands == ["a b", "c"]
    assert (two.marks, two.language, two.runs) == ({}, "text", False)


def test_architecture_names_every_part_of_the_house() -> None:
    from tests.test_architecture import ORDER

    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    picture = next(block.text for block in blocks(text) if "┌" in block.text)
    parts = [part for part in ORDER if part != "__main__"]
    missing = [part for part in parts if f"`{part}`" not in text or not re.search(rf"\b{part}\b", picture)]
    assert not missing, missing
