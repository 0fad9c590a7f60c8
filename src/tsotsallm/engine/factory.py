"""Loads a model that answers: a GGUF file in llama.cpp, or a checkpoint in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.interface import Question, Sampling, Speaker, said
from tsotsallm.engine.llama import CacheType, Llama
from tsotsallm.engine.transformer import Transformer
from tsotsallm.errors import TsotsallmError


def speaker(model: str | Path, *, kv: CacheType = "f16", adapter: Path | None = None, slots: int = 1,
            keep_prompt: bool = True) -> Speaker:
    """Load a model; the options are for GGUF files, which alone run several conversations at a time.

    Raises TsotsallmError where a checkpoint is given an option of GGUF files.
    """
    if Path(model).suffix == ".gguf":
        return Llama(Path(model), kv=kv, adapter=adapter, slots=slots, keep_prompt=keep_prompt)
    if kv != "f16" or adapter is not None:
        raise TsotsallmError("--kv and --adapter are for GGUF files, which llama.cpp runs; write one with "
                             "`tsotsallm export MODEL --gguf OUT.gguf`")
    return Transformer(Checkpoint.open(model))


def continuations(model: str, prompts: Sequence[str], tokens: int, sampling: Sampling) -> list[str]:
    """The text that follows each prompt; all are sampled with the same seed, so that none depends on the others."""
    loaded = speaker(model)
    return [said(loaded, Question(prompt, tokens, sampling)) for prompt in prompts]
