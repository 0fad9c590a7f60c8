"""Short runs of compress, and their results compared byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SMALL: dict[str, Any] = {"windows": 6, "window": 64}
THREE_STAGES = "[{depth: {remove: 1, protect: {first: 1, last: 1}}}, {sparsity: {prune: 2, group: 4}}, " \
               "{quantize: {bits: 4, group: 32}}]"


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def unpacked_by_transformers(directory: Path) -> dict[str, torch.Tensor]:
    """The weights as transformers and compressed-tensors compute with them, in the stored type."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        model(torch.tensor([[3, 70, 80, 90]]))          # compressed-tensors unpacks at the first forward
    return dict(model.state_dict())


def same_bytes(first: Path, second: Path) -> bool:
    """Whether two results hold the same weights, adapters included, in files of the same names."""
    one, other = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.safetensors")}
                  for folder in (first, second))
    assert one
    return one == other


class Stop(Exception):
    """What a test raises in the middle of a run."""


def stop_after(reports: int) -> Callable[[object], None]:
    """A `progress` that stops a run at its report of this number."""
    seen = 0

    def stop(_progress: object) -> None:
        nonlocal seen
        seen += 1
        if seen == reports:
            raise Stop

    return stop
