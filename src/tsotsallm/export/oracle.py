"""llama.cpp asked about a file in a process of its own, so that an abort of the engine ends that process alone.

    python -m tsotsallm.export.oracle < request.json > answer.json
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tsotsallm.errors import ExportError
from tsotsallm.files import one_line

LEAST_S, BYTES_PER_S = 900.0, 2e7
"""The longest that the engine may take: a quarter of an hour, and what reading the file from a slow disk takes."""


def ask_llama_cpp(path: Path, request: dict[str, Any], adapter: Path | None = None) -> dict[str, Any]:
    """What llama.cpp answers about a file; ExportError where it cannot load it, aborts or hangs.

    The request has `ids` (log-probabilities of these tokens are wanted), `texts` and `conversations` to be cut into tokens,
    and `forced`, tokens of which each is made to come next, to see whether it ends the answer.
    """
    asked = {"path": str(path), "adapter": None if adapter is None else str(adapter), **request}
    limit = LEAST_S + path.stat().st_size / BYTES_PER_S
    with tempfile.TemporaryFile() as answered, tempfile.TemporaryFile() as told:
        try:
            ended = subprocess.run([sys.executable, "-m", "tsotsallm.export.oracle"], input=json.dumps(asked).encode(),
                                   stdout=answered, stderr=told, timeout=limit, check=False,
                                   env=os.environ | {"PYTHONPATH": os.pathsep.join(one for one in sys.path if one)})
        except subprocess.TimeoutExpired:
            raise ExportError(f"llama.cpp did not answer within {limit:.0f} s; the file is not kept; try again when the "
                              "computer is less busy, or export with --no-verify") from None
        answered.seek(0)
        told.seek(0)
        content, words = answered.read(), told.read().decode(errors="replace")
    if ended.returncode < 0:
        raise ExportError(f"llama.cpp ended with {signal.Signals(-ended.returncode).name} while it ran the file "
                          f"({one_line(words[-300:])}); the file is not kept")
    try:
        found: dict[str, Any] = json.loads(content)
    except ValueError:
        raise ExportError(f"llama.cpp could not be asked about the file ({one_line(words[-300:])}); the file is not "
                          "kept") from None
    if "error" in found:
        raise ExportError(f"llama.cpp does not run the file ({one_line(found['error'])}); the file is not kept")
    return found


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Answer a request in this process."""
    from tsotsallm.engine.llama import Llama

    engine = Llama(Path(asked["path"]), kv="f32", adapter=None if asked["adapter"] is None else Path(asked["adapter"]),
                   context=max(16, len(asked["ids"]) + 8), threads=asked.get("threads"))
    return {"log_likelihoods": list(engine.log_likelihoods(asked["ids"])) if len(asked["ids"]) > 1 else [],
            "texts": [engine.raw_tokens(text) for text in asked["texts"]],
            "conversations": [engine.raw_conversation(messages) for messages in asked["conversations"]],
            "ends": [engine.ends_at(token) for token in asked["forced"]]}


def main() -> None:
    from tsotsallm.errors import TsotsallmError

    answered = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)                       # what the engine prints is no part of the answer
    try:
        found = answer(json.load(sys.stdin))
    except TsotsallmError as error:
        found = {"error": str(error)}
    with answered:
        json.dump(found, answered)
    sys.stdout.flush()
    os._exit(0)                         # the engine's threads may abort while the interpreter ends


if __name__ == "__main__":
    main()
