"""Errors that a user can correct. Each message says what was found, the rule, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable


class TsotsallmError(Exception):
    """Base of every error that the user can correct; the command line prints it without a traceback."""


class CheckpointError(TsotsallmError):
    """A checkpoint is missing, damaged or unsafe, or does not match its config."""


class RecipeError(TsotsallmError):
    """A recipe cannot be read, or asks for something impossible."""


class CorpusError(TsotsallmError):
    """A calibration or evaluation text cannot be used."""


class ConversationError(TsotsallmError):
    """A conversation does not fit the model's chat template, or the model has none."""


class TaskError(TsotsallmError):
    """An evaluation task or its data cannot be used."""


class ResourceError(TsotsallmError):
    """The machine has too little memory or disk space for the task."""


class NumericsError(TsotsallmError):
    """The arithmetic failed: a value is not finite, or a matrix is not positive definite."""


class ResumeError(TsotsallmError):
    """Unfinished work exists that was started with other inputs."""


class ExportError(TsotsallmError):
    """A result cannot be written in the requested form."""


class StudyError(TsotsallmError):
    """A study's search space, ledger or budget cannot be used."""


class ClusterError(TsotsallmError):
    """Other computers cannot be reached, or their versions or data do not match."""


class ReportError(TsotsallmError):
    """There is nothing to report on, or the report has no place to go."""


class ServeError(TsotsallmError):
    """A service cannot be started with these options."""


class TablesError(TsotsallmError):
    """A table, a knowledge graph or a gold standard cannot be used."""


class MissingExtraError(TsotsallmError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}, which is not installed; install it with: "
                         f"{install_command(extra)}")


def install_command(extra: str) -> str:
    """The shell command that installs the packages of an extra into this environment, under the checkout's constraints."""
    import re
    import sys
    from importlib import metadata
    from pathlib import Path

    try:
        known = metadata.requires("tsotsallm") or []
    except metadata.PackageNotFoundError:       # run from source, not installed
        known = []
    needed = [line.partition(";")[0].strip() for line in known if re.search(rf"""extra == ['"]{extra}['"]""", line)]
    constraints = Path(__file__).resolve().parents[2] / "constraints.txt"
    asked = ["-c", str(constraints)] if constraints.is_file() else []
    return " ".join(f'"{word}"' if re.search(r"[\s<>=;&()\[]", word) else word
                    for word in (sys.executable, "-m", "pip", "install", *asked, *(needed or [f"tsotsallm[{extra}]"])))


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X? (known: ...)`: the known word closest to a mistyped one, and the list of all known words."""
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"
