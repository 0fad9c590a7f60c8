"""Continuations of many prompts with one model in memory: GGUF files in llama.cpp, checkpoints in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.generation import Sampling, stream_resident
from tsotsallm.engine.llama import Llama
from tsotsallm.engine.resident import resident


def continuations(model: str, prompts: Sequence[str], tokens: int, sampling: Sampling) -> list[str]:
    """The text that follows each prompt; each is sampled by the same seed, so that it does not depend on the others."""
    found = []
    if Path(model).suffix == ".gguf":
        engine = Llama(Path(model))
        for prompt in prompts:
            heard: list[str] = []
            engine.complete(prompt, tokens, sampling, heard.append)
            found.append("".join(heard))
        return found
    checkpoint = Checkpoint.open(model)
    loaded, tokenizer = resident(checkpoint, torch.float32, "cpu"), checkpoint.tokenizer()
    for prompt in prompts:
        heard = []
        stream_resident(loaded, tokenizer, tokenizer(prompt, return_tensors="pt")["input_ids"], tokens, sampling,
                        heard.append)
        found.append("".join(heard))
    return found
