"""What inspect prints: a row for every part, and the same numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import tsotsallm
from tests.cli.running import within


def test_parts_and_widths_are_printed(tiny: Path) -> None:
    found = tsotsallm.inspect(tiny)
    shown = within("inspect", tiny).stdout
    for part, count in found.parameters_by_part.items():
        [row] = [line for line in shown.splitlines() if line.startswith(f"│ {part} ")]
        assert row.split("│")[2].strip() == f"{count:,}"
    assert f"{found.parameters:,}" in shown
    assert "llama: 4 layers, hidden 64, feed-forward 96, 4 heads of 16, 2 KV heads, vocabulary 256, context 256" in shown
    assert "stored as bfloat16, 16.00 bits per linear weight" in shown
    assert json.loads(within("inspect", tiny, "--json").stdout) == json.loads(json.dumps(found.plain()))


def test_layers_that_are_stored_once_are_told(tiny: Path, tmp_path: Path) -> None:
    tsotsallm.compress(tiny, [{"layers": {"order": [0, 1, 1, 1], "shared": True}}], tmp_path / "out")
    assert "4 layers (2 stored)" in within("inspect", tmp_path / "out").stdout
