"""tsotsallm generate: texts that a model continues."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import (
    Adapter,
    Context,
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


def generate(model: GgufOrCheckpoint,
             prompt: Annotated[str | None, typer.Argument(help="Text to continue.")] = None,
             prompts: Annotated[Path | None, typer.Option(help="Text file with a prompt in every line, instead of one "
                                                               "PROMPT.")] = None,
             out: Annotated[Path | None, typer.Option("-o", "--out", help="File for the answers to --prompts, as JSON "
                                                                          "lines.")] = None,
             workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
             tokens: Tokens = 64, temperature: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0, seed: Seed = 0,
             kv: Kv = "f16", context: Context = None, adapter: Adapter = None, threads: Threads = None) -> None:
    """Continue a text, or every line of a file.

    GGUF files run in llama.cpp, checkpoints in transformers.
    """
    with answers():
        from tsotsallm.api.generate import generate, generate_many
        from tsotsallm.engine.interface import Sampling
        from tsotsallm.errors import TsotsallmError

        computers = computers_from(workers, tls_ca, tls_cert, tls_key)
        if prompts is not None:
            if prompt is not None or out is None or kv != "f16" or adapter is not None or context:
                raise TsotsallmError("--prompts FILE needs -o OUT, and excludes a prompt, --kv, --context and --adapter")
            count = generate_many(model, prompts, out, tokens=tokens, workers=computers, say=progress(workers),
                                  sampling=Sampling(temperature, top_p, top_k, seed))
            print(f"{count} answers in {out}")
            return
        if prompt is None or out is not None or computers is not None:
            raise TsotsallmError("give a text to continue; -o and --workers are for several, given by --prompts FILE")
        notes: list[str] = []
        pieces = generate(model, prompt, tokens=tokens, kv=kv, adapter=adapter, context=context, say=notes.append,
                          temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        print_pieces(pieces, notes, prompt)


def print_pieces(pieces: Iterable[str], notes: list[str], begun: str = "") -> None:
    """Print an answer as it comes, notes before it; where none comes, the error is all that is printed."""
    for piece in itertools.chain(pieces, ["\n"]):
        while notes:
            to_stderr(notes.pop(0))
        print(begun + piece, end="", flush=True)
        begun = ""
