"""auto-round, symmetric integers in groups: rounded to nearest where `iters` is 0, else tuned by signed gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from common import original, run
from transformers import AutoModelForCausalLM


class AutoRoundPackage:
    def make(self, source: Path, out: Path, windows: list[list[int]], settings: dict[str, Any]) -> None:
        model, tokenizer = original(source)
        tuned = {"iters": settings["iters"], "batch_size": settings.get("batch", 8)}
        text = [torch.tensor([window]) for window in windows]
        rounding = AutoRound(model, tokenizer, scheme="W4A16", bits=settings["bits"], group_size=settings["group"], sym=True,
                             dataset=text, nsamples=len(windows), seqlen=min(map(len, windows)), device_map="cpu",
                             enable_torch_compile=False, seed=0, **tuned)
        rounding.quantize_and_save(str(out), format="auto_round")

    def load(self, source: Path, out: Path) -> torch.nn.Module:
        [config] = out.rglob("config.json")         # in a folder that it names by bits and groups
        return AutoModelForCausalLM.from_pretrained(config.parent, dtype=torch.float32, device_map="cpu")


if __name__ == "__main__":
    run(AutoRoundPackage())
