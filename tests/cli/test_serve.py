"""serve and studio as commands: options reach the service, and what cannot start is one line."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.cli.running import within


def test_options_reach_the_service(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would listen is asked without a network; tests/serve has services that really listen."""
    from fastapi.testclient import TestClient

    asked = {"model": "small", "prompt": "one", "temperature": 0}

    def run(app: Any, place: socket.socket, say: Callable[[str], None]) -> None:
        assert place.getsockname()[1] > 0
        client = TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": "Bearer a-key-that-is-long"})
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["small"]
        answer = client.post("/v1/completions", json={**asked, "max_tokens": 5}).json()
        assert answer["choices"][0]["text"] == "".join(tsotsallm.generate(tiny, "one", tokens=5))
        assert client.post("/v1/completions", json={**asked, "max_tokens": 900}).json()["usage"]["completion_tokens"] <= 7
        assert client.post("/v1/completions", json={**asked, "prompt": "long " * 1000}).status_code == 413
        assert client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 401
        say("asked")

    monkeypatch.setattr("tsotsallm.serve.app.run", run)
    shown = within("serve", f"small={tiny}", "--port", 0, "--max-tokens", 7, "--max-body", "2kB",
                   "--api-key", "a-key-that-is-long").stdout
    assert shown.splitlines()[-1] == "asked"


def test_the_studio_makes_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi.testclient import TestClient

    def run(app: Any, _place: socket.socket, say: Callable[[str], None]) -> None:
        say(TestClient(app, base_url="http://127.0.0.1").get("/studio/choices").json()["folder"])

    monkeypatch.setattr("tsotsallm.serve.app.run", run)
    new = tmp_path / "new" / "models"
    assert within("studio", "--folder", new, "--port", 0).stdout.split() == [str(new)]
    assert new.is_dir()


@pytest.mark.parametrize(("arguments", "words"), [
    (["serve", "TINY", "--host", "0.0.0.0"], "key"), (["serve", "nowhere"], "does not exist"),
    (["serve", "TINY", "--max-body", "lots"], "--max-body is 'lots'"),
    (["studio", "--folder", "/dev/null/nowhere"], "cannot be a folder"),
    (["serve", "TINY", "--host", "256.1.2.3", "--api-key", "a-long-enough-key"], "256.1.2.3")])
def test_a_service_that_cannot_start_is_one_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 arguments: list[str], words: str) -> None:
    monkeypatch.chdir(tmp_path)
    found = within(*[str(tiny) if one == "TINY" else one for one in arguments], "--port", 0, check=False)
    assert found.exit_code == 1
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
