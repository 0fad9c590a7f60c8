"""Broken connections resume, and every refusal is one line with its remedy."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.remote.server import Faults, Hub
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import HubError
from tsotsallm.remote import file, transfer
from tsotsallm.remote.cache import PieceCache
from tsotsallm.remote.file import RemoteFile, Span
from tsotsallm.remote.transfer import Facts

NAME = "own/model"
SIZE = 700_000


def remote(hub: Hub, tmp_path: Path, limit: int = 1 << 30) -> tuple[RemoteFile, bytes]:
    """A file of SIZE bytes on the hub, and its content."""
    folder = tmp_path / "files"
    folder.mkdir(exist_ok=True)
    content = bytes(place * 7 % 251 for place in range(SIZE))
    path = folder / "data.safetensors"
    path.write_bytes(content)
    commit = hub.add(NAME, folder)
    digest = hub.sha256(path)
    facts = Facts(f"hub:{NAME}/data", f"{hub.url}/{NAME}/resolve/{commit}/data.safetensors", SIZE, digest, digest)
    return RemoteFile(facts, PieceCache(tmp_path / "pieces", "model", limit)), content


def read(found: RemoteFile, start: int = 0, size: int = SIZE) -> bytes:
    buffer = bytearray(size)
    got = found.read_into(start, memoryview(buffer))
    return bytes(buffer[:got])


@pytest.mark.parametrize("faults", [
    Faults(cuts=[0, 0, 1, 10, 65_535, 0]), Faults(answers=[(503, {"Retry-After": "0"})] * 3), Faults(answers=[(403, {})]),
    Faults(answers=[(429, {"Retry-After": "0"}), (500, {}), (502, {})]), Faults(cuts=[100], answers=[(504, {})], rate=1.0),
], ids=["cuts", "503", "expired", "429", "all"])
def test_what_breaks_resumes_where_it_broke(hub: Hub, tmp_path: Path, faults: Faults) -> None:
    found, content = remote(hub, tmp_path)
    hub.faults = faults
    assert read(found) == content
    assert found.verified
    assert hub.sent == SIZE == found.cache.received
    assert found.cache.again == 0


def test_a_server_that_asks_to_wait_is_obeyed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transfer.time, "sleep", waits.append)
    found, content = remote(hub, tmp_path)
    hub.faults.answers = [(503, {"Retry-After": "7"}), (429, {}), (503, {})]
    assert read(found, 0, 100) == content[:100]
    assert waits[:3] == [7.0, transfer.PATIENCE.wait_s(2), transfer.PATIENCE.wait_s(3)]
    assert waits[2] > waits[1] / 2


def test_a_wait_of_hours_is_an_error_that_says_so(hub: Hub, tmp_path: Path) -> None:
    found, _ = remote(hub, tmp_path)
    hub.faults.answers = [(429, {"Retry-After": "7200"})]
    with pytest.raises(HubError, match=r"asks to wait 7200 s \(429\); 0 B have arrived and are kept"):
        read(found)


def test_a_server_that_is_silent_counts_as_broken(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PATIENCE", replace(transfer.PATIENCE, silence_s=0.2))
    found, _ = remote(hub, tmp_path)
    hub.faults.slow = 30_000.0
    with pytest.raises(HubError, match=r"no new byte in 4 tries \(ReadTimeout"):
        read(found, 0, 100)


def test_a_slow_line_brings_everything(hub: Hub, tmp_path: Path) -> None:
    found, content = remote(hub, tmp_path)
    hub.faults.slow = 125_000.0         # 1 Mbit/s
    began = time.monotonic()
    assert read(found, 0, 125_000) == content[:125_000]
    assert time.monotonic() - began > 0.9


@pytest.mark.parametrize(("faults", "words"), [
    (Faults(no_ranges=True), "does not give parts of files"),
    (Faults(length=12345), "has 12345 bytes now, where the hub said"),
    (Faults(etag="f" * 64), "has changed while it was read"), (Faults(answers=[(416, {})]), "the server has no bytes 0 to"),
    (Faults(answers=[(503, {})] * 9), "still answers 503 at try 4"), (Faults(answers=[(401, {})]), "set HF_TOKEN"),
    (Faults(answers=[(429, {})] * 9), "429, too many requests, at try 4; HF_TOKEN allows more"),
    (Faults(answers=[(407, {})]), "cannot be reached through the proxy"),
    (Faults(cuts=[0] * 9), r"no new byte in 4 tries .*; 0 B have arrived and are kept: run the same command again")])
def test_what_no_patience_helps_is_one_line(hub: Hub, tmp_path: Path, faults: Faults, words: str) -> None:
    found, _ = remote(hub, tmp_path)
    hub.faults = faults
    with pytest.raises(HubError, match=words) as caught:
        read(found)
    assert "\n" not in str(caught.value)


def test_a_partly_received_piece_is_resumed_by_another_process(hub: Hub, tmp_path: Path) -> None:
    found, content = remote(hub, tmp_path)
    hub.faults.quota = 150_000
    with pytest.raises(HubError, match="are kept"):
        read(found)
    kept, hub.faults = hub.sent, Faults()
    again, _ = remote(hub, tmp_path)
    assert read(again) == content
    assert hub.sent == SIZE
    assert again.cache.received == SIZE - kept


def test_the_bound_holds_and_the_least_recently_used_go_first(hub: Hub, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "PIECE_BYTES", 100_000)
    found, content = remote(hub, tmp_path, limit=400_000)
    found.divide(1000, [Span(start, start + 100_000, f"layer {start}") for start in range(65_536, 600_000, 100_000)])
    for start in (0, 100_000, 200_000, 70_000, 300_000, 400_000, 80_000):
        assert read(found, start, 50) == content[start:start + 50]
        on_disk = sum(path.stat().st_size for path in (tmp_path / "pieces").rglob("*") if path.is_file())
        assert on_disk <= 400_000
    assert found.cache.again == 0               # the piece that was used again stayed
    assert found.cache.peak_bytes <= 400_000
    assert read(found) == content
    assert found.verified                       # now it has passed in order


def test_a_bound_that_holds_no_piece_is_refused(hub: Hub, tmp_path: Path) -> None:
    found, _ = remote(hub, tmp_path, limit=1000)
    with pytest.raises(HubError, match=r"cache_bytes is 1 kB; give at least 65\.5 kB"):
        read(found)


def test_the_token_stays_with_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      models: dict[str, Path]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add("with/token", models["one"])
    checkpoint = Checkpoint.streamed("hub:with/token")
    next(iter(checkpoint.records.values())).read()
    asked = {(server, token) for server, _, path, token in hub.requests if "safetensors" in path}
    assert asked == {("hub", "Bearer hf_secret"), ("storage", "")}


@pytest.mark.parametrize(("refused", "words"), [
    ((401, "GatedRepo"), "is gated: accept its licence on its hub page, then set HF_TOKEN"),
    ((403, "GatedRepo"), "is gated"), ((403, ""), r"refuses to give hub:own/model \(403\)"),
    ((401, "RepoNotFound"), "neither a local directory nor on the hub, or it is private"),
    ((404, "RepoNotFound"), "check the name"), ((404, "RevisionNotFound"), "has no such revision"),
    ((429, ""), "429, too many requests"), ((503, ""), "answers hub:own/model with 503, a fault of its own")])
def test_a_refusal_at_the_start_names_the_remedy(hub: Hub, refused: tuple[int, str], words: str) -> None:
    hub.faults.refused = refused
    with pytest.raises(HubError, match=words) as caught:
        Checkpoint.streamed(f"hub:{NAME}")
    assert "\n" not in str(caught.value)


def test_a_gated_model_whose_page_is_public(hub: Hub, models: dict[str, Path]) -> None:
    hub.add(NAME, models["one"])
    hub.faults.gated = True
    with pytest.raises(HubError, match="is gated: accept its licence on its hub page, then set HF_TOKEN"):
        Checkpoint.streamed(f"hub:{NAME}")


def test_names_that_do_not_exist_are_told_apart(hub: Hub, models: dict[str, Path]) -> None:
    hub.add(NAME, models["one"])
    for name, words in (("hub:no/model", "check the name"), (f"hub:{NAME}@older", "has no such revision"),
                        (f"hub:{NAME}/x.gguf", "the GGUF files there are none"),
                        ("hub:a/b/../c", "is not a name of a model")):
        with pytest.raises(HubError, match=words):
            Checkpoint.streamed(name)


def test_offline_and_unreachable_hubs_are_told_apart(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode is on; unset HF_HUB_OFFLINE"):
        Checkpoint.streamed(f"hub:{NAME}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.close()
    with pytest.raises(HubError, match=r"the hub cannot be reached \(.*; connect to the internet"):
        Checkpoint.streamed(f"hub:{NAME}")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    close_session()
    with pytest.raises(HubError, match=r"through the proxy|the hub cannot be reached through the proxy of HTTP_PROXY"):
        Checkpoint.streamed(f"hub:{NAME}")


def test_a_model_that_was_downloaded_whole_is_read_from_disk(hub: Hub, models: dict[str, Path],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add(NAME, models["shards"])
    assert Checkpoint.open(f"hub:{NAME}").directory.is_dir()
    sent = hub.sent
    assert Checkpoint.streamed(NAME).directory.is_dir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Checkpoint.streamed(f"hub:{NAME}@main").directory.is_dir()
    assert hub.sent == sent


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from tsotsallm.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match="reading a model of the hub needs the package huggingface_hub"):
        Checkpoint.streamed("hub:own/model")


