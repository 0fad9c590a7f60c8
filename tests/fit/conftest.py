"""A small model, and settings, units and files for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import build


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers whose widths suit the simpler grids."""
    return build(tmp_path_factory.mktemp("fit") / "model", "llama3", dtype=torch.bfloat16, num_hidden_layers=3,
                 intermediate_size=128)
