"""Finished work is found again, whole or not at all; recipes that share it give the same bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tsotsallm.errors import ResourceError
from tsotsallm.store import Store, key_of


def digests(result: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in result.iterdir()
            if path.suffix in (".safetensors", ".json") and path.name != "tsotsallm.run.json"
            and not path.name.startswith("training-")}          # curves hold seconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(1000))
    return tmp_path / "folder"


def test_what_is_kept_is_found_until_it_is_damaged(tmp_path: Path, folder: Path) -> None:
    store = Store(tmp_path / "store", 10**6)
    assert store.find("pass", "a") is None
    store.keep("pass", "a", {"0": folder}, {"fact": 1})
    piece = Store(tmp_path / "store", 10**6).find("pass", "a")
    assert piece is not None
    assert store.facts(piece) == {"fact": 1}
    assert (piece / "0" / "file").read_bytes() == bytes(1000)
    os.truncate(piece / "0" / "file", 10)
    assert store.find("pass", "a") is None
    assert not piece.exists()


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, folder: Path) -> None:
    store = Store(tmp_path / "store", 2500)
    for place, key in enumerate("ab"):
        store.keep("pass", key, {"0": folder}, {})
        os.utime(tmp_path / "store" / f"pass-{key}", (place, place))
    assert store.find("pass", "a") is not None          # used again
    store.keep("pass", "d", {"0": folder}, {})
    assert [key for key in "abd" if store.find("pass", key)] == ["a", "d"]


def test_a_full_disk_keeps_nothing_and_stops_nobody(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store", 10**6)

    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tsotsallm.store.os.link", full)
    store.keep("pass", "a", {"0": folder}, {})
    assert store.find("pass", "a") is None
    assert list((tmp_path / "store").iterdir()) == []
    assert "full" in store.problems[0]


def test_a_place_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot hold finished work"):
        Store(tmp_path / "file", 1)


def test_keys_are_of_the_content() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})


@pytest.mark.parametrize(("first", "second", "shared"), [
    ([{"depth": {"remove": 1, "protect": {}}}, "wanda:2:4"], [{"depth": {"remove": 2, "protect": {}}}, "wanda:1:4"],
     ["measures"]),
    (["wanda:2:4", {"adapt": {"rank": 2, "steps": 2, "batch": 2, "window": 16}}, "gptq:4:32"],
     ["wanda:2:4", {"adapt": {"rank": 2, "steps": 2, "batch": 2, "window": 16}}, "gptq:3:32", "eora:2"], ["pass"]),
    (["gptq:mixed:6"], ["gptq:mixed:7"], ["measures", "sensitivities"]),
    ([{"neurons": {"feed_forward": 0.25}}, "gptq:q8_0"], [{"neurons": {"feed_forward": 0.25}}, "gptq:q4_0"], ["pass"]),
])
def test_recipes_that_share_work_give_the_same_bytes(tiny: Path, text: Path, tmp_path: Path, first: list[Any],
                                                     second: list[Any], shared: list[str]) -> None:
    store = Store(tmp_path / "store", 10**9)
    settings: dict[str, Any] = {"calibration": text, "windows": 4, "window": 32}
    tsotsallm.compress(tiny, first, tmp_path / "first", store=store, **settings)
    store.found.clear()
    tsotsallm.compress(tiny, second, tmp_path / "second", store=store, **settings)
    assert set(shared) <= set(store.found)
    tsotsallm.compress(tiny, second, tmp_path / "alone", **settings)
    assert digests(tmp_path / "second") == digests(tmp_path / "alone")
    store.found.clear()
    tsotsallm.compress(tiny, first, tmp_path / "again", store=store, **settings)
    assert digests(tmp_path / "again") == digests(tmp_path / "first")
