"""Commands: export, push."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import AsJson, Model, Threads, answers, print_json

app = typer.Typer(rich_markup_mode=None)


@app.command()
def export(model: Model,
           gguf: Annotated[Path | None, typer.Option(help="Write this GGUF file, for llama.cpp and Ollama.")] = None,
           hf: Annotated[Path | None, typer.Option(help="Write this plain Hugging Face checkpoint, all dense.")] = None,
           dense: Annotated[str | None, typer.Option(help="f16, bf16 or f32: for weights on no grid of GGUF.")] = None,
           ollama: Annotated[bool, typer.Option(help="Add a Modelfile for Ollama.")] = False,
           verify: Annotated[bool, typer.Option(help="Read the file back, and compare it with llama.cpp where that is "
                                                     "installed.")] = True,
           accept_differences: Annotated[bool, typer.Option(
               "--accept-differences", help="Write the file although llama.cpp cuts some text into other tokens.")] = False,
           threads: Threads = None, as_json: AsJson = False) -> None:
    """Write a checkpoint in a form that other engines run.

    One layer at a time is in memory.
    """
    with answers(as_json):
        from tsotsallm.api import exporting
        from tsotsallm.console.exporting import print_export
        from tsotsallm.console.lines import step_bar
        from tsotsallm.errors import ExportError

        if (gguf is None) == (hf is None):
            raise ExportError("say what to write: --gguf OUT.gguf or --hf DIRECTORY, one of them")
        if hf is not None and (dense or ollama or accept_differences):
            raise ExportError("--dense, --ollama and --accept-differences belong to --gguf")
        bar, show = step_bar(as_json)
        with bar:
            found = exporting.to_huggingface(model, hf, tick=show) if gguf is None and hf is not None else exporting.to_gguf(
                model, str(gguf), dense=dense, ollama=ollama, verify=verify, accept_differences=accept_differences,
                tick=show)
        print_json(found) if as_json else print_export(found)


@app.command()
def push(result: Annotated[Path, typer.Argument(help="A result's directory, or a GGUF file.")],
         repository: Annotated[str, typer.Argument(help="NAME/MODEL on the hub.")],
         upload: Annotated[bool, typer.Option("--upload", help="Really upload; else only say what would be.")] = False,
         public: Annotated[bool, typer.Option(help="Make a new repository public.")] = False,
         as_json: AsJson = False) -> None:
    """Upload a result with its model card to the hub.

    Without --upload nothing is sent.
    """
    with answers(as_json):
        from tsotsallm.api import exporting
        from tsotsallm.console.exporting import print_push

        found = exporting.push(result, repository, upload=upload, public=public)
        print_json(found) if as_json else print_push(found)
