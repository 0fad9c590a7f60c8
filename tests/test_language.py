"""The worst phrases of a translation do not come back into what users and readers see.

Each entry is a regular expression and what a technical writer says instead. The documents are checked without their code;
of the sources the texts that a user can meet: string literals, the docstrings of commands, pages and YAML files. The
embedded model's world (`lab/`) is data and is left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PHRASES: dict[str, str] = {
    r"\b(go|goes|going|went|gone) on\b(?! (a|an|the|to|its|each|every|their|this|that|one|top)\b)": "resume, continue",
    r"\banew\b": "again",
    r"\bparted\b": "split, separated",
    r"\blies? (in|beside|on disk)\b": "is in, is beside",
    r"\bso many\b(?![^.;:]*\bthat\b)": "N, at most N",
    r"\b(make|makes|made|making) up for\b": "compensate for",
    r"\bweigh(s|ed)? (what (the loss|it) depends|what depends|as the loss)\b": "is weighted by",
    r"\bwhat (it|they|the loss) depends?\b|\bloss depends on (them|it)\b": "the loss gradient",
    r"\b(tell|tells|told) (what|how|which|whether)\b": "report, show, print",
    r"\banswers? tells?\b|\breport tells\b|\bverdicts? tells?\b": "shows",
    r"\b(a|two|another|quick|first) looks? (at|inside)\b|\bby a quick look\b|\ba look\b": "a check, a view",
    r"\b(is|are|was|were) (not )?looked at\b": "is checked, is evaluated",
    r"\b(ask|asks|asking) (a|the|every|another) model\b|\bmodels? (is|are|was|were) asked\b": "query, evaluate",
    r"\b(ask|asks) a sampler\b": "use a sampler",
    r"\bthe first work\b": "TSOTSALLM's service",
    r"\b(texts|languages) that one keeps\b|\bone's texts\b": "retained languages, your texts",
    r"\bcomes? along\b": "is included",
    r"\btakes? off (the )?most\b": "reduces the loss most",
    r"\bends? in words\b": "ends with an error message",
    r"\bfor want of\b": "for lack of",
    r"\bthat shall\b": "that will, that should",
    r"\bnobody is asked\b": "nobody has to prove",
    r"\bdo(es|ne)? over\b": "repeat",
    r"\bis dear\b|\bdearer\b": "is costly",
    r"\bmeans to say\b": "cannot express",
    r"\bworkplace\b|\bworkbench\b": "context",
    r"\bwhat (a |the )?units? costs?\b": "what layers, widths and grids cost",
    r"\bby itself asks\b|\basks? it of\b": "requires",
    r"\bwho finds it full\b": "a request that finds it full",
    r"\bis told to come again\b": "is answered 429",
    r"\bwhat one needs\b": "what you need",
}
_PATTERNS = [(re.compile(pattern, re.IGNORECASE), better) for pattern, better in PHRASES.items()]
DOCUMENTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))


def wrong(text: str) -> Iterator[str]:
    """Every bad phrase of a text in context, with what to say instead."""
    flat = re.sub(r"\s+", " ", text)
    for pattern, better in _PATTERNS:
        for match in pattern.finditer(flat):
            yield f"...{flat[max(0, match.start() - 40):match.end() + 30]}... (say: {better})"


def prose(page: Path) -> str:
    text = re.sub(r"^\s*```.*?^\s*```\s*$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "X", text)


def literals(path: Path) -> Iterator[str]:
    """The string literals of a module; docstrings only where typer shows them."""
    tree = ast.parse(path.read_text("utf-8"))
    hidden = set() if "cli" in path.relative_to(ROOT).parts else {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in hidden:
            yield node.value


def source_files() -> list[Path]:
    folder = ROOT / "src" / "tsotsallm"
    found = [path for ending in ("py", "html", "js", "j2", "yaml") for path in folder.rglob(f"*.{ending}")]
    others = {"lab", "vendor"}          # the world of the embedded model, and libraries of other projects
    return sorted(path for path in found if not others & set(path.relative_to(folder).parts))


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_documents_are_in_plain_english(page: Path) -> None:
    found = list(wrong(prose(page)))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT / "src" / "tsotsallm")))
def test_sources_are_in_plain_english(path: Path) -> None:
    texts = literals(path) if path.suffix == ".py" else [path.read_text("utf-8")]
    found = [one for text in texts for one in wrong(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("text", [
    "Stopped and run again, it goes on.", "The codes are made anew.", "Within so many bits a weight.",
    "Layers make up for those before them.", "It tells what that costs.", "The factors lie in the container."])
def test_bad_phrases_are_found(text: str) -> None:
    assert list(wrong(text))


@pytest.mark.parametrize("text", [
    "The values go on the grid.", "So many tokens that the window is full.", "Names are told apart by their row.",
    "The share lies between 0 and 1.", "Look at the report.", "The scores depend on the protocol."])
def test_good_phrases_are_not(text: str) -> None:
    assert not list(wrong(text))
