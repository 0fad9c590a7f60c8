"""Errors that a user can correct. Each message says what was found, the rule, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_OPTION = re.compile(r"(?<!llama\.cpp: )(?<![\w-])--([a-z][a-z-]*)"
                     r"(?: (?:(cpu|self|b?f16|q8_0|[\d.]+ ?[kMGT]?B)|([A-Z]{2,}[.a-z]*|\d+))\b)?")
_GIVEN = re.compile(r"--set (\w+)=(\w+)")
_OUT = re.compile(r"(?<![\w-])-o\b")
_OTHER_NAMES = {"bytes": "size", "task": "tasks", "folder": "studio", "no-verify": "verify=False"} | {
    flag: f"{flag.replace('-', '_')}=True" for flag in ("restart", "force", "quick", "strict", "accept-differences")}
"""Option of a command -> argument of a function, where they differ."""
_readers = {"command line": 0}


@contextmanager
def read_on_a_command_line() -> Iterator[None]:
    """Meanwhile errors, of all threads, name options of commands; else they name arguments of functions, as in Python."""
    _readers["command line"] += 1
    try:
        yield
    finally:
        _readers["command line"] -= 1


class TsotsallmError(Exception):
    """Base of every error that the user can correct; the command line prints it without a traceback.

    param  the field of a request that it is about, where a service knows it
    """

    param: str | None = None

    def __str__(self) -> str:
        text = super().__str__()
        if _readers["command line"]:
            return text
        parts = text.split("`")         # every other part is a command, which stays
        return "`".join(part if place % 2 else _in_python(part) for place, part in enumerate(parts))


def _in_python(text: str) -> str:
    return _OUT.sub("out=PATH", _OPTION.sub(_as_argument, _GIVEN.sub(r'given={"\1": \2}', text)))


def _as_argument(found: re.Match[str]) -> str:
    name = _OTHER_NAMES.get(found[1], found[1].replace("-", "_"))
    value = f'"{found[2]}"' if found[2] else found[3]
    return name if value is None else f"{name}={value}"


class CheckpointError(TsotsallmError):
    """A checkpoint is missing, damaged or unsafe, or does not match its config."""


class HubError(TsotsallmError):
    """The hub cannot be reached, or does not give what was asked of it; finished work is kept."""


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
