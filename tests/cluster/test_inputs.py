"""Files reach a worker whole or not at all: pieces in order, checked, resumed, begun anew where the whole is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tsotsallm.cluster import inputs
from tsotsallm.cluster.inputs import Bundle, files_named, local_path, next_piece, receive, received, with_local_paths
from tsotsallm.cluster.worker import _own_folder
from tsotsallm.errors import ClusterError


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(inputs, "PIECE", 1000)
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "empty.txt").write_text("")
    (folder / "more" / "weights.bin").write_bytes(bytes(range(256)) * 10)
    return folder


def send(bundle: Bundle, folder: Path, most: int = 100) -> int:
    there, count = received(bundle, folder), 0
    while count < most and (piece := next_piece(bundle, there)) is not None:
        there = receive(bundle, folder, *piece)
        count += 1
    return count


def test_a_bundle_arrives_as_it_was_sent(source: Path, tmp_path: Path) -> None:
    bundle, folder = Bundle.of(str(source)), tmp_path / "worker"
    assert send(bundle, folder, most=2) == 2
    assert send(bundle, folder) == 3                # goes on: 1 + 1 + 3 pieces in all
    found = folder / bundle.key
    assert local_path(bundle, folder) == found
    for name in ("config.json", "empty.txt", "more/weights.bin"):
        assert (found / name).read_bytes() == (source / name).read_bytes()
    assert next_piece(bundle, received(bundle, folder)) is None


def test_a_piece_that_changed_on_its_way_is_not_taken(source: Path, tmp_path: Path) -> None:
    bundle, folder = Bundle.of(str(source / "more" / "weights.bin")), tmp_path / "worker"
    piece = next_piece(bundle, {})
    assert piece is not None
    name, offset, content, sha256 = piece
    assert receive(bundle, folder, name, offset, b"x" + content[1:], sha256) == {}
    assert receive(bundle, folder, name, 500, content, sha256) == {}        # does not follow on what is there
    assert receive(bundle, folder, name, offset, content, sha256) == {name: 1000}
    send(bundle, folder)
    assert local_path(bundle, folder) == folder / bundle.key / name


def test_a_file_that_is_wrong_as_a_whole_is_begun_anew(source: Path, tmp_path: Path) -> None:
    bundle, folder = Bundle.of(str(source / "more" / "weights.bin")), tmp_path / "worker"
    part = folder / bundle.key / "weights.bin.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * 2000)                  # an earlier attempt left rubbish
    send(bundle, folder)
    assert (folder / bundle.key / "weights.bin").read_bytes() == (source / "more" / "weights.bin").read_bytes()


def test_what_the_worker_has_is_not_sent(source: Path, tmp_path: Path) -> None:
    bundle = Bundle.of(str(source))
    assert local_path(bundle, tmp_path / "worker") == source
    assert local_path(Bundle.of("embedded"), tmp_path / "worker") is not None
    (source / "config.json").write_text("[]")       # another version of the same name and length
    assert local_path(bundle, tmp_path / "worker") is None


def test_paths_in_recipes_are_those_of_the_worker(source: Path) -> None:
    name = str(source / "config.json")
    recipe = [{"vocabulary": {"keep": [name]}}, {"quantize": {"grid": "q4_k"}}]
    assert files_named(recipe) == {name}
    assert with_local_paths(recipe, {name: "/there"}) == [{"vocabulary": {"keep": ["/there"]}},
                                                          {"quantize": {"grid": "q4_k"}}]


def test_a_folder_serves_one_worker(tmp_path: Path) -> None:
    """Whatever the other worker's process is called."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as other:
        (tmp_path / "lock").write_text(json.dumps([other.pid, psutil.Process(other.pid).create_time()]))
        with pytest.raises(ClusterError, match="another worker uses"):
            _own_folder(tmp_path)
        other.communicate()
    assert _own_folder(tmp_path) == tmp_path


def test_all_parts_of_a_split_file_go_together(source: Path, tmp_path: Path) -> None:
    names = [f"m-0000{part}-of-00002.gguf" for part in (1, 2)]
    for name in names:
        (source / name).write_bytes(name.encode() * 100)
    bundle, folder = Bundle.of(str(source / names[1])), tmp_path / "worker"
    assert [name for name, _, _ in bundle.files] == names
    assert bundle.at(source / names[0])
    send(bundle, folder)
    assert local_path(bundle, folder) == folder / bundle.key / names[1]
    assert (folder / bundle.key / names[0]).read_bytes() == (source / names[0]).read_bytes()


def test_a_model_of_ollama_goes_as_its_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, digest = tmp_path / "ollama", "0f" * 32
    (store / "blobs").mkdir(parents=True)
    (store / "blobs" / f"sha256-{digest}").write_bytes(b"GGUF" * 600)
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model",
                                                "digest": f"sha256:{digest}"}]}))
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    bundle, folder = Bundle.of("ollama:tiny"), tmp_path / "worker"
    send(bundle, folder)
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "elsewhere"))
    assert local_path(bundle, folder) == folder / bundle.key / f"sha256-{digest}"
