"""What analyze prints: the files that it drew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.running import within


def test_pictures_are_listed(tiny: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra [analysis]")
    (tmp_path / "text.txt").write_text(text.read_text()[:600])
    options = ["--text", tmp_path / "text.txt", "--tokens", 24, "--layers", "0,-1", "--heads", "1", "--picture", "svg"]
    listed = {Path(line) for line in within("analyze", tiny, "-o", tmp_path / "out", *options).stdout.splitlines()}
    assert listed
    assert all(path.exists() for path in listed)
    assert any(path.suffix == ".svg" for path in listed)
    assert not list((tmp_path / "out").rglob("*.png"))
    assert tmp_path / "out" / "analysis.json" in listed


@pytest.mark.parametrize(("options", "words"), [
    (["--layers", "first"], "'first' is not a list of numbers"), (["--picture", "jpg"], "it takes png or svg"),
    (["--layers", "99"], "99"), ([], "give a text to evaluate on")])
def test_misuse_is_one_line(tiny: Path, text: Path, tmp_path: Path, options: list[str], words: str) -> None:
    given = ["--text", text, "--tokens", 8] if options else []
    found = within("analyze", tiny, "-o", tmp_path / "out", *given, *options, check=False)
    assert found.exit_code == 1
    assert words in found.stderr
    assert len(found.stderr.splitlines()) == 1
