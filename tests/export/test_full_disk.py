"""An export to a full disk, for real. Slow because it needs a mount, and skipped where mounting is not allowed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import build

pytestmark = pytest.mark.slow


WITHOUT_LOOKING = """
from tsotsallm import machine
machine.free_disk_bytes = lambda _folder: 10 ** 12
from tsotsallm.cli import main
main()
"""


@pytest.mark.parametrize("looks", [True, False], ids=["full-before", "filled-meanwhile"])
@pytest.mark.parametrize("form", ["--gguf", "--hf"])
def test_an_export_without_space_leaves_nothing_half_written(small_disk: Path, tmp_path: Path, form: str,
                                                             looks: bool) -> None:
    """A disk that is too small is seen before; one that others fill in the middle is not."""
    source = build(tmp_path / "source", "llama3", num_hidden_layers=8, hidden_size=192, intermediate_size=512)
    out = small_disk / ("model.gguf" if form == "--gguf" else "plain")
    program = ["-m", "tsotsallm"] if looks else ["-c", WITHOUT_LOOKING]
    found = subprocess.run([sys.executable, *program, "export", str(source), form, str(out)], capture_output=True, text=True)
    assert found.returncode == 1
    assert "Traceback" not in found.stderr
    assert ("of disk at" if looks else "nothing half-written is left") in found.stderr
    assert not list(small_disk.iterdir())
