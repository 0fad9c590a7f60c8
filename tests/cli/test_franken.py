"""What franken prints: every order in short, with what it loses and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import within
from tsotsallm.evaluation import franken


@pytest.mark.usefixtures("wide")
def test_orders_are_printed_in_short(tiny: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, orders = franken.published()
    some = [one for one in orders if one.name in ("baseline", "only_odd_layers")]
    monkeypatch.setattr(franken, "published", lambda: (layers, some))
    options = ["--text", text, "--limit", 1]
    found = json.loads(within("franken", tiny, *options, "--json").stdout)
    assert [one["name"] for one in found] == ["baseline", "only_odd_layers"]
    lines = within("franken", tiny, *options).stdout.splitlines()
    for one, layers_shown in zip(found, ("0-3", "1, 3"), strict=True):
        [row] = [[cell.strip() for cell in line.split("│")[1:]] for line in lines if line.startswith(f"│ {one['name']} ")]
        assert row[1] == layers_shown
        assert row[2:4] == [f"{one['perplexity']:.4g}", f"{one['kl']:.3g}"]
    assert found[0]["macs_per_token"] > found[1]["macs_per_token"]


def test_a_text_is_needed(tiny: Path) -> None:
    found = within("franken", tiny, check=False)
    assert found.exit_code == 1
    assert "give a text to evaluate on" in found.stderr
