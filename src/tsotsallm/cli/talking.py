"""Commands: generate, chat."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import (
    Adapter,
    GgufOrCheckpoint,
    Kv,
    Seed,
    Temperature,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    Tokens,
    TopK,
    TopP,
    Workers,
    answers,
    computers_from,
    progress,
    to_stderr,
)

app = typer.Typer(rich_markup_mode=None)


@app.command()
def generate(model: GgufOrCheckpoint,
             prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
             prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt in every line, instead.")] = None,
             out: Annotated[Path | None, typer.Option("-o", "--out", help="Of --prompts: JSON lines to write.")] = None,
             workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
             tokens: Tokens = 64, temperature: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0, seed: Seed = 0,
             kv: Kv = "f16", adapter: Adapter = None, threads: Threads = None) -> None:
    """Continue a text, or many.

    GGUF files run in llama.cpp, checkpoints in transformers.
    """
    with answers():
        from tsotsallm.api import talking
        from tsotsallm.errors import TsotsallmError

        computers = computers_from(workers, tls_ca, tls_cert, tls_key)
        if prompts is not None:
            if prompt is not None or out is None or kv != "f16" or adapter is not None:
                raise TsotsallmError("--prompts FILE goes with -o OUT, and without a prompt, --kv or --adapter")
            count = talking.generate_many(model, prompts, out, tokens=tokens, temperature=temperature, top_p=top_p,
                                          top_k=top_k, seed=seed, workers=computers, say=progress(workers))
            print(f"{count} answers in {out}")
            return
        if prompt is None or out is not None or computers is not None:
            raise TsotsallmError("give a text to continue; -o and --workers are for many, given by --prompts FILE")
        notes: list[str] = []
        answer = talking.generate(model, prompt, tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                                  kv=kv, adapter=adapter, say=notes.append)
        _print_pieces(answer, notes, prompt)


def _print_pieces(pieces: Iterable[str], notes: list[str], begun: str = "") -> None:
    """Print an answer as it comes, notes before it; where none comes, the error is all that is printed."""
    for piece in itertools.chain(pieces, ["\n"]):
        while notes:
            to_stderr(notes.pop(0))
        print(begun + piece, end="", flush=True)
        begun = ""


@app.command()
def chat(model: GgufOrCheckpoint, tokens: Tokens = 256, temperature: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0,
         seed: Seed = 0, kv: Kv = "f16", adapter: Adapter = None, threads: Threads = None) -> None:
    """Converse: one line, one answer; an empty line or Ctrl-D ends it."""
    with answers():
        from tsotsallm.api import talking

        notes: list[str] = []
        conversation = talking.Conversation(model, tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                                            seed=seed, kv=kv, adapter=adapter, say=notes.append)
        interactive = sys.stdin.isatty()
        while True:
            if interactive:
                print("> ", end="", flush=True)
            line = sys.stdin.readline().strip()
            if not line:
                break
            _print_pieces(conversation.answer(line), notes)
