"""Three workers, one killed, the run stopped and resumed: every table once, and the bytes of a single process."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

import tsotsallm
from tests.cluster.computers import computers
from tsotsallm.api.computers import Computers
from tsotsallm.api.tables import write_world_tables
from tsotsallm.cluster.client import Cluster
from tsotsallm.cluster.worker import Failure
from tsotsallm.errors import TablesError
from tsotsallm.tables.annotate import Annotated

pytest.importorskip("distributed", reason="distributed is in the extra [cluster]")
pytestmark = pytest.mark.slow


def test_killed_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsotsallm.tables import jobs

    source = write_world_tables(tmp_path / "source", count=60)
    tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "alone", model="embedded")
    (tmp_path / "computers").mkdir()
    lines: list[str] = []
    kept: list[str] = []
    real = jobs._keep

    def keep(path: Path, found: list[Annotated]) -> None:
        kept.append(path.name)
        real(path, found)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_keep", keep)
    with computers(tmp_path / "computers", 3) as there:
        for name in ("one", "two", "three"):
            there.start(name, "--memory", "2GB")
        given = {"model": "embedded", "workers": Computers(there.address), "say": lines.append}
        with pytest.raises(KeyboardInterrupt):
            tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "out", **given)
        assert not (tmp_path / "out").exists()
        killer = threading.Timer(4.0, there.kill, ["one"])
        killer.start()
        found = tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "out", **given)
        killer.join()
    assert {"20 of 60 tables are done already", "24 of 60 tables are done already"} & set(lines)     # the last job has 4
    assert len(kept) == len(set(kept)) == 8
    assert not found.failed
    assert any("a worker has left" in line for line in lines)
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_worker_with_little_memory_gets_a_smaller_model_by_choice(tmp_path: Path) -> None:
    source = write_world_tables(tmp_path / "source", count=8)
    (tmp_path / "computers").mkdir()
    with computers(tmp_path / "computers", 1) as there:
        there.start("small", "--memory", "410MB")
        given = {"model": "embedded", "workers": Computers(there.address), "say": lambda _line: None}
        client = Cluster(there.address)
        while not client.workers:
            time.sleep(0.2)
        client.close()
        with pytest.raises(TablesError, match=r"8 tables could not be annotated, .* more than any worker has"):
            tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "none", **given)
        found = tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "out", smaller_model="none", **given)
    assert found.models == {"none": 8}
    tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "alone")
    assert (tmp_path / "out" / "cea.csv").read_bytes() == (tmp_path / "alone" / "cea.csv").read_bytes()
    assert json.loads((tmp_path / "out" / "tables.json").read_text("utf-8"))["models"] == {"none": 8}


def test_a_lost_job_is_reported_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tsotsallm.tables import jobs

    source = write_world_tables(tmp_path / "source", count=20)
    real = jobs._here

    def losing(*given: object) -> object:
        for number, found in real(*given):      # type: ignore[arg-type]
            yield number, Failure("KilledWorker") if number == 1 else found

    monkeypatch.setattr(jobs, "_here", losing)
    with pytest.raises(TablesError, match="8 tables could not be annotated, such as W0T008: KilledWorker"):
        tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "out")
    monkeypatch.undo()
    lines: list[str] = []
    tsotsallm.annotate(source / "tables", source / "world.ttl", tmp_path / "out", say=lines.append)
    assert "12 of 20 tables are done already" in lines
