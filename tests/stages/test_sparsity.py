"""WANDA's masks against a naive loop on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import tsotsallm
from tsotsallm.checkpoint.reader import Checkpoint


def test_wanda_masks_equal_a_naive_loop_on_a_real_model(stories: Path, prose: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from tsotsallm.calibration import Calibration, calibration_corpus

    checkpoint = Checkpoint.open(stories)
    corpus = calibration_corpus(checkpoint, Calibration(str(prose), windows=4, window=128))
    out = tmp_path / "sparse"
    tsotsallm.compress(stories, "wanda:2:4", out, calibration=prose, windows=4, window=128)
    AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    squares: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(_module: Any, args: Any) -> None:
            squares[name] = squares.get(name, 0) + args[0].flatten(0, 1).double().square().sum(0)
        return add

    layer = model.model.layers[0]
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for window in corpus.windows:
            model(window[None])
    pruned = Checkpoint.open(out).layer(0)
    agreeing = total = 0
    for name, square in squares.items():
        weight = layer.get_submodule(name).weight.detach()
        score = weight.double().abs() * square.sqrt()
        for row in range(len(weight)):
            for start in range(0, weight.shape[1], 4):
                ranked = sorted(range(start, start + 4), key=lambda column: (score[row, column].item(), column))
                kept = {column for column in range(start, start + 4) if pruned[f"{name}.weight"][row, column] != 0}
                agreeing += kept == set(ranked[2:])
                total += 1
    assert agreeing == total
