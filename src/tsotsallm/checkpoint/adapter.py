"""Low-rank corrections beside a base, as a PEFT adapter: names, config, and reading them back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tsotsallm.checkpoint.shards import TensorRecord, read_header
from tsotsallm.errors import CheckpointError

FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LEFT, RIGHT = "lora_B.weight", "lora_A.weight"


def is_adapter(name: str) -> bool:
    """Whether a tensor's name is that of half of a low-rank correction."""
    return name.endswith((LEFT, RIGHT))


def names(module: str) -> tuple[str, str]:
    """What the halves B and A of a linear's correction are called."""
    return f"{module}.{LEFT}", f"{module}.{RIGHT}"


def pieces(module: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """B (d_out, r) and A (r, d_in) of a linear, by the names that they have beside it."""
    return dict(zip(names(module), (left.contiguous(), right.contiguous()), strict=True))


def factors(records: Mapping[str, TensorRecord], module: str) -> tuple[Tensor, Tensor] | None:
    """B (d_out, r) and A (r, d_in) of a linear as stored; None where it has none."""
    left, right = names(module)
    return (records[left].read(), records[right].read()) if left in records else None


def correction(records: Mapping[str, TensorRecord], module: str) -> Tensor | None:
    """B·A of a linear in float32, (d_out, d_in); None where it has none."""
    found = factors(records, module)
    return None if found is None else found[0].float() @ found[1].float()


def read_adapter(directory: Path) -> dict[str, TensorRecord]:
    """The adapter beside a base, by the names of the base's modules; nothing where there is none.

    Only adapters with alpha = rank are read: the correction is B·A.
    """
    folder = directory / FOLDER
    if not (folder / WEIGHTS).exists():
        return {}
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text("utf-8"))
        plain = config["lora_alpha"] == config["r"] and config.get("alpha_pattern", {}) == config.get("rank_pattern", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read ({type(error).__name__}: {error}); restore it, or delete "
                              f"{folder} to use the base alone") from None
    if not plain or config.get("use_rslora") or config.get("use_dora"):
        raise CheckpointError(f"{folder} scales its corrections (alpha is not the rank), which is not read; merge it into "
                              "the base with PEFT first")
    records = read_header(folder / WEIGHTS)
    wrong = [name for name in records if not name.startswith(PREFIX) or not is_adapter(name)]
    if wrong:
        raise CheckpointError(f"{folder / WEIGHTS} holds {wrong[0]}, which is not part of a LoRA adapter of linears")
    return {name.removeprefix(PREFIX): record for name, record in records.items()}


def adapter_config(ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """PEFT's config of an adapter: module -> rank, alpha = rank everywhere."""
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "r": most, "lora_alpha": most, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
            "rank_pattern": others, "alpha_pattern": others}
