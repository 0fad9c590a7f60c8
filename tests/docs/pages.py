"""The documents as data: their fenced blocks, what is said before each, and the commands in it.

A block of commands begins with ```sh. An HTML comment before a block says how it is treated:

    <!-- slow: REASON -->          runs in `make test-docs` only
    <!-- not run: REASON -->       never runs
    <!-- refused: REASON -->       every command of the block ends with one line and exit code 1
    <!-- background: URL -->       slow; its last command runs until the page ends; the next block waits until URL
                                   (http or tcp) answers, or for nothing where it is `at once`
    <!-- file: NAME -->            is no command: the block is written to NAME in the page's folder
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
LANGUAGES = ("sh", "python", "text", "yaml", "json", "mermaid")
MARKS = ("slow", "not run", "refused", "background", "file")
_MARK = re.compile(r"<!--\s*([a-z ]+?)\s*:\s*(.*?)\s*-->")


@dataclass(frozen=True)
class Block:
    """One fenced block, with the line on which it begins and the comments before it."""

    language: str
    text: str
    line: int
    marks: dict[str, str]

    @property
    def runs(self) -> bool:
        return self.language in ("sh", "python") and not self.marks.keys() & {"not run", "file"}

    @property
    def slow(self) -> bool:
        return bool(self.marks.keys() & {"slow", "background"})

    @property
    def code(self) -> int:
        """The exit code that its commands end with."""
        return 1 if "refused" in self.marks else 0

    @property
    def commands(self) -> list[str]:
        """The command lines, a line that ends with a backslash joined with the next; comments and empty lines left out."""
        lines = re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found: list[Block] = []
    marks: dict[str, str] = {}
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        line = lines[number]
        if fence := re.match(r"(\s*)```(\S*)", line):
            begin = number
            number += 1
            while lines[number].strip() != "```":
                number += 1
            body = "\n".join(one.removeprefix(fence[1]) for one in lines[begin + 1:number])
            found.append(Block(fence[2], body, begin + 1, marks))
            marks = {}
        elif mark := _MARK.fullmatch(line.strip()):
            marks[mark[1]] = mark[2]
        elif line.strip():
            marks = {}
        number += 1
    return found
