"""GPTQ of GPTQModel, symmetric integers in groups; see common.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import run
from gptqmodel import GPTQModel, QuantizeConfig


class GptqModel:
    def make(self, source: Path, out: Path, windows: list[list[int]], settings: dict[str, Any]) -> None:
        config = QuantizeConfig(bits=settings["bits"], group_size=settings["group"], sym=True)
        model = GPTQModel.load(str(source), config, device="cpu", dtype=torch.float32)
        model.quantize([{"input_ids": window, "attention_mask": [1] * len(window)} for window in windows], batch_size=1)
        model.save(str(out))

    def load(self, source: Path, out: Path) -> torch.nn.Module:
        return GPTQModel.load(str(out), device="cpu", dtype=torch.float16).model


if __name__ == "__main__":
    run(GptqModel())
