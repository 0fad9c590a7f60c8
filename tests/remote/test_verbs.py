"""What commands make of a model on the hub: GGUF files, plans, measures, and a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cli.running import within
from tests.remote.server import Faults, Hub
from tests.remote.test_compressing import NAME, contents
from tsotsallm.api.evaluate import evaluate
from tsotsallm.api.export import to_gguf
from tsotsallm.api.inspect import inspect
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.compression import compress, plan
from tsotsallm.downloads import ROOM, fetch_if_room
from tsotsallm.errors import HubError
from tsotsallm.evaluation.examinee import Examinee
from tsotsallm.export.gguf import export_gguf
from tsotsallm.serve.jobs import Jobs
from tsotsallm.serve.wishes import Maker, Wish
from tsotsallm.units import human_bytes

TWICE = "[{depth: {remove: 1, protect: {first: 0, last: 0}}}, 'rtn:4:32']"


def weights(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


@pytest.fixture
def gguf(models: dict[str, Path], hub: Hub, tmp_path: Path) -> Path:
    """A GGUF file, which the hub has in a folder."""
    path = tmp_path / "repository" / "files" / "small-f16.gguf"
    path.parent.mkdir(parents=True)
    export_gguf(Checkpoint(models["one"]), path, dense="f16", name="small")
    hub.add("own/gguf", tmp_path / "repository")
    return path


def test_a_gguf_file_is_read_like_one_on_disk(gguf: Path, hub: Hub, tmp_path: Path) -> None:
    compress(gguf, "rtn:4:32", tmp_path / "local")
    compress("hub:own/gguf/files/small-f16.gguf", "rtn:4:32", tmp_path / "remote")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert hub.sent <= 1.02 * gguf.stat().st_size
    assert "base_model" not in (tmp_path / "remote" / "README.md").read_text("utf-8").split("---")[1]


def test_of_a_gguf_file_only_the_header_is_fetched_to_inspect_it(gguf: Path, hub: Hub) -> None:
    local, remote = inspect(gguf), inspect("hub:own/gguf/files/small-f16.gguf")
    assert remote.plain() | {"path": ""} == local.plain() | {"path": ""}
    assert hub.sent <= 1 << 16


def test_the_studio_plans_with_the_download(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, models["shards"])
    maker = Maker(Jobs(tmp_path))
    wish = Wish(model=f"hub:{NAME}", recipe="rtn:8:channel")
    facts = {fact["key"]: fact["value"] for fact in maker.plan(wish)["facts"]}      # type: ignore[attr-defined]
    planned = plan(f"hub:{NAME}", "rtn:8:channel")
    assert planned.download is not None
    assert facts["download"] == human_bytes(planned.download.bytes)
    for wrong in ("hub:../../etc", "hub:owner/no/such/../file.gguf", f"hub:{tmp_path}"):
        with pytest.raises(HubError, match="not a name of a model"):
            maker.plan(Wish(model=wrong, recipe="rtn:4"))


def test_a_checkpoint_is_inspected_without_its_tensors(models: dict[str, Path], hub: Hub) -> None:
    hub.add(NAME, models["shards"])
    assert inspect(f"hub:{NAME}").plain() | {"path": ""} == inspect(models["shards"]).plain() | {"path": ""}
    local = Checkpoint(models["shards"])
    assert Checkpoint.streamed(f"hub:{NAME}").fingerprint() == local.fingerprint()


def test_perplexity_and_export_are_those_of_the_directory(models: dict[str, Path], hub: Hub, text: Path,
                                                         tmp_path: Path) -> None:
    hub.add(NAME, models["shards"])
    local, remote = (evaluate(model, text, context=64, limit=2) for model in (models["shards"], f"hub:{NAME}"))
    assert local.perplexity == remote.perplexity
    for name, model in (("local.gguf", str(models["shards"])), ("remote.gguf", f"hub:{NAME}")):
        to_gguf(model, tmp_path / name, dense="f16", verify=False)
    sizes = [(tmp_path / name).stat().st_size for name in ("local.gguf", "remote.gguf")]
    assert abs(sizes[0] - sizes[1]) < 1000          # their names differ


def test_what_an_evaluation_is_known_by_does_not_depend_on_the_place(models: dict[str, Path], hub: Hub,
                                                                     tmp_path: Path) -> None:
    from tsotsallm.checkpoint.view import View

    hub.add(NAME, models["one"])
    one, other = (Examinee(View.of(checkpoint), "x", tmp_path) for checkpoint in (
        Checkpoint(models["one"]), Checkpoint.streamed(f"hub:{NAME}")))
    assert one.fingerprint == other.fingerprint
    assert hub.sent < weights(models["one"]) / 2


def test_plan_prints_both_ways(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, models["one"])
    printed = within("plan", f"hub:{NAME}", "rtn:4:32", "-o", tmp_path / "out").stdout
    assert "download    694 kB whole, with 694 kB more disk" in printed
    assert "694 kB layer by layer" in printed
    assert "chosen: layer by layer" in printed
    content = json.loads(within("plan", f"hub:{NAME}", TWICE, "-o", tmp_path / "out", "--json",
                             "--cache-bytes", "3MB", "--calibration", "self").stdout)
    assert (content["download"]["way"], content["download"]["layer_visits"]) == ("streamed", 2)
    refused = within("compress", f"hub:{NAME}", "rtn:4:32", "-o", tmp_path / "out", "--cache-bytes", "10kB",
                     check=False)
    assert refused.exit_code == 1
    local = within("plan", models["one"], "rtn:4:32", "--cache-bytes", "1GB", check=False)
    assert "is on this computer; leave it out" in local.stderr
    assert "--cache-bytes is 10 kB, but a layer or a matrix of hub:own/model and what is on its way take" in refused.stderr


def test_what_is_read_many_times_is_downloaded_where_the_disk_holds_it(models: dict[str, Path], hub: Hub,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, models["one"])
    said: list[str] = []
    monkeypatch.setattr("tsotsallm.downloads.free_disk_bytes", lambda _path: int(weights(models["one"]) / ROOM) - 1000)
    fetch_if_room(f"hub:{NAME}", said.append)
    assert "do not fit on the disk" in said.pop()
    monkeypatch.setattr("tsotsallm.downloads.free_disk_bytes", lambda _path: 10 ** 9)
    fetch_if_room(f"hub:{NAME}", said.append)
    assert "are downloaded whole first" in said.pop()
    assert Checkpoint.streamed(f"hub:{NAME}").directory.is_dir()
    fetch_if_room(f"hub:{NAME}", said.append)
    assert not said


def test_recipes_that_visit_layers_twice_download_whole_where_there_is_room(models: dict[str, Path], hub: Hub, text: Path,
                                                                            tmp_path: Path) -> None:
    hub.add(NAME, models["one"])
    said: list[str] = []
    settings = {"windows": 2, "window": 32, "calibration": text}
    compress(models["one"], TWICE, tmp_path / "local", **settings)    # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr("tsotsallm.checkpoint.hub_source.Streamed.least_cache_bytes", lambda _self, **_more: 500_000)
        compress(f"hub:{NAME}", TWICE, tmp_path / "whole", say=said.append, **settings)  # type: ignore[arg-type]
    assert "chosen: whole" in said[0]
    assert contents(tmp_path / "whole") == contents(tmp_path / "local")
    assert list((tmp_path / "hf").rglob("*.safetensors"))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_a_kill_in_the_middle_costs_nothing_that_was_received(models: dict[str, Path], hub: Hub, tmp_path: Path) -> None:
    hub.add(NAME, models["one"])
    compress(models["one"], "rtn:4:32", tmp_path / "local")
    hub.faults.slow = 300_000.0
    child = os.fork()
    if child == 0:
        try:
            compress(f"hub:{NAME}", "rtn:4:32", tmp_path / "out")
        finally:
            os._exit(0)
    patience = time.monotonic() + 60
    while hub.sent < 400_000 and time.monotonic() < patience:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not (tmp_path / "out").exists()
    hub.faults = Faults()
    compress(f"hub:{NAME}", "rtn:4:32", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert hub.sent <= 1.02 * weights(models["one"]) + 3 * 65_536       # what was on its way at the kill
