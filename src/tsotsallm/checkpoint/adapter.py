"""Low-rank corrections beside a base: a PEFT adapter in 16 bit, or 8-bit halves in the project's own container."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsotsallm.checkpoint.shards import TensorRecord, read_header
from tsotsallm.errors import CheckpointError
from tsotsallm.files import one_line, quoted, read_json
from tsotsallm.numerics.grids import IntegerGrid, Quantised

FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
BASE = ".."
"""What an adapter's config names as its base where that lies in the directory above."""
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


def read_adapter(directory: Path, *, ours: bool) -> tuple[dict[str, TensorRecord], tuple[str, ...]]:
    """The adapter in a folder of its base, by the names of the base's modules, and notes; nothing where there is none.

    A result of ours (`ours`), or an adapter whose config names the directory above as base, is part of the model;
    another is left out, as transformers does. Only adapters with alpha = rank are read: the correction is B·A.
    """
    folder = directory / FOLDER
    if not (folder / WEIGHTS).exists() and not (folder / WEIGHTS).is_symlink():
        return {}, ()
    try:
        config = read_json(folder / CONFIG, CheckpointError)
    except FileNotFoundError:
        raise CheckpointError(f"{folder / CONFIG} does not exist; restore it, or delete {folder} to use the base "
                              "alone") from None
    if not isinstance(config, dict) or not {"r", "lora_alpha"} <= config.keys():
        raise CheckpointError(f"{folder / CONFIG} is no config of a LoRA adapter; restore it, or delete {folder} to use the "
                              "base alone")
    if not ours and config.get("base_model_name_or_path") != BASE:
        return {}, (f"the adapter in {FOLDER}/ is not used: its base is {quoted(config.get('base_model_name_or_path'))}, "
                    "not this directory; merge it with PEFT first if it belongs to the model",)
    if config["lora_alpha"] != config["r"] or config.get("alpha_pattern", {}) != config.get("rank_pattern", {}) or (
            config.get("use_rslora") or config.get("use_dora")):
        raise CheckpointError(f"{folder} scales its corrections (alpha is not the rank), which is not read; merge it into "
                              "the base with PEFT first")
    records = read_header(folder / WEIGHTS)
    wrong = [name for name in records if not name.startswith(PREFIX) or not is_adapter(name)]
    if wrong:
        raise CheckpointError(f"{folder / WEIGHTS} holds {quoted(wrong[0])}, which is not part of a LoRA adapter of linears")
    return {name.removeprefix(PREFIX): record for name, record in records.items()}, ()


def require_fitting(records: Mapping[str, TensorRecord], shapes: Mapping[str, tuple[int, int]], where: str) -> None:
    """Raise unless every correction belongs to a linear and has both halves in shapes that fit it.

    `shapes` are (d_out, d_in) of the linears by full module name.
    """
    parts: dict[str, dict[str, TensorRecord]] = {}
    for name, record in records.items():
        if is_adapter(name):
            parts.setdefault(owner_of(name), {})[name.removeprefix(f"{owner_of(name)}.")] = record
    for module, found in parts.items():
        if module not in shapes:
            raise CheckpointError(f"{where} holds a low-rank correction of {quoted(module)}, which is no linear of a layer; "
                                  "merge it into the base with PEFT first")
        d_out, d_in = shapes[module]
        half = next((found[name] for name in (RIGHT, "lora_A.codes") if name in found), None)
        rank = half.shape[0] if half is not None and half.shape else 0
        dense = {LEFT: (d_out, rank), RIGHT: (rank, d_in)}
        coded = {"lora_B.codes": (rank, d_out), "lora_B.scales": (rank, 1),
                 "lora_A.codes": (rank, d_in), "lora_A.scales": (rank, 1)}
        sizes = {name: record.shape for name, record in found.items()}
        typed = all(record.dtype == torch.int8 if name.endswith(".codes") else record.dtype.is_floating_point
                    for name, record in found.items())
        if rank < 1 or not typed or sizes not in (dense, coded):
            told = ", ".join(f"{name} {list(record.shape)} of {str(record.dtype).removeprefix('torch.')}"
                             for name, record in sorted(found.items()))
            raise CheckpointError(f"{where}: the low-rank correction of {quoted(module)} ({one_line(told)}) does not fit "
                                  f"its linear of {[d_out, d_in]}; write the adapter again, or delete it")


def adapter_config(ranks: Mapping[str, int], base: str) -> dict[str, Any]:
    """PEFT's config of an adapter: module -> rank, alpha = rank everywhere."""
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "r": most, "lora_alpha": most, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
            "rank_pattern": others, "alpha_pattern": others}
