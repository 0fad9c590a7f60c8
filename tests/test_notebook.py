"""The notebook for students runs from top to bottom, and shows what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "reduce_a_llama.ipynb"


def read() -> Any:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is in the extra [dev]")
    return nbformat.read(NOTEBOOK, as_version=4)


def kinds(notebook: Any) -> list[set[str]]:
    """What each code cell shows: the types of its data, and `stream` for what it prints."""
    return [{kind for output in cell.outputs for kind in (output.get("data") or {"stream": None})}
            for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_kept_with_the_outputs_of_one_run() -> None:
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(shown for cell, shown in zip(cells, kinds(read()), strict=True) if "def " not in cell.source)
    printed = "".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream")
    assert not re.search(r"/(tmp|root|home|work|Users)/|warning|Traceback", printed, re.IGNORECASE)
    compared = [line.split("  ")[0] for line in printed.splitlines() if "difference from" in line]
    assert len(compared) == len(set(compared)) > 1
    assert NOTEBOOK.stat().st_size < 400_000


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is in the extra [dev]")
    for extra, package in (("ipykernel", "ipykernel"), ("report", "matplotlib"), ("gguf", "gguf")):
        pytest.importorskip(package, reason=f"{package} is in the extra [{extra}]")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = read()
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
                            ).execute()
    assert kinds(notebook) == kinds(read())
    told = {number: cell for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    outputs = [output for cell in told.values() for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "4.00 MB" in said or "3.9" in said
    learned = next(line for line in said.splitlines() if "after learning" in line)
    before, after = (float(part.split("KL ")[-1].split(": ")[-1]) for part in learned.split("; "))
    assert after < before
