"""--keep-stages: every intermediate model is a checkpoint of its own."""

from __future__ import annotations

from pathlib import Path

import tsotsallm
from tests.compressing import SMALL, THREE_STAGES
from tsotsallm.checkpoint.reader import Checkpoint


def test_keep_stages_keeps_each_model(tiny: Path, text: Path, tmp_path: Path) -> None:
    result = tsotsallm.compress(tiny, THREE_STAGES, tmp_path / "out", calibration=text, keep_stages=True, **SMALL)
    assert [Path(stage).name for stage in result.stages] == ["1-depth", "2-sparsity"]
    sparse = Checkpoint.open(result.stages[1])
    final = Checkpoint.open(tmp_path / "out")
    for name, weight in sparse.layer(1).items():
        if weight.ndim == 2:
            assert bool((final.layer(1)[name][weight == 0] == 0).all())
