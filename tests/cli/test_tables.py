"""What tables prints: the folder of a world, and scores; right answers score all, none scores nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import within


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables") / "world"
    assert within("tables", "world", "-o", folder, "--count", 3, "--seed", 5).stdout.strip() == str(folder)
    return folder


def submitted(world: Path, folder: Path, share: int = 1) -> Path:
    """Every `share`-th right answer, as `annotate` would write it."""
    folder.mkdir()
    for task in ("cea", "cta", "cpa"):
        lines = (world / "gold" / f"{task}_gt.csv").read_text("utf-8").splitlines(keepends=True)
        (folder / f"{task}.csv").write_text("".join(lines[::share]), "utf-8")
    return folder


def test_right_answers_score_all_and_half_of_them_recall_half(world: Path, tmp_path: Path) -> None:
    assert len(list((world / "tables").glob("*.csv"))) == 3
    right, half = submitted(world, tmp_path / "right"), submitted(world, tmp_path / "half", 2)
    found = json.loads(within("tables", "score", right, half, "--gold", world / "gold", "--json").stdout)
    for one in found:
        if not one["domain"] and one["measure"] in ("precision", "F1", "f1"):
            assert one["values"][0] == pytest.approx(1.0)
    cells = [one for one in found if one["task"] == "cea" and not one["domain"]]
    recall = next(one for one in cells if one["measure"] == "recall")
    assert recall["values"] == [pytest.approx(1.0), pytest.approx((recall["targets"] + 1) // 2 / recall["targets"])]
    shown = within("tables", "score", right, half, "--gold", world / "gold", "--tasks", "cea").stdout
    assert "100.0" in shown
    assert "CTA (" not in shown.replace("CTA is", "")
    assert "half − right" in shown


def test_a_world_is_not_written_over_and_the_same_seed_writes_the_same(world: Path, tmp_path: Path) -> None:
    found = within("tables", "world", "-o", world, check=False)
    assert found.exit_code == 1
    assert "exists; choose another name" in found.stderr
    within("tables", "world", "-o", tmp_path / "again", "--count", 3, "--seed", 5)
    within("tables", "world", "-o", tmp_path / "other", "--count", 3)
    written = [sorted(path.read_bytes() for path in (folder / "tables").iterdir())
               for folder in (world, tmp_path / "again", tmp_path / "other")]
    assert written[0] == written[1] != written[2]
