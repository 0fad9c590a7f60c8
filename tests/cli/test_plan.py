"""What plan prints: a row for every pass, and what the whole takes; nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import within
from tests.compressing import THREE_STAGES


@pytest.mark.usefixtures("wide")
def test_passes_and_totals_are_printed(tiny: Path, tmp_path: Path) -> None:
    found = json.loads(within("plan", tiny, THREE_STAGES, "-o", tmp_path / "out", "--json").stdout)
    shown = within("plan", tiny, THREE_STAGES, "-o", tmp_path / "out", "--windows", 8, "--window", 64).stdout
    assert "│ 1. depth + sparsity + quantize " in shown
    assert "calibration 8 windows of 64 tokens" in shown
    assert f"parameters  {found['parameters']:,} -> {found['result_parameters']:,}" in shown
    assert [sweep["stages"] for sweep in found["sweeps"]] == [["depth", "sparsity", "quantize"]]
    assert found["result_bytes"] < found["bytes"]
    assert not list(tmp_path.iterdir())


def test_keeping_stages_makes_a_pass_of_each(tiny: Path) -> None:
    found = json.loads(within("plan", tiny, "wanda:2:4, gptq:4:32", "--keep-stages", "--json").stdout)
    assert [sweep["stages"] for sweep in found["sweeps"]] == [["sparsity"], ["quantize"]]
