"""Commands run in a process of their own, or in this one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from typer.testing import CliRunner

from tsotsallm.cli import app


def tsotsallm(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `tsotsallm` with arguments in a process of its own."""
    found = subprocess.run([sys.executable, "-m", "tsotsallm", *map(str, arguments)], capture_output=True, text=True)
    if check:
        assert found.returncode == 0, found.stderr
    return found


def within(*arguments: object, check: bool = True) -> Any:
    """As `tsotsallm`, in this process, where the libraries are loaded already."""
    found = CliRunner().invoke(app, list(map(str, arguments)))
    if check:
        assert found.exit_code == 0, found.stderr
    return found
