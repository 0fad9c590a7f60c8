"""What a model consists of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tsotsallm.analysis.tokens import TokenCosts
from tsotsallm.analysis.tokens import token_costs as count_tokens
from tsotsallm.checkpoint.gguf_place import gguf_path
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.inspection import Anatomy, FileAnatomy, inspect_checkpoint, inspect_file, inspect_remote
from tsotsallm.remote.names import hub_name


def token_costs(model: str | Path, texts: Sequence[str | Path]) -> TokenCosts:
    """What texts in files or folders cost a model in tokens, and what a vocabulary cut to them would save."""
    return count_tokens(Checkpoint.streamed(model), texts)


def inspect(model: str | Path) -> Anatomy | FileAnatomy:
    """Anatomy of a checkpoint or a GGUF file: widths, parameters, bytes by part, cache and work per token."""
    hub = hub_name(model)
    if hub is not None and hub.file is not None:
        return inspect_remote(hub)
    file = gguf_path(model)
    if file is not None:
        return inspect_file(file)
    return inspect_checkpoint(Checkpoint.streamed(model))
