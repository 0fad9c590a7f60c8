"""A run on a full disk, for real. Slow because it needs a mount, and skipped where mounting is not allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import build

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("force", [False, True])
def test_no_space_left_is_a_clear_error_and_work_goes_on_later(small_disk: Path, tmp_path: Path, text: Path,
                                                               force: bool) -> None:
    source = build(tmp_path / "source", "llama3", num_hidden_layers=8, hidden_size=192, intermediate_size=512)
    out = small_disk / "out"
    command = [sys.executable, "-m", "tsotsallm", "compress", str(source), "wanda:2:4", "-o", str(out),
               "--calibration", str(text), "--windows", "8", "--window", "64", *(["--force"] if force else [])]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert ("no space left" if force else "make room") in found.stderr
    assert not out.exists()
    if force:
        subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
        subprocess.run(command, check=True, capture_output=True)
        assert out.exists()
