"""Models in forms that other engines run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast, get_args

import torch

from tsotsallm.calibration import Calibration, calibration_corpus, window_of
from tsotsallm.checkpoint.gguf_layout import Dense
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.view import View
from tsotsallm.engine.factory import require_context
from tsotsallm.engine.llama import installed as llama_installed
from tsotsallm.engine.llama import most_context
from tsotsallm.errors import ExportError, install_command
from tsotsallm.export.gguf import Written, export_gguf
from tsotsallm.export.huggingface import export_huggingface
from tsotsallm.export.imatrix import export_imatrix
from tsotsallm.export.publish import modelfile_path, write_modelfile
from tsotsallm.export.verify import Verified, read_back, verify_gguf
from tsotsallm.files import JsonObject, require_new
from tsotsallm.remote.names import hub_name
from tsotsallm.streaming.sweep import Tick, silent

Say = Callable[[str], None]
IMATRIX_WINDOW = 512



def no_word(_line: str) -> None:
    """Say nothing."""


def to_huggingface(model: str | Path, out: str | Path, *, tick: Tick = silent, say: Say = no_word) -> JsonObject:
    """Write a checkpoint as a plain Hugging Face one, every weight dense; returns the path and notes."""
    require_new(Path(out), ExportError)
    return {"hf": str(out), "notes": export_huggingface(Checkpoint.streamed(model), Path(out), tick, say)}


def to_imatrix(model: str | Path, out: str | Path, *, calibration: str | Path | None = None, windows: int = 64,
               window: int | None = None, tick: Tick = silent) -> JsonObject:
    """Write the importance matrix of a checkpoint on a text, by which llama.cpp's quantiser weights errors.

    `windows` windows of `window` tokens of `calibration` run through the model, one layer at a time; without a `window` they
    have 512 tokens, or the model's context where that is shorter. Returns the path,
    bytes, the text's source and the number of tokens. Raises ExportError where it cannot be written.
    """
    path = _new_gguf(out)
    checkpoint = Checkpoint.streamed(model)
    asked = Calibration(None if calibration is None else str(calibration), windows,
                        window_of(checkpoint, window, IMATRIX_WINDOW), 0)
    corpus = calibration_corpus(checkpoint, asked, tick)
    with tempfile.TemporaryDirectory() as scratch:
        size = export_imatrix(View.of(checkpoint), corpus, path, Path(scratch), torch.device("cpu"), tick)
    return {"imatrix": str(path), "bytes": size, "source": corpus.source, "tokens": corpus.tokens, "notes": []}


def to_gguf(model: str | Path, out: str | Path, *, dense: str | None = None, ollama: bool = False, verify: bool = True,
            accept_differences: bool = False, context: int | None = None, tick: Tick = silent,
            say: Say = no_word) -> JsonObject:
    """Write a checkpoint as GGUF; returns the paths, bytes and notes.

    Weights that are on no grid of GGUF are written as `dense`: f16, bf16 or f32. `ollama` adds a Modelfile, in which a
    conversation has `context` tokens (None: as many as the model knows, at most 8192). With `verify`
    the file is read back and, where llama.cpp is installed, compared with it: texts must be split into the same tokens,
    answers end at the same tokens, and log-probabilities agree. A file that fails is not kept. `accept_differences` keeps a
    file although llama.cpp splits some text into other tokens. `say` is called with what the user should know before the
    file is written.
    Raises ExportError where the checkpoint cannot be written, or the file fails.
    """
    path = _new_gguf(out)
    if dense not in (None, *get_args(Dense)):
        raise ExportError(f"--dense is {dense!r}; it takes {', '.join(get_args(Dense))}")
    modelfile = modelfile_path(path) if ollama else None
    if modelfile is not None:
        require_new(modelfile, ExportError)
    checkpoint = Checkpoint.streamed(model)
    if context is not None:
        require_context(context, checkpoint.spec.context)
    hub = hub_name(model)
    name = checkpoint.source.title if hub is None else hub.repository

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
                        check=check if verify else None, tick=tick, say=say)
    answer: JsonObject = {"gguf": str(path), **found.plain()}
    answer["notes"] = [*checkpoint.codec.notes, *answer["notes"]]
    if modelfile is not None:
        answer["modelfile"] = str(write_modelfile(modelfile, path, found.adapter,
                                                  context or most_context(checkpoint.spec.context)))
    if found.verified is not None:
        answer["verified"] = found.verified.plain()
    elif verify:
        answer["notes"].append(f"not compared with llama.cpp, which is not installed: {install_command('llama')}")
    return answer


def _new_gguf(out: str | Path) -> Path:
    """The path of a GGUF file to write; raises ExportError where it has another ending, or exists already."""
    path = Path(out)
    if path.suffix != ".gguf":
        raise ExportError(f"{path} does not end in .gguf, as engines expect of such a file")
    require_new(path, ExportError)
    return path
