"""The ledger keeps every trial, whatever happens to it or to its file."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tsotsallm.errors import StudyError
from tsotsallm.study.ledger import Ledger, Trial


def trial(number: int, key: str = "", **more: object) -> Trial:
    return Trial(number, key or f"key-{number}", f"trial {number}", [{"depth": {"remove": number}}],
                 {"depth.remove": number}, "one of all", **more)  # type: ignore[arg-type]


def filled(folder: Path) -> Ledger:
    ledger = Ledger(folder)
    ledger.begin({"model": "m"})
    for number in range(3):
        ledger.add(trial(number))
        measures = {"model": {"bytes": 10 * number}, "full": {"kl": 1.0 / (number + 1)}}
        ledger.settle(trial(number, status="done", measures=measures, facts={"seconds": 1.5}))
    ledger.note(0, "plan", "try three", [0, 1, 2])
    return ledger


def test_what_is_written_is_read(tmp_path: Path) -> None:
    filled(tmp_path).close()
    ledger = Ledger(tmp_path)
    assert [one.number for one in ledger.trials("done")] == [0, 1, 2]
    assert ledger.trials()[2].measure("kl") == pytest.approx(1 / 3)
    assert ledger.trials()[2].measure("bytes") == 20
    assert [note["text"] for note in ledger.notes()] == ["try three"]
    assert "seconds" not in ledger.trials()[0].plain(repeatable=True)["facts"]


def test_a_recipe_is_tried_once(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    with pytest.raises(StudyError, match="tried before"):
        ledger.add(trial(3, key="key-1"))


def test_an_interrupted_trial_can_be_forgotten_and_a_finished_one_cannot(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.add(trial(3))
    for number in (2, 3):
        ledger.forget(number)
    assert [one.number for one in ledger.trials()] == [0, 1, 2]


def test_another_study_is_refused(tmp_path: Path) -> None:
    ledger = filled(tmp_path)
    ledger.begin({"model": "m"})
    with pytest.raises(StudyError, match="model: m then, n now"):
        ledger.begin({"model": "n"})


@pytest.mark.parametrize("damage", [b"no database", b""])
def test_a_damaged_ledger_is_named_and_made_anew_from_its_diary(tmp_path: Path, damage: bytes) -> None:
    ledger = filled(tmp_path)
    before = [one.plain() for one in ledger.trials()]
    ledger.close()
    content = ledger.path.read_bytes()
    ledger.path.write_bytes(damage or content[:len(content) // 2])
    with pytest.raises(StudyError, match="no finished trial is lost"):
        Ledger(tmp_path)
    ledger.path.unlink()
    with (tmp_path / "trials.jsonl").open("a") as diary:
        diary.write('{"trial": {"number": 9, "ke')          # cut off by a kill
    again = Ledger(tmp_path)
    assert [one.plain() for one in again.trials()] == before
    assert again.study() == {"model": "m"}
    assert len(again.notes()) == 1


def test_the_table_has_a_line_for_every_trial(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "study")
    assert ledger.export_csv(tmp_path / "table.csv") == 3
    with (tmp_path / "table.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["full.kl"]) for row in rows] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert [row["model.bytes"] for row in rows] == ["0", "10", "20"]
