"""Low-rank corrections beside a base: a PEFT adapter in 16 bit, or 8-bit halves in the project's own container."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsotsallm.checkpoint.shards import TensorRecord, read_header
from tsotsallm.errors import CheckpointError
from tsotsallm.numerics.grids import IntegerGrid, Quantised

FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
LEFT, RIGHT = "lora_B.weight", "lora_A.weight"
PEFT = (LEFT, RIGHT)
HALVES = re.compile(r"\.lora_[AB]\.(weight|codes|scales)$")
EIGHT_BITS = IntegerGrid(8, None)


def is_adapter(name: str) -> bool:
    """Whether a tensor's name is that of half of a low-rank correction, or of a part of it."""
    return HALVES.search(name) is not None


def owner_of(name: str) -> str:
    """The module that half of a low-rank correction belongs to."""
    return HALVES.sub("", name)


@dataclass(frozen=True)
class LowRank:
    """B·A beside a linear.

    left, right  B (d_out, r) and A (r, d_in) as a reader of the file gets them
    coded        Bᵀ and A as 8-bit codes with one scale for each of the r rows; None where they are stored as they are
    """

    left: Tensor
    right: Tensor
    coded: tuple[Quantised, Quantised] | None = None

    @classmethod
    def in_8_bits(cls, left: Tensor, right: Tensor, storage: torch.dtype) -> LowRank:
        """Both halves rounded to 8 bits, scales in `storage`."""
        return cls._decoded(EIGHT_BITS.round(left.mT.contiguous(), storage), EIGHT_BITS.round(right, storage))

    @classmethod
    def read(cls, records: Mapping[str, TensorRecord], module: str) -> LowRank | None:
        """The correction of a linear as stored; None where it has none."""
        if f"{module}.{LEFT}" in records:
            return cls(records[f"{module}.{LEFT}"].read(), records[f"{module}.{RIGHT}"].read())
        if f"{module}.lora_B.codes" in records:
            halves = (Quantised(records[f"{module}.{half}.codes"].read(), records[f"{module}.{half}.scales"].read(), None,
                                EIGHT_BITS) for half in ("lora_B", "lora_A"))
            return cls._decoded(*halves)
        return None

    @classmethod
    def _decoded(cls, left: Quantised, right: Quantised) -> LowRank:
        storage = left.scales.dtype
        return cls(left.dequantise().mT.contiguous().to(storage), right.dequantise().to(storage), (left, right))

    def added_to(self, base: Tensor, times: float = 1.0) -> Tensor:
        """base + times·B·A in float32."""
        return base.addmm(self.left.float(), self.right.float(), alpha=times)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """What is stored for a linear, by name."""
        if self.coded is None:
            return {f"{module}.{LEFT}": self.left.contiguous(), f"{module}.{RIGHT}": self.right.contiguous()}
        return {f"{module}.{half}.{part}": tensor for half, coded in zip(("lora_B", "lora_A"), self.coded, strict=True)
                for part, tensor in (("codes", coded.codes), ("scales", coded.scales))}


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
