"""What a user can do wrong. A message says what was found, the rule, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable


class TsotsallmError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback."""


class CheckpointError(TsotsallmError):
    """A checkpoint is missing, damaged, unsafe, or not what its config says."""


class RecipeError(TsotsallmError):
    """A recipe cannot be read or asks for something impossible."""


class CorpusError(TsotsallmError):
    """A calibration or evaluation text cannot be used."""


class ConversationError(TsotsallmError):
    """A conversation does not fit the model's chat template, or the model has none."""


class TaskError(TsotsallmError):
    """An evaluation task or its data cannot be used."""


class ResourceError(TsotsallmError):
    """The machine has too little memory or disk for what was asked."""


class NumericsError(TsotsallmError):
    """The arithmetic broke down: not finite, not positive definite."""


class ResumeError(TsotsallmError):
    """Unfinished work exists that belongs to other inputs."""


class ExportError(TsotsallmError):
    """A result cannot be written in the form that was asked for."""


class StudyError(TsotsallmError):
    """A study's space, ledger or budget cannot be used."""


class ClusterError(TsotsallmError):
    """Other computers cannot be reached, or do not fit together."""


class ReportError(TsotsallmError):
    """There is nothing to report on, or no place for it."""


class ServeError(TsotsallmError):
    """A service cannot be started as it was asked for."""


class TablesError(TsotsallmError):
    """A table, a knowledge graph or a gold standard cannot be used."""


class MissingExtraError(TsotsallmError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}, which is not installed; install it with: "
                         f"{install_command(extra)}")


def install_command(extra: str) -> str:
    """What installs the packages of an extra into this very environment, within the checkout's constraints if it has any."""
    import re
    import sys
    from importlib import metadata
    from pathlib import Path

    try:
        known = metadata.requires("tsotsallm") or []
    except metadata.PackageNotFoundError:       # run from its source, without being installed
        known = []
    needed = [line.partition(";")[0].strip() for line in known if re.search(rf"""extra == ['"]{extra}['"]""", line)]
    constraints = Path(__file__).resolve().parents[2] / "constraints.txt"
    asked = ["-c", str(constraints)] if constraints.is_file() else []
    return " ".join(f'"{word}"' if re.search(r"[\s<>=;&()\[]", word) else word
                    for word in (sys.executable, "-m", "pip", "install", *asked, *(needed or [f"tsotsallm[{extra}]"])))


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the known word closest to a mistyped one, with all known words listed."""
    import difflib

    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(known)})"
