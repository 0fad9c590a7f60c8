"""optimum-quanto, integers rounded to nearest in groups of its own choice; see common.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from common import original, run
from optimum.quanto import freeze, qint2, qint4, qint8, quantization_map, quantize, requantize
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TYPES = {2: qint2, 4: qint4, 8: qint8}


class Quanto:
    def make(self, source: Path, out: Path, windows: list[list[int]], settings: dict[str, Any]) -> None:
        model = original(source)[0].half()
        quantize(model, weights=TYPES[settings["bits"]], exclude="lm_head")
        freeze(model)
        out.mkdir()
        values = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(values, out / "model.safetensors")
        (out / "map.json").write_text(json.dumps(quantization_map(model)), "utf-8")

    def load(self, source: Path, out: Path) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
        values = load_file(out / "model.safetensors")
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
        requantize(model, values, json.loads((out / "map.json").read_text("utf-8")), device=torch.device("cpu"))
        return model


if __name__ == "__main__":
    run(Quanto())
