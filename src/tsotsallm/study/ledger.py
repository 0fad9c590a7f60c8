"""Every trial of a study in SQLite, and the study's lab notebook: plan, implement, revise, re-implement."""

from __future__ import annotations

import csv
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from tsotsallm.errors import StudyError
from tsotsallm.files import DATA_BYTES, JsonObject, one_line, quoted, read_bytes
from tsotsallm.journal import differences

FILE, DIARY = "ledger.sqlite", "trials.jsonl"
Status = Literal["running", "done", "failed"]
Phase = Literal["plan", "implement", "revise", "re-implement"]
NOT_REPEATABLE = ("seconds", "cpu_seconds", "energy_wh", "began", "ended", "worker", "reused", "machine", "speed")
"""Facts that differ when a trial is repeated with the same result."""

MEASURED = {"model": ("bytes",), "cheap": ("kl", "kl_error", "perplexity"), "full": ("kl", "kl_error", "perplexity")}
"""Numbers of a trial's evaluations."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS study (id INTEGER PRIMARY KEY CHECK (id = 1), content TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS trials (number INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, status TEXT NOT NULL,
                                   content TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS notes (number INTEGER PRIMARY KEY, cycle INTEGER NOT NULL, phase TEXT NOT NULL,
                                  content TEXT NOT NULL, UNIQUE (cycle, phase));
"""


@dataclass(frozen=True)
class Trial:
    """One recipe that was tried, why, and with what result.

    key       hash of the recipe; a study tries no recipe twice
    based_on  numbers of the earlier trials that the reason refers to
    measures  by evaluation: {"cheap": {...}, "full": {...}}, and "model" with bytes and parameters
    facts     hashes, versions, machine, protocol, seconds, energy, pieces taken from the store
    """

    number: int
    key: str
    name: str
    recipe: list[JsonObject]
    values: dict[str, object]
    reason: str
    based_on: tuple[int, ...] = ()
    status: Status = "running"
    measures: JsonObject = field(default_factory=dict)
    facts: JsonObject = field(default_factory=dict)
    error: str = ""

    @property
    def level(self) -> str:
        """The most thorough evaluation that the trial had: cheap, full, or none."""
        return next((level for level in ("full", "cheap") if level in self.measures), "none")

    def measure(self, name: str) -> float | None:
        """A number from the trial's most thorough evaluation, or of the model itself; None where it was not measured."""
        value = self.measures.get(self.level, {}).get(name, self.measures.get("model", {}).get(name))
        return None if value is None else float(value)

    def plain(self, *, repeatable: bool = False) -> dict[str, object]:
        """The trial as plain data; `repeatable` leaves out times, energy and machines."""
        facts = {name: value for name, value in self.facts.items() if not (repeatable and name in NOT_REPEATABLE)}
        return {"number": self.number, "key": self.key, "name": self.name, "recipe": self.recipe, "values": self.values,
                "reason": self.reason, "based_on": list(self.based_on), "status": self.status, "measures": self.measures,
                "facts": facts, "error": self.error}



class Ledger:
    """A study's folder: ledger.sqlite, and trials.jsonl, from which it can be restored.

    Every method raises StudyError where the database is damaged or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path, self.diary = folder / FILE, folder / DIARY
        folder.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self._guarded():
            self._base = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            if self._base.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("its pages are damaged")
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.executescript(SCHEMA)
        if new and self.diary.exists():
            self._from_diary()

    def close(self) -> None:
        """Close the database."""
        self._base.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StudyError(f"{self.path} cannot be written ({error}); make room or correct its permissions, then run the "
                             "same command again: finished trials are kept") from None
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{self.path} is damaged ({one_line(error)}); delete or move that one file and run the same "
                             f"command again: it is restored from {DIARY} beside it, so that no finished trial is lost"
                             ) from None
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise StudyError(f"{self.folder} holds a study that cannot be read ({type(error).__name__}: {one_line(error)}); "
                             f"restore {FILE} or {DIARY} from a copy, or choose another folder with -o") from None

    # -- the study ----------------------------------------------------------------------------------------------------

    def begin(self, study: Mapping[str, object]) -> None:
        """Record what is studied; raises StudyError where the folder holds another study."""
        before = self.study()
        wanted = json.loads(json.dumps(study))
        if before is not None and before != wanted:
            causes = {key: wanted[key] for key in ("name", "model", "spec") if key in wanted}   # all else follows from them
            changed = differences(before, causes) or differences(before, dict.fromkeys(before) | wanted)
            raise StudyError(f"{self.folder} holds a study that was begun differently ({'; '.join(changed)}); continue with "
                             "the same spec and model, or choose another folder with -o")
        if before is None:
            with self._guarded():
                self._base.execute("INSERT INTO study VALUES (1, ?)", [json.dumps(wanted)])
            self._write({"study": wanted})

    def study(self) -> JsonObject | None:
        """What is studied, as `begin` recorded it; None before that."""
        with self._guarded():
            row = self._base.execute("SELECT content FROM study").fetchone()
            return None if row is None else dict(json.loads(row[0]))

    # -- trials -------------------------------------------------------------------------------------------------------

    def add(self, trial: Trial) -> None:
        """Begin a trial; raises StudyError where its recipe was tried before."""
        try:
            with self._guarded():
                self._base.execute("INSERT INTO trials VALUES (?, ?, ?, ?)",
                                   [trial.number, trial.key, trial.status, json.dumps(trial.plain())])
        except StudyError:
            if trial.key in {earlier.key for earlier in self.trials()}:
                raise StudyError(f"the recipe of trial {trial.number} was tried before") from None
            raise

    def settle(self, trial: Trial) -> None:
        """Write the result of a trial to the database and to the diary."""
        with self._guarded():
            self._base.execute("UPDATE trials SET status = ?, content = ? WHERE number = ?",
                               [trial.status, json.dumps(trial.plain()), trial.number])
        self._write({"trial": trial.plain()})

    def forget(self, number: int) -> None:
        """Drop a trial that was interrupted."""
        with self._guarded():
            self._base.execute("DELETE FROM trials WHERE number = ? AND status = 'running'", [number])

    def trials(self, status: Status | None = None) -> list[Trial]:
        """All trials by number, or those of one status."""
        with self._guarded():
            rows = self._base.execute("SELECT content FROM trials ORDER BY number").fetchall()
            trials = [_trial(json.loads(row[0])) for row in rows]
        return [trial for trial in trials if status is None or trial.status == status]

    # -- the notebook -------------------------------------------------------------------------------------------------

    def note(self, cycle: int, phase: Phase, text: str, trials: Sequence[int] = ()) -> None:
        """Write one phase of a cycle into the notebook; a second entry replaces the first."""
        assert phase in get_args(Phase)
        content = json.dumps({"text": text, "trials": list(trials), "at": round(time.time(), 1)})
        with self._guarded():
            self._base.execute("INSERT INTO notes (cycle, phase, content) VALUES (?, ?, ?) "
                               "ON CONFLICT (cycle, phase) DO UPDATE SET content = excluded.content",
                               [cycle, phase, content])
        self._write({"note": {"cycle": cycle, "phase": phase, "content": content}})

    def notes(self) -> list[JsonObject]:
        """The notebook by cycle and phase: cycle, phase, text, trials, and the time `at` in seconds since 1970."""
        with self._guarded():
            rows = self._base.execute("SELECT cycle, phase, content FROM notes").fetchall()
            order = get_args(Phase)
            return sorted(({"cycle": cycle, "phase": phase, **json.loads(content)} for cycle, phase, content in rows),
                          key=lambda note: (note["cycle"], order.index(note["phase"])))

    # -- elsewhere ----------------------------------------------------------------------------------------------------

    def export_csv(self, path: Path) -> int:
        """Write one line per trial to a CSV file, with its measures in columns; returns the number of trials."""
        trials = self.trials()
        names = sorted({f"{level}.{name}" for trial in trials for level, measures in trial.measures.items()
                        for name, value in measures.items() if not isinstance(value, (dict, list))})
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["number", "name", "status", "recipe", "reason", *names, "seconds", "energy_wh", "error"])
            for trial in trials:
                measures = [trial.measures.get(level, {}).get(name, "") for level, _, name in
                            (column.partition(".") for column in names)]
                writer.writerow([trial.number, trial.name, trial.status, json.dumps(trial.recipe), trial.reason, *measures,
                                 trial.facts.get("seconds", ""), trial.facts.get("energy_wh", ""), trial.error])
        return len(trials)

    def _write(self, line: Mapping[str, object]) -> None:
        try:
            with self.diary.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StudyError(f"{self.diary} cannot be written ({error.strerror or error}); make room, then run the same "
                             "command again") from None

    def _from_diary(self) -> None:
        for line in read_bytes(self.diary, StudyError, DATA_BYTES).split(b"\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue                        # the last line was cut off
            with self._guarded():
                if "study" in entry:
                    self._base.execute("INSERT OR IGNORE INTO study VALUES (1, ?)", [json.dumps(entry["study"])])
                elif "trial" in entry:
                    trial = _trial(entry["trial"])
                    self._base.execute("INSERT OR REPLACE INTO trials VALUES (?, ?, ?, ?)",
                                       [trial.number, trial.key, trial.status, json.dumps(trial.plain())])
                elif "note" in entry:
                    note = entry["note"]
                    self._base.execute("INSERT OR REPLACE INTO notes (cycle, phase, content) VALUES (?, ?, ?)",
                                       [note["cycle"], note["phase"], note["content"]])


def _trial(plain: JsonObject) -> Trial:
    """A trial from plain data; raises TypeError where a field has the wrong type."""
    trial = Trial(**(plain | {"based_on": tuple(plain["based_on"])}))
    kinds = {"number": int, "key": str, "name": str, "recipe": list, "values": dict, "reason": str, "status": str,
             "measures": dict, "facts": dict, "error": str}
    for name, kind in kinds.items():
        if not isinstance(getattr(trial, name), kind):
            raise TypeError(f"{name} of a trial is {quoted(getattr(trial, name))}")
    if not all(isinstance(part, dict) for part in (*trial.recipe, *trial.measures.values())):
        raise TypeError("the recipe or the measures of a trial are not names with values")
    for level, measures in trial.measures.items():
        for name in MEASURED.get(level, ()):
            if not isinstance(measures.get(name, 0), (int, float)):
                raise TypeError(f"{name} of a trial is {quoted(measures[name])}")
    return trial
