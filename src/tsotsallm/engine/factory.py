"""Loads a model that answers: a GGUF file in llama.cpp where that is installed, any checkpoint in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsotsallm.checkpoint.gguf_file import GgufFile
from tsotsallm.checkpoint.gguf_place import first_part, gguf_path, open_parts
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.interface import Question, Sampling, Speaker, said
from tsotsallm.engine.llama import CacheType, Llama, installed
from tsotsallm.engine.transformer import Transformer
from tsotsallm.errors import MissingExtraError, TsotsallmError
from tsotsallm.machine import free_ram_bytes
from tsotsallm.units import human_bytes


def speaker(model: str | Path, *, kv: CacheType = "f16", adapter: Path | None = None, slots: int = 1,
            keep_prompt: bool = True, context: int | None = None) -> Speaker:
    """Load a model; the options are for GGUF files in llama.cpp, which alone runs several conversations at a time.

    `context` is how many tokens a conversation can have; None: as many as the model knows, within `llama.usual_context`.
    Without llama.cpp a GGUF file is read like a checkpoint, in float32. Raises TsotsallmError where a checkpoint is given an
    option of GGUF files, MissingExtraError where the file needs llama.cpp because it does not fit in memory otherwise.
    """
    file = gguf_path(model)
    for_files = kv != "f16" or adapter is not None or context is not None
    if file is not None and (installed() or for_files):
        path = first_part(file)
        if context is not None:
            require_context(context, GgufFile.open(path).context or 0)
        return Llama(path, kv=kv, adapter=adapter, slots=slots, keep_prompt=keep_prompt, context=context)
    if file is not None:
        needed = 4 * sum(part.parameters for part in open_parts(file))
        if needed > free_ram_bytes():
            raise MissingExtraError("xllamacpp (or llama-server on the PATH)", "llama", "running a GGUF file that takes "
                                    f"{human_bytes(needed)} without llama.cpp")
    if for_files:
        raise TsotsallmError("--kv, --context and --adapter are for GGUF files, which llama.cpp runs; write one with "
                             "`tsotsallm export MODEL --gguf OUT.gguf`")
    return Transformer(Checkpoint.open(model))


def require_context(asked: int, known: int) -> None:
    """Raise TsotsallmError unless a model knows as many positions as a conversation is to have tokens."""
    if not 2 <= asked <= known:
        raise TsotsallmError(f"--context is {asked}; it takes at least 2 tokens and at most the {known} that the model "
                             "knows")


def continuations(model: str, prompts: Sequence[str], tokens: int, sampling: Sampling) -> list[str]:
    """The text that follows each prompt; all are sampled with the same seed, so that none depends on the others."""
    loaded = speaker(model)
    return [said(loaded, Question(prompt, tokens, sampling)) for prompt in prompts]
