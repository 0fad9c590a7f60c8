"""What bundle prints of a folder that is checked, and what cannot be packed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.cli.running import within


def test_files_are_checked_against_their_sums(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / "models").mkdir(parents=True)
    contents = {"start.sh": b"#!/bin/sh\n", "models/a.gguf": b"GGUF"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "SHA256SUMS").write_text("".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n"
                                               for name, content in contents.items()))
    assert within("bundle", "verify", folder).stdout == "2 files are as they were written\n"
    (folder / "models" / "a.gguf").write_bytes(b"GGUf")
    found = within("bundle", "verify", folder, check=False)
    assert found.exit_code == 1
    assert f"models/a.gguf in {folder} is not what was written" in found.stderr


def test_a_folder_that_exists_and_a_platform_that_does_not_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for options, words in ((["-o", tmp_path / "there"], "exists already"),
                           (["-o", tmp_path / "out", "--platform", "amiga"], "there is no platform 'amiga'")):
        found = within("bundle", "embedded", *options, check=False)
        assert found.exit_code == 1
        assert len(found.stderr.splitlines()) == 1
        assert words in found.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


def test_a_model_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    found = within("bundle", tmp_path / "none.gguf", "-o", tmp_path / "out", check=False)
    assert found.exit_code == 1
    assert "none.gguf" in found.stderr
    assert not list(tmp_path.iterdir())


def test_what_stands_under_the_name_of_unfinished_work_is_not_deleted(tmp_path: Path) -> None:
    """A stopped compression keeps hours of work in OUT.partial; so may anybody keep anything."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("years")
    within("bundle", tmp_path / "none.gguf", "-o", tmp_path / "out", check=False)
    assert (tmp_path / "out.partial" / "thesis.txt").read_text() == "years"
