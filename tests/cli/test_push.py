"""What push prints: what would be uploaded, and where; nothing is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tsotsallm
from tests.cli.running import within


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_args: Any, **_options: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", asked)


def test_what_would_be_uploaded_is_listed(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out")
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"left over")
    lines = within("push", tmp_path / "out", "name/model").stdout.splitlines()
    names = {line.split()[-1] for line in lines[:-1]}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tsotsallm.json", "README.md"} <= names
    assert "pytorch_model.bin" not in names
    assert lines[-1] == "nothing was sent; with --upload this goes to name/model (private)"
    found = json.loads(within("push", tmp_path / "out", "name/model", "--public", "--json").stdout)
    assert (found["uploaded"], found["public"]) == (False, True)
    assert {name: (tmp_path / "out" / name).stat().st_size for name in names} == found["files"]


@pytest.mark.parametrize(("repository", "words"), [("model", "takes NAME/MODEL"), ("a/b/c", "takes NAME/MODEL"),
                                                   ("/model", "takes NAME/MODEL")])
def test_what_is_no_repository_is_one_line(tiny: Path, repository: str, words: str) -> None:
    found = within("push", tiny, repository, check=False)
    assert found.exit_code == 1
    assert words in found.stderr


def test_an_unfinished_result_is_not_offered(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    found = within("push", tmp_path / "out.partial", "name/model", check=False)
    assert found.exit_code == 1
    assert "it is not a finished result" in found.stderr
