"""tsotsallm chat: a conversation with a model."""

from __future__ import annotations

import sys

from tsotsallm.cli.common import (
    Adapter,
    GgufOrCheckpoint,
    Kv,
    Seed,
    Temperature,
    Threads,
    Tokens,
    TopK,
    TopP,
    answers,
)
from tsotsallm.cli.generate import print_pieces


def chat(model: GgufOrCheckpoint, tokens: Tokens = 256, temperature: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0,
         seed: Seed = 0, kv: Kv = "f16", adapter: Adapter = None, threads: Threads = None) -> None:
    """Talk with a model in the terminal.

    Each line gets an answer; an empty line or Ctrl-D ends the conversation.
    """
    with answers():
        from tsotsallm.api.chat import Conversation

        notes: list[str] = []
        conversation = Conversation(model, tokens=tokens, kv=kv, adapter=adapter, say=notes.append, temperature=temperature,
                                    top_p=top_p, top_k=top_k, seed=seed)
        interactive = sys.stdin.isatty()
        while True:
            if interactive:
                print("> ", end="", flush=True)
            line = sys.stdin.readline().strip()
            if not line:
                break
            print_pieces(conversation.answer(line), notes)
