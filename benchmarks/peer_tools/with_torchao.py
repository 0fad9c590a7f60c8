"""torchao, four bits rounded to nearest in groups with a minimum, for its CPU kernel; see common.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import original, run
from torch import nn
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM

FILE = "model.pt"


def linears(module: nn.Module, name: str) -> bool:
    """Whether a module is one of the layers' linears."""
    return isinstance(module, nn.Linear) and name.endswith("_proj")


class TorchAo:
    def make(self, source: Path, out: Path, windows: list[list[int]], settings: dict[str, Any]) -> None:
        model = original(source)[0].to(torch.bfloat16)      # the only type that its kernel is measured in
        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=settings["group"], set_inductor_config=False), linears)
        out.mkdir()
        torch.save({name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}, out / FILE)

    def load(self, source: Path, out: Path) -> nn.Module:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        values = torch.load(out / FILE, weights_only=False)     # what `make` wrote beside it
        model.load_state_dict(values | {"lm_head.weight": values["model.embed_tokens.weight"]}, assign=True)
        return model


if __name__ == "__main__":
    run(TorchAo())
