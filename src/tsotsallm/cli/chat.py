"""tsotsallm chat: a conversation with a model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tsotsallm.cli.common import (
    Adapter,
    Context,
    GgufOrCheckpoint,
    Kv,
    Seed,
    Temperature,
    Threads,
    Tokens,
    TopK,
    TopP,
    answers,
    to_stderr,
)
from tsotsallm.cli.generate import print_pieces

if TYPE_CHECKING:
    from tsotsallm.api.chat import Conversation

QUIT = "/quit"
HOW_TO_END = f"Ctrl-C stops an answer; an empty line, {QUIT} or Ctrl-D ends the conversation"


def chat(model: GgufOrCheckpoint, tokens: Tokens = 256, temperature: Temperature = 0.0, top_p: TopP = 1.0, top_k: TopK = 0,
         seed: Seed = 0, kv: Kv = "f16", context: Context = None, adapter: Adapter = None, threads: Threads = None) -> None:
    """Talk with a model in the terminal.

    Each line gets an answer, which Ctrl-C stops; an empty line, /quit, Ctrl-D, or Ctrl-C twice ends the conversation.
    """
    with answers():
        from tsotsallm.api.chat import Conversation

        interactive = sys.stdin.isatty()
        notes: list[str] = []
        conversation = Conversation(model, tokens=tokens, kv=kv, adapter=adapter, context=context, say=notes.append,
                                    temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        if interactive:
            for line in (*notes, HOW_TO_END):
                to_stderr(line)
            notes.clear()
        _converse(conversation, notes, interactive=interactive)


def _converse(conversation: Conversation, notes: list[str], *, interactive: bool) -> None:
    """Answer line by line; in a terminal Ctrl-C ends the conversation only where nothing was asked since the last one."""
    stopped = False
    while True:
        try:
            if interactive:
                print("> ", end="", flush=True)
            line = sys.stdin.readline().strip()
            if line in ("", QUIT):
                break
            stopped = False
            print_pieces(conversation.answer(line), notes)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            if stopped:
                break
            stopped = True
            to_stderr(f"Ctrl-C again, {QUIT} or Ctrl-D ends the conversation")
