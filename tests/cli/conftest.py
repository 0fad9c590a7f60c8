"""What tests of printing share."""

from __future__ import annotations

import pytest


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal on which no row of a table is folded."""
    monkeypatch.setenv("COLUMNS", "400")
