"""GPTQ of llm-compressor, symmetric integers in groups; see common.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import original, run
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import CompressedTensorsConfig


class LlmCompressor:
    def make(self, source: Path, out: Path, windows: list[list[int]], settings: dict[str, Any]) -> None:
        model, tokenizer = original(source)
        text = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(window) for window in windows]})
        weights = QuantizationArgs(num_bits=settings["bits"], type="int", symmetric=True, strategy="group",
                                   group_size=settings["group"])
        recipe = GPTQModifier(config_groups={"linears": QuantizationScheme(targets=["Linear"], weights=weights)},
                              ignore=["lm_head"])
        oneshot(model=model, processor=tokenizer, dataset=text, recipe=recipe, max_seq_length=max(map(len, windows)),
                num_calibration_samples=len(windows), shuffle_calibration_samples=False)
        model.save_pretrained(out, save_compressed=True)

    def load(self, source: Path, out: Path) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32,
                                                    quantization_config=CompressedTensorsConfig(run_compressed=False))


if __name__ == "__main__":
    run(LlmCompressor())
