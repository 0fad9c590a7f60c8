"""A checkpoint as a model of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.compression import check_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load(model: str | Path, *, dtype: str = "float32",
         device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint, one that this package wrote included, as a transformers model and its tokenizer."""
    import torch

    from tsotsallm.engine.resident import resident

    checkpoint = Checkpoint.open(model)
    return resident(checkpoint, getattr(torch, dtype), check_device(device)), checkpoint.tokenizer()
