"""Models in forms that other engines run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast, get_args

from tsotsallm.checkpoint.gguf_layout import Dense
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.engine.llama import installed as llama_installed
from tsotsallm.errors import ExportError, install_command
from tsotsallm.export.gguf import Written, export_gguf
from tsotsallm.export.huggingface import export_huggingface
from tsotsallm.export.publish import modelfile_path, write_modelfile
from tsotsallm.export.verify import Verified, read_back, verify_gguf
from tsotsallm.streaming.sweep import Tick, silent


def to_huggingface(model: str | Path, out: str | Path, *, tick: Tick = silent) -> dict[str, Any]:
    """Write a checkpoint as a plain Hugging Face one, every weight dense; returns the path and notes."""
    return {"hf": str(out), "notes": export_huggingface(Checkpoint.open(model), Path(out), tick)}


def to_gguf(model: str | Path, out: str | Path, *, dense: str | None = None, ollama: bool = False, verify: bool = True,
            accept_differences: bool = False, tick: Tick = silent) -> dict[str, Any]:
    """Write a checkpoint as GGUF; returns the paths, bytes and notes.

    Weights that are on no grid of GGUF are written as `dense`: f16, bf16 or f32. `ollama` adds a Modelfile. With `verify`
    the file is read back and, where llama.cpp is installed, compared with it: texts must be split into the same tokens,
    answers end at the same tokens, and log-probabilities agree. A file that fails is not kept. `accept_differences` keeps a
    file although llama.cpp splits some text into other tokens.
    Raises ExportError where the checkpoint cannot be written, or the file fails.
    """
    if dense not in (None, *get_args(Dense)):
        raise ExportError(f"--dense is {dense!r}; it takes {', '.join(get_args(Dense))}")
    path = Path(out)
    if path.suffix != ".gguf":
        raise ExportError(f"{path} does not end in .gguf, as engines expect of such a file")
    modelfile = modelfile_path(path) if ollama else None        # refused before anything is written
    checkpoint = Checkpoint.open(model)
    name = str(model) if "/" in str(model) and not Path(model).exists() else checkpoint.source.title

    def check(written: Written) -> Verified | None:
        if not llama_installed():
            read_back(written.path)
            return None
        tick("comparing with llama.cpp", 0.0)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            return verify_gguf(written.path, checkpoint, Path(scratch) / "states.f32", context=written.context,
                               types=written.types, adapter=written.adapter, expected=written.differences,
                               accept_differences=accept_differences)

    found = export_gguf(checkpoint, path, dense=cast("Dense | None", dense), name=name,
                        accept_differences=accept_differences,
                        check=check if verify else None, tick=tick)
    answer: dict[str, Any] = {"gguf": str(path), **found.plain()}
    answer["notes"] = [*checkpoint.codec.notes, *answer["notes"]]
    if modelfile is not None:
        answer["modelfile"] = str(write_modelfile(modelfile, path, found.adapter, checkpoint.spec.context))
    if found.verified is not None:
        answer["verified"] = found.verified.plain()
    elif verify:
        answer["notes"].append(f"not compared with llama.cpp, which is not installed: {install_command('llama')}")
    return answer
