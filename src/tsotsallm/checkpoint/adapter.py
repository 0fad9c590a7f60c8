"""Low-rank corrections beside a base: a PEFT adapter in 16 bits, or 8-bit factors in the project's own container."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tsotsallm.checkpoint.shards import TensorRecord, read_header
from tsotsallm.errors import CheckpointError
from tsotsallm.files import one_line, quoted, read_json
from tsotsallm.numerics.grids import IntegerGrid, Quantised

FOLDER, WEIGHTS, CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
BASE = ".."
"""The base that an adapter's config names where it is the directory above."""
PREFIX = "base_model.model."
LEFT, RIGHT = "lora_B.weight", "lora_A.weight"
PEFT = (LEFT, RIGHT)
HALVES = re.compile(r"\.lora_[AB]\.(weight|codes|scales)$")
EIGHT_BITS = IntegerGrid(8, None)


def is_adapter(name: str) -> bool:
    """Whether a tensor's name is that of a factor of a low-rank correction, or of a part of one."""
    return HALVES.search(name) is not None


def owner_of(name: str) -> str:
    """The full name of the module that a factor of a low-rank correction belongs to."""
    return HALVES.sub("", name)


@dataclass(frozen=True)
class LowRank:
    """A low-rank correction B·A beside a linear.

    left, right  B (d_out, r) and A (r, d_in) as a reader of the file gets them
    coded        Bᵀ and A as 8-bit codes with one scale for each of the r rows; None where they are stored uncoded
    """

    left: Tensor
    right: Tensor
    coded: tuple[Quantised, Quantised] | None = None

    @classmethod
    def in_8_bits(cls, left: Tensor, right: Tensor, storage: torch.dtype) -> LowRank:
        """Round both factors to 8 bits, with scales in `storage`."""
        return cls._decoded(EIGHT_BITS.round(left.mT.contiguous(), storage), EIGHT_BITS.round(right, storage))

    @classmethod
    def read(cls, records: Mapping[str, TensorRecord], module: str) -> LowRank | None:
        """The correction of a linear as stored, by its full module name; None where it has none."""
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
        """base + times·B·A, (d_out, d_in) float32."""
        return base.addmm(self.left.to(base), self.right.to(base), alpha=times)

    def tensors(self, module: str) -> dict[str, Tensor]:
        """The tensors that are stored for a linear, by full name."""
        if self.coded is None:
            return {f"{module}.{LEFT}": self.left.contiguous(), f"{module}.{RIGHT}": self.right.contiguous()}
        return {f"{module}.{half}.{part}": tensor for half, coded in zip(("lora_B", "lora_A"), self.coded, strict=True)
                for part, tensor in (("codes", coded.codes), ("scales", coded.scales))}


def read_adapter(directory: Path, *, ours: bool) -> tuple[dict[str, TensorRecord], tuple[str, ...]]:
    """The tensors of the adapter in a folder of its base, by the names of the base's modules, and notes for the user.

    Both are empty where there is none. An adapter is part of the model in a result of ours (`ours`), and where its config
    names the directory above as base; any other is left out, as in transformers. Raises CheckpointError where the adapter
    is damaged, or scales its correction: only adapters with alpha = rank, whose correction is B·A, are read.
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
        raise CheckpointError(f"{folder / CONFIG} is not the config of a LoRA adapter; restore it, or delete {folder} to "
                              "use the base alone")
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
    """Raise CheckpointError unless every correction belongs to a linear and both its factors fit the linear's shape.

    `shapes` are (d_out, d_in) of the linears by full module name; `where` names the checkpoint in messages.
    """
    parts: dict[str, dict[str, TensorRecord]] = {}
    for name, record in records.items():
        if is_adapter(name):
            parts.setdefault(owner_of(name), {})[name.removeprefix(f"{owner_of(name)}.")] = record
    for module, tensors in parts.items():
        if module not in shapes:
            raise CheckpointError(f"{where} holds a low-rank correction of {quoted(module)}, which is not a linear of a "
                                  "layer; merge it into the base with PEFT first")
        d_out, d_in = shapes[module]
        half = next((tensors[name] for name in (RIGHT, "lora_A.codes") if name in tensors), None)
        rank = half.shape[0] if half is not None and half.shape else 0
        dense = {LEFT: (d_out, rank), RIGHT: (rank, d_in)}
        coded = {"lora_B.codes": (rank, d_out), "lora_B.scales": (rank, 1),
                 "lora_A.codes": (rank, d_in), "lora_A.scales": (rank, 1)}
        sizes = {name: record.shape for name, record in tensors.items()}
        typed = all(record.dtype == torch.int8 if name.endswith(".codes") else record.dtype.is_floating_point
                    for name, record in tensors.items())
        if rank < 1 or not typed or sizes not in (dense, coded):
            told = ", ".join(f"{name} {list(record.shape)} of {str(record.dtype).removeprefix('torch.')}"
                             for name, record in sorted(tensors.items()))
            raise CheckpointError(f"{where}: the low-rank correction of {quoted(module)} ({one_line(told)}) does not fit "
                                  f"its linear of {[d_out, d_in]}; write the adapter again, or delete it")


def adapter_config(ranks: Mapping[str, int], base: str) -> dict[str, object]:
    """The PEFT config of an adapter with `ranks` by module; alpha = rank everywhere."""
    most = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != most}
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
            "r": most, "lora_alpha": most, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "target_modules": sorted({module.rpartition(".")[2] for module in ranks}),
            "rank_pattern": others, "alpha_pattern": others}
