"""tsotsallm export: models in forms that other engines run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import AsJson, Calibration, Model, Threads, Window, Windows, answers, print_json
from tsotsallm.files import JsonObject


def export(model: Model,
           gguf: Annotated[Path | None, typer.Option(help="Write this GGUF file, for llama.cpp and Ollama.")] = None,
           hf: Annotated[Path | None, typer.Option(help="Write a plain Hugging Face checkpoint, all weights dense, to this "
                                                        "directory.")] = None,
           imatrix: Annotated[Path | None, typer.Option(help="Write the model's importance matrix to this GGUF file, for "
                                                             "llama.cpp's own quantiser.")] = None,
           calibration: Calibration = None, windows: Windows = 64, window: Window = None,
           dense: Annotated[str | None, typer.Option(help="Number type (f16, bf16 or f32) for weights that are on no grid "
                                                          "of GGUF.")] = None,
           ollama: Annotated[bool, typer.Option(help="Write a Modelfile for Ollama as well.")] = False,
           context: Annotated[int | None, typer.Option(min=2, help="Context that the Modelfile sets, in tokens (default: as "
                                                                   "many as the model knows, at most 8192).")] = None,
           verify: Annotated[bool, typer.Option(help="Read the file back, and compare it with llama.cpp where that is "
                                                     "installed.")] = True,
           accept_differences: Annotated[bool, typer.Option(
               "--accept-differences", help="Write the file although llama.cpp splits texts into other tokens.")] = False,
           threads: Threads = None, as_json: AsJson = False) -> None:
    """Write a model for other engines, or its importance matrix.

    One layer at a time is in memory.
    """
    with answers(as_json):
        from tsotsallm.api.export import to_gguf, to_huggingface, to_imatrix
        from tsotsallm.cli.lines import print_notes, step_bar
        from tsotsallm.errors import ExportError

        if [gguf, hf, imatrix].count(None) != 2:
            raise ExportError("choose what to write: --gguf OUT.gguf, --hf DIRECTORY or --imatrix OUT.gguf, one of them")
        if calibration is not None and imatrix is None:
            raise ExportError("--calibration belongs to --imatrix")
        if gguf is None and (dense or ollama or accept_differences):
            raise ExportError("--dense, --ollama and --accept-differences belong to --gguf")
        if context is not None and not ollama:
            raise ExportError("--context belongs to --ollama, whose Modelfile sets it")
        bar, show = step_bar(as_json)
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            if not as_json:
                print_notes([line])

        with bar:
            if imatrix is not None:
                written = to_imatrix(model, imatrix, calibration=calibration, windows=windows, window=window, tick=show)
            elif hf is not None:
                written = to_huggingface(model, hf, tick=show, say=say)
            else:
                written = to_gguf(model, str(gguf), dense=dense, ollama=ollama, verify=verify,
                                  accept_differences=accept_differences, context=context, tick=show, say=say)
        if as_json:
            print_json(written)
            return
        print_export(written | {"notes": [note for note in written["notes"] if note not in said]})


def print_export(written: JsonObject) -> None:
    """Print what was written, its size, how it compares with llama.cpp, notes for its reader, and how to run it."""
    from tsotsallm.units import human_bytes

    for name in ("gguf", "imatrix", "adapter", "modelfile", "hf"):
        if written.get(name):
            size = f" ({human_bytes(written['bytes'])})" if name in ("gguf", "imatrix") else ""
            print(f"{written[name]}{size}")
    if "tokens" in written:
        print(f"gathered on {written['tokens']} tokens of {written['source']}")
    if written.get("bytes_by_type"):
        print("weights: " + ", ".join(f"{human_bytes(size)} {kind}" for kind, size in written["bytes_by_type"].items()))
    if verified := written.get("verified"):
        split = (f"splits {verified['different']} of {verified['texts']} texts differently, as accepted "
                 f"({', '.join(verified['examples'])})"
                 if verified["different"] else f"splits {verified['texts']} texts into the same tokens")
        print(f"llama.cpp {split}, ends answers at the same tokens, and its log-probabilities of {verified['tokens']} "
              f"tokens differ by {verified['mean']:.2g} nats on average, where {verified['bound']:g} is allowed "
              f"({verified['largest']:.2g} at most)")
    for note in written["notes"]:
        print(f"note: {note}")
    for line in _next_commands(written):
        print(line)


def _next_commands(written: JsonObject) -> list[str]:
    """The commands that run what was written."""
    from tsotsallm.export.publish import ollama_name

    if written.get("modelfile"):
        name = ollama_name(Path(written["gguf"]))
        return ["run it with Ollama:", f"  ollama create {name} -f {shlex.quote(written['modelfile'])}",
                f"  ollama run {name}"]
    if written.get("gguf"):
        adapter = f" --adapter {shlex.quote(written['adapter'])}" if written.get("adapter") else ""
        return [f"run it: tsotsallm chat {shlex.quote(written['gguf'])}{adapter}"]
    return []
