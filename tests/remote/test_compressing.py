"""Compressing from the hub gives the bytes that compressing from a directory gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.remote.server import Faults, Hub
from tsotsallm.checkpoint.hub_source import HubSource, Streamed
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.compression import compress, plan
from tsotsallm.errors import CheckpointError, HubError
from tsotsallm.run.work import PIN

NAME = "own/model"


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a result that must not depend on where its source was read."""
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file() and path.name not in ("tsotsallm.json", "tsotsallm.run.json", "README.md")}


def provenance(directory: Path) -> dict[str, object]:
    """What tsotsallm.json says, without the model's name."""
    content = json.loads((directory / "tsotsallm.json").read_text("utf-8"))
    del content["source"]
    return dict(content)


@pytest.mark.parametrize(("family", "recipe"), [("one", "rtn:4:32"), ("shards", "wanda:2:4, gptq:4:32")])
def test_the_bytes_are_those_from_a_directory(models: dict[str, Path], hub: Hub, tmp_path: Path, text: Path, family: str,
                                              recipe: str) -> None:
    hub.add(NAME, models[family])
    settings = {"windows": 2, "window": 32, "calibration": text} if "gptq" in recipe else {}
    compress(models[family], recipe, tmp_path / "local", **settings)        # type: ignore[arg-type]
    compress(f"hub:{NAME}", recipe, tmp_path / "remote", **settings)        # type: ignore[arg-type]
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert provenance(tmp_path / "remote") == provenance(tmp_path / "local")
    assert json.loads((tmp_path / "remote" / "tsotsallm.json").read_text("utf-8"))["source"] == NAME
    weights = sum(path.stat().st_size for path in models[family].glob("*.safetensors"))
    assert hub.sent <= 1.02 * weights
    assert not [path for path in (tmp_path / "cache" / "hub").rglob("*") if path.is_file()]      # forgotten
    assert not list((tmp_path / "hf").rglob("*.safetensors"))


def test_a_bare_id_is_streamed_and_a_bound_keeps_pieces_for_the_next_command(models: dict[str, Path], hub: Hub,
                                                                            tmp_path: Path) -> None:
    hub.add(NAME, models["one"])
    compress(NAME, "rtn:4:32", tmp_path / "first", cache_bytes=100_000_000)
    sent = hub.sent
    compress(f"{NAME}@main", "rtn:4:32", tmp_path / "second", cache_bytes=100_000_000)
    assert hub.sent == sent
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_every_fault_at_once_costs_few_bytes(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, models["one"])
    compress(models["one"], "rtn:4:32", tmp_path / "local")
    hub.faults = Faults(cuts=[0, 1, 1000, 70_000, 0, 5], answers=[(503, {"Retry-After": "0"}), (429, {})], rate=0.2)
    compress(f"hub:{NAME}", "rtn:4:32", tmp_path / "remote")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert hub.sent <= 1.05 * sum(path.stat().st_size for path in models["one"].glob("*.safetensors"))


def test_a_resumed_run_reads_the_commit_that_it_began_with(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, models["one"])
    compress(models["one"], "rtn:4:32", tmp_path / "local")
    hub.faults.quota = 300_000
    with pytest.raises(HubError, match="are kept: run the same command again"):
        compress(f"hub:{NAME}", "rtn:4:32", tmp_path / "out")
    partial = tmp_path / "out.partial"
    assert json.loads((partial / PIN).read_text("utf-8"))["pinned"] == f"hub:{NAME}@{'a' * 40}"
    sent, hub.faults = hub.sent, Faults()
    hub.add(NAME, models["other"], "b" * 40)
    compress(f"hub:{NAME}", "rtn:4:32", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert sent > 0
    assert hub.sent <= 1.02 * sum(path.stat().st_size for path in models["one"].glob("*.safetensors"))


def read_all(checkpoint: Checkpoint) -> None:
    for record in checkpoint.records.values():
        record.read()


def test_a_damaged_file_is_noticed_when_all_of_it_has_passed(models: dict[str, Path], hub: Hub) -> None:
    hub.add(NAME, models["one"])
    checkpoint = Checkpoint.streamed(f"hub:{NAME}")
    assert isinstance(checkpoint.source, HubSource)
    hub.faults.flipped = True
    with pytest.raises(CheckpointError, match="does not have the checksum that the hub gives"):
        read_all(checkpoint)


def test_a_file_of_which_a_part_is_read_counts_as_not_verified(models: dict[str, Path], hub: Hub) -> None:
    hub.add(NAME, models["one"])
    checkpoint = Checkpoint.streamed(f"hub:{NAME}")
    assert isinstance(checkpoint.source, Streamed)
    assert checkpoint.source.unverified() == [f"hub:{NAME}/model.safetensors"]
    read_all(checkpoint)
    assert checkpoint.source.unverified() == []


def test_plan_says_both_ways_and_chooses(models: dict[str, Path], hub: Hub, tmp_path: Path, text: Path) -> None:
    hub.add(NAME, models["one"])
    size = sum(path.stat().st_size for path in models["one"].glob("*.safetensors"))
    once = plan(f"hub:{NAME}", "rtn:4:32", tmp_path / "out").download
    assert once is not None
    assert (once.way, once.whole_bytes, once.streamed_bytes, once.layer_visits) == ("streamed", size, size, 1)
    assert plan(models["one"], "rtn:4:32", tmp_path / "out").download is None
    assert hub.sent < size / 2
