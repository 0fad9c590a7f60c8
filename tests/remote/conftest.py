"""A hub on this machine, for the client in this process and for commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import build
from tests.remote.server import Hub, running
from tsotsallm.remote import transfer


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one` in one file, `shards` tied and in several, `other` with other weights than `one`."""
    folder = tmp_path_factory.mktemp("models")
    return {"one": build(folder / "one", "llama2"), "other": build(folder / "other", "llama2", seed=1),
            "shards": build(folder / "shards", "smollm", shard="100KB")}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client in this process talks to, with caches of its own and quick retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            server.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("TSOTSALLM_CACHE", str(tmp_path / "cache"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(transfer, "PATIENCE", replace(
            transfer.PATIENCE, tries=4, first_s=0.01, most_s=0.02, again_s=0.0))
        close_session()
        yield server
        close_session()


@pytest.fixture
def hub_environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment in which a command talks to the hub on this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf-home"), "NO_PROXY": "127.0.0.1",
                   "TSOTSALLM_CACHE": str(tmp_path / "cache")}
