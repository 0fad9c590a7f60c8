"""Records are read from plain data by their fields' types, and written as the same plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tsotsallm.errors import CheckpointError
from tsotsallm.journal import ENTRIES, Chosen, Finished, Journal, LayerWritten, Noted
from tsotsallm.records import Brief, Record
from tsotsallm.training.loop import Curve


@dataclass(frozen=True)
class Inner(Brief):
    name: str
    size: int | None = None


@dataclass(frozen=True)
class Outer(Record):
    pairs: list[tuple[int, float]]
    inner: dict[str, Inner | None]
    names: tuple[str, ...] = ()
    more: dict[str, object] = field(default_factory=dict)
    none: int | None = None


def test_plain_data_makes_the_same_record_again() -> None:
    one = Outer([(1, 2.5)], {"a": Inner("x"), "b": None, "c": Inner("y", 3)}, ("p", "q"), {"deep": [{"z": 1}]})
    plain = json.loads(json.dumps(one.plain()))
    assert plain["inner"] == {"a": {"name": "x"}, "b": None, "c": {"name": "y", "size": 3}}
    assert plain["none"] is None
    assert Outer.parsed(plain) == one
    assert Outer.parsed(plain | {"unknown": 1}) == one


@pytest.mark.parametrize(("change", "fault"), [
    ({"pairs": [[1]]}, r"pairs\[0\] is \[1\]"), ({"pairs": [[1, "x"]]}, r"pairs\[0\]\[1\] is 'x'"),
    ({"pairs": [[True, 1.0]]}, "is True"), ({"pairs": None}, "it has no pairs"), ({"inner": [1]}, r"inner is \[1\]"),
    ({"inner": {"a": {}}}, "in inner.a it has no name"), ({"names": "pq"}, "names is 'pq'"), ({"more": 1}, "more is 1")])
def test_a_value_of_another_type_is_named(change: dict[str, object], fault: str) -> None:
    plain = Outer([(1, 2)], {}).plain() | change
    with pytest.raises(CheckpointError, match=f"^x.json is damaged: .*{fault}.*; restore it$"):
        Outer.read(plain, "x.json", CheckpointError, "restore it")


def test_every_kind_of_entry_comes_back_from_a_journal(tmp_path: Path) -> None:
    curve = Curve([(1, 2.0)], [(0, 3.0), (1, 2.5)], 1, "", 0.5)
    entries = [Chosen(0, 0, (1, 2), {"rounds": []}), Noted(0, 1, "layer 3", 1.5),
               LayerWritten(1, 0, None, {"q": None}, curve), LayerWritten(1, 1, "ab", {"q": {"type": "q8_0"}}), Finished(1)]
    journal = Journal(tmp_path / "journal.jsonl")
    for entry in entries:
        journal.add(entry)
    again = Journal(tmp_path / "journal.jsonl")
    assert again.entries == entries
    assert again.find(LayerWritten, 1) == entries[2:4]
    assert again.find(Noted, 0, 0) == []
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert lines[3] == '{"kind": "layer", "sweep": 1, "layer": 1, "sha256": "ab", "grids": {"q": {"type": "q8_0"}}}'


@pytest.mark.parametrize("line", [b"3", b"{}", b'{"kind": "layer", "sweep": 0}', b'{"kind": [], "sweep": 0}', b"\xff",
                                  b'{"kind": "nothing", "sweep": 0}'])
def test_a_damaged_line_is_cut_off_with_what_follows(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    whole = b'{"kind": "finished", "sweep": 0}\n'
    path.write_bytes(whole + line + b"\n" + whole)
    assert Journal(path).entries == [Finished(0)]
    assert path.read_bytes() == whole
    assert sorted(ENTRIES) == ["choice", "decision", "engine", "finished", "layer", "note", "surveyed", "trained", "weighed"]
