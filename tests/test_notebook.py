"""The notebook for students runs from top to bottom, and shows what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "reduce_a_llama.ipynb"


def read() -> Any:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is in the extra [dev]")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs() -> None:
    assert all(not cell.outputs and cell.execution_count is None for cell in read().cells if cell.cell_type == "code")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is in the extra [dev]")
    for extra, package in (("ipykernel", "ipykernel"), ("report", "matplotlib"), ("gguf", "gguf")):
        pytest.importorskip(package, reason=f"{package} is in the extra [{extra}]")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = read()
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
                            ).execute()
    told = {number: cell for number, cell in enumerate(notebook.cells) if cell.cell_type == "code"}
    outputs = [output for cell in told.values() for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 5
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "4.00 MB" in said or "3.9" in said
    learned = next(line for line in said.splitlines() if "after learning" in line)
    before, after = (float(part.split("KL ")[-1].split(": ")[-1]) for part in learned.split("; "))
    assert after < before
