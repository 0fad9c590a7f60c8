"""What annotate prints, and the files that it writes, for a table of towns."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.cli.running import within
from tests.tables.towns import TURTLE

TABLE = "City,Country\nRome,Italy\nParis,France\nParis,United States\n"


def test_cells_columns_and_pairs(tmp_path: Path) -> None:
    pytest.importorskip("pyoxigraph", reason="pyoxigraph is in the extra [graph]")
    pytest.importorskip("rapidfuzz", reason="rapidfuzz is in the extra [tables]")
    (tmp_path / "towns.csv").write_text(TABLE)
    (tmp_path / "towns.ttl").write_text(TURTLE, "utf-8")
    options = [tmp_path / "towns.csv", "--graph", tmp_path / "towns.ttl"]
    lines = within("annotate", *options, "-o", tmp_path / "out").stdout.splitlines()
    assert any(line.startswith("1 tables: ") and "6 cells" in line for line in lines)
    assert "decided by the graph alone (1 tables)" in lines
    assert lines[-1] == f"result {tmp_path / 'out'}"
    with (tmp_path / "out" / "cea.csv").open(encoding="utf-8") as file:
        cells = {(int(row), int(column)): entity for _, row, column, entity in csv.reader(file)}
    place = {name: f"http://x/{name}" for name in ("rome", "italy", "paris", "france", "texas", "usa")}
    assert cells == {(1, 0): place["rome"], (1, 1): place["italy"], (2, 0): place["paris"], (2, 1): place["france"],
                     (3, 0): place["texas"], (3, 1): place["usa"]}
    found = json.loads(within("annotate", *options, "-o", tmp_path / "again", "--tasks", "cea", "--json").stdout)
    assert found["tables"] == 1
    assert not (tmp_path / "again" / "cta.csv").exists()


@pytest.mark.parametrize(("options", "words"), [
    (["--tasks", "cea,cxa"], "cxa"), (["--gold", "nowhere"], "nowhere"), (["--graph", "none.ttl"], "none.ttl")])
def test_misuse_is_one_line_and_writes_nothing(tmp_path: Path, options: list[str], words: str) -> None:
    (tmp_path / "towns.csv").write_text(TABLE)
    (tmp_path / "towns.ttl").write_text(TURTLE, "utf-8")
    found = within("annotate", tmp_path / "towns.csv", "--graph", tmp_path / "towns.ttl", "-o", tmp_path / "out", *options,
                   check=False)
    assert found.exit_code == 1
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
