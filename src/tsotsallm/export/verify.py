"""Whether an exported file says what the checkpoint says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.llama import Llama
from tsotsallm.errors import ExportError
from tsotsallm.numerics.ggml import LAYOUTS, GgmlGrid, decode
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.score import final_states, token_losses

WORDS = ("The river that runs through the old town is wide, and in spring the children of the village count 27 boats. "
         "Le fleuve est large ; les enfants comptent les bateaux.")
MOST_TOKENS = 48


@dataclass(frozen=True)
class Verified:
    """Log-probabilities of one text's tokens in both engines; `mean` and `largest` differences in nats."""

    tokens: int
    mean: float
    largest: float
    ours: float
    theirs: float

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def read_back(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor -> (type, shape) of a file; raises ExportError where a tensor is not finite."""
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        kind = tensor.tensor_type.name.lower()
        data = np.asarray(tensor.data)
        if kind in LAYOUTS:
            finite = decode(data[:64], GgmlGrid(kind)).finite
        else:
            finite = bool(np.isfinite(data.view(np.float32) if kind == "f32" else
                                      data.view(np.float16) if kind == "f16" else np.zeros(1)).all())
        if not finite:
            raise ExportError(f"{path}: {tensor.name} holds values that are not finite; export again")
        found[tensor.name] = kind, tuple(int(size) for size in reversed(tensor.shape))
    return found


def verify_gguf(path: Path, checkpoint: Checkpoint, scratch: Path, *, adapter: Path | None = None) -> Verified:
    """Read a file back and compare the log-probabilities of a short text, llama.cpp's with ours by streaming."""
    read_back(path)
    ids = list(checkpoint.tokenizer()(WORDS, verbose=False)["input_ids"])[:min(MOST_TOKENS, checkpoint.spec.context)]
    corpus, view, cpu = Corpus((torch.tensor(ids),), "verification"), View.of(checkpoint), torch.device("cpu")
    states = final_states(view, corpus, scratch, cpu)
    ours = [-float(loss) for loss in token_losses(view, [states], corpus, cpu)[0]]
    states.remove()
    engine = Llama(path, kv="f32", adapter=adapter, context=len(ids) + 8)
    theirs = list(engine.log_likelihoods(ids))
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return Verified(len(ids) - 1, sum(differences) / len(differences), max(differences), sum(ours) / len(ours),
                    sum(theirs) / len(theirs))
