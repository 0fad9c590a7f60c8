"""Commands: generate, chat."""

from __future__ import annotations

import sys
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
        answer = talking.generate(model, prompt, tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                                  kv=kv, adapter=adapter, say=to_stderr)
        print(prompt, end="", flush=True)
        for piece in answer:
            print(piece, end="", flush=True)
        print()


@app.command()
def chat(model: GgufOrCheckpoint, tokens: Tokens = 256, temperature: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0,
         seed: Seed = 0, kv: Kv = "f16", adapter: Adapter = None, threads: Threads = None) -> None:
    """Converse: one line, one answer; an empty line or Ctrl-D ends it."""
    with answers():
        from tsotsallm.api import talking

        conversation = talking.Conversation(model, tokens=tokens, temperature=temperature, top_p=top_p, top_k=top_k,
                                            seed=seed, kv=kv, adapter=adapter, say=to_stderr)
        interactive = sys.stdin.isatty()
        while True:
            if interactive:
                print("> ", end="", flush=True)
            line = sys.stdin.readline().strip()
            if not line:
                break
            for piece in conversation.answer(line):
                print(piece, end="", flush=True)
            print()
