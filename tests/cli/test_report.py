"""What report prints: the page and how many pictures are beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

import tsotsallm
from tests.cli.running import within


def test_a_page_about_a_result(tiny: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra [report]")
    tsotsallm.compress(tiny, "rtn:4:32", tmp_path / "out")
    options = ["-o", tmp_path / "page.html", "--reference", tiny, "--text", text, "--limit", 1, "--tokens", 2]
    lines = within("report", tmp_path / "out", *options).stdout.splitlines()
    pictures = list((tmp_path / "page-pictures").iterdir())
    assert lines == [str(tmp_path / "page.html"), f"{len(pictures)} pictures beside it, in page-pictures"]
    page = (tmp_path / "page.html").read_text("utf-8")
    assert all(word in page for word in ("quantize", "KL", "rtn"))
    assert all(path.name in page or path.stem in page for path in pictures)


def test_what_is_no_result_is_one_line(tmp_path: Path) -> None:
    found = within("report", tmp_path / "nothing", "-o", tmp_path / "page.html", check=False)
    assert found.exit_code == 1
    assert "does not exist" in found.stderr
    assert not list(tmp_path.iterdir())
