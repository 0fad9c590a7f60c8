"""SemTab's measures against closed forms and a naive count."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import shared
from tsotsallm.errors import TablesError
from tsotsallm.tables.scoring import Gold, domain_of, read_answers, read_gold, score, type_score

GOLD = Gold({"cea": {}, "cta": {("t", "0"): frozenset({"k"})}, "cpa": {}}, {"k": {f"u{step}": step for step in range(1, 8)}},
            {"k": {f"d{step}": step for step in range(1, 6)}})


@pytest.mark.parametrize(("given", "right"), [
    ("k", 1.0), ("u1", 0.8), ("u2", 0.64), ("u5", 0.8 ** 5), ("u6", 0.0), ("d1", 0.7), ("d3", 0.7 ** 3), ("d4", 0.0),
    ("x", 0.0)])
def test_types_above_and_below_count_in_part(given: str, right: float) -> None:
    assert type_score(given, frozenset({"k"}), GOLD) == pytest.approx(right)


def submission(folder: Path, **tasks: str) -> Path:
    folder.mkdir()
    for task, text in tasks.items():
        (folder / f"{task}.csv").write_text(text, "utf-8")
    return folder


def test_precision_recall_and_f1(tmp_path: Path) -> None:
    gold = submission(tmp_path / "gold", cea_gt="t,1,0,A\nt,2,0,B C\nu,1,0,D\nu,2,0,E\n", cpa_gt="t,0,1,P\n")
    mine = submission(tmp_path / "mine", cea="t,1,0,A\nt,2,0,c\nu,1,0,X\nt,9,9,Z\n", cpa="t,0,1,Q\n")
    found = {(one.task, one.measure): one.values[0] for one in score([mine], read_gold(gold))}
    assert found["cea", "precision"] == pytest.approx(2 / 3)            # what is no target does not count
    assert found["cea", "recall"] == pytest.approx(2 / 4)
    assert found["cea", "F1"] == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert found["cpa", "F1"] == 0


def test_two_submissions_are_compared_on_the_same_tables(tmp_path: Path) -> None:
    rng = random.Random(0)
    targets = [(f"CTRL_WIKI_{rng.choice(('GEO', 'POL'))}_t{table}", row) for table in range(30) for row in range(5)]
    gold = submission(tmp_path / "gold", cea_gt="".join(f"{table},{row},0,right\n" for table, row in targets))
    folders = [submission(tmp_path / name, cea="".join(
        f"{table},{row},0,{'right' if rng.random() < share else 'wrong'}\n" for table, row in targets))
        for name, share in (("worse", 0.5), ("better", 0.9))]
    found = score(folders, read_gold(gold), domains=domain_of)
    assert [one.domain for one in found] == [""] * 3 + ["GEO"] * 3 + ["POL"] * 3
    whole = found[0]
    naive = [sum(line.endswith("right") for line in (folder / "cea.csv").read_text().splitlines()) / len(targets)
             for folder in folders]
    assert whole.values == pytest.approx(naive)
    difference = whole.differences[1]
    assert difference is not None
    assert difference.value == pytest.approx(naive[1] - naive[0])
    assert difference.low > 0.2
    assert not difference.within_noise
    assert sum(one.targets for one in found if one.measure == "F1" and one.domain) == len(targets)
    same = score([folders[0], folders[0]], read_gold(gold))[0].differences[1]
    assert same is not None
    assert (same.value, same.low, same.high) == (0, 0, 0)


@pytest.mark.parametrize(("text", "message"), [("t,1,0\n", "line 1 has 3 parts"),
                                               ("t,1,0,A\nt,1,0,B\n", "line 2 answers t, 1, 0 a second time")])
def test_a_submission_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TablesError, match=message):
        read_answers(submission(tmp_path / "s", cea=text), "cea")
    with pytest.raises(TablesError, match=r"cta\.csv does not exist"):
        read_answers(tmp_path / "s", "cta")
    with pytest.raises(TablesError, match="holds no gold"):
        read_gold(submission(tmp_path / "gold"))


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0b", "\x0c", "\x1c"])
def test_lines_of_submissions_end_at_line_feeds_alone(tmp_path: Path, mark: str) -> None:
    folder = submission(tmp_path / "s", cea=f"\ufefft{mark}t,1,0,A{mark}B\r\n")
    assert read_answers(folder, "cea") == {(f"t{mark}t", "1", "0"): f"a{mark}b"}


@pytest.mark.parametrize(("name", "content", "message"), [
    ("cea_gt.csv", b'"' + b"x" * 200_000, r"cea_gt\.csv, line 1 has a cell of 200001 characters"),
    ("cea_gt.csv", b"t,1,0,A\nt,2,0,\xff\n", r"cea_gt\.csv, line 2 is not UTF-8"),
    ("cta_ancestor.json", b"[1]", "does not map types"), ("cta_ancestor.json", b'{"a": {"b": "c"}}', "does not map types"),
    ("cta_ancestor.json", b'{"a": ' * 200 + b"1" + b"}" * 200, "nests objects"),
    ("cta_ancestor.json", b'{"a\\ud800": {}}', "surrogate")])
def test_a_gold_that_is_none_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "cpa_gt.csv").write_text("t,0,1,http://x/p\n")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TablesError, match=message):
        read_gold(tmp_path)


def test_the_golds_at_hand() -> None:
    hard = read_gold(shared("data", "semtab", "HardTablesR1-valid", "gt"))
    assert {task: len(targets) for task, targets in hard.targets.items()} == {"cea": 1406, "cta": 240, "cpa": 319}
    kind = next(iter(hard.ancestors))
    assert type_score(kind, frozenset({kind}), hard) == 1
    tough = read_gold(shared("data", "semtab", "toughtables-dbpedia"))
    assert tough.tasks == ("cea",)
    assert len(tough.targets["cea"]) > 40_000


def test_tables_are_drawn_whole() -> None:
    from tsotsallm.tables.scoring import _by_table

    items = {("a", "1"): (1.0, 1.0, 1.0), ("a", "2"): (0.0, 1.0, 1.0), ("b", "1"): (0.0, 0.0, 1.0)}
    assert np.array_equal(_by_table(items, list(items)), [[1, 2, 2], [0, 0, 1]])
