"""An export to a full disk, for real. Slow because it needs a mount, and skipped where mounting is not allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import build

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("form", ["--gguf", "--hf"])
def test_an_export_without_space_leaves_nothing_half_written(small_disk: Path, tmp_path: Path, form: str) -> None:
    source = build(tmp_path / "source", "llama3", num_hidden_layers=8, hidden_size=192, intermediate_size=512)
    out = small_disk / ("model.gguf" if form == "--gguf" else "plain")
    found = subprocess.run([sys.executable, "-m", "tsotsallm", "export", str(source), form, str(out)],
                           capture_output=True, text=True)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert "nothing half-written is left" in found.stderr
    assert not list(small_disk.iterdir())
