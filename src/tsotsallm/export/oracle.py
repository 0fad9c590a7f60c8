"""Queries llama.cpp about a file in a separate process, so that an abort of the engine ends only that process.

    python -m tsotsallm.export.oracle < request.json > answer.json
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tsotsallm.errors import ExportError
from tsotsallm.files import one_line

LEAST_S, BYTES_PER_S = 900.0, 2e7
"""The time limit of the engine: 15 minutes, plus the time to read the file from a slow disk at 20 MB per second."""


def ask_llama_cpp(path: Path, request: Mapping[str, object], adapter: Path | None = None) -> dict[str, Any]:
    """llama.cpp's answers about a file; raises ExportError where it cannot load the file, aborts or hangs.

    The request has `ids` (tokens whose log-probabilities are wanted), `texts` and `conversations` to split into tokens, and
    `forced` (tokens, each of which is forced to come next, to see whether it ends the answer). The answer has
    `log_likelihoods`, `texts`, `conversations` and `ends`.
    """
    asked = {"path": str(path), "adapter": None if adapter is None else str(adapter), **request}
    limit = LEAST_S + path.stat().st_size / BYTES_PER_S
    with tempfile.TemporaryFile() as answered, tempfile.TemporaryFile() as told:
        try:
            ended = subprocess.run([sys.executable, "-m", "tsotsallm.export.oracle"], input=json.dumps(asked).encode(),
                                   stdout=answered, stderr=told, timeout=limit, check=False,
                                   env=os.environ | {"PYTHONPATH": os.pathsep.join(folder for folder in sys.path if folder)})
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
        answers: dict[str, Any] = json.loads(content)
    except ValueError:
        raise ExportError(f"llama.cpp gave no answer about the file ({one_line(words[-300:])}); the file is not "
                          "kept") from None
    if "error" in answers:
        raise ExportError(f"llama.cpp does not run the file ({one_line(answers['error'])}); the file is not kept")
    return answers


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Answer a request in this process; raises TsotsallmError where llama.cpp does not run the file."""
    from tsotsallm.engine.llama import Llama

    engine = Llama(Path(asked["path"]), kv="f32", adapter=None if asked["adapter"] is None else Path(asked["adapter"]),
                   context=max(16, len(asked["ids"]) + 8), threads=asked.get("threads"))
    return {"log_likelihoods": list(engine.log_likelihoods(asked["ids"])) if len(asked["ids"]) > 1 else [],
            "texts": [engine.raw_tokens(text) for text in asked["texts"]],
            "conversations": [engine.raw_conversation(messages) for messages in asked["conversations"]],
            "ends": [engine.ends_at(token) for token in asked["forced"]]}


def main() -> None:
    """Answer the request on standard input, as JSON on standard output."""
    from tsotsallm.errors import TsotsallmError

    answered = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)                       # what the engine prints is not part of the answer
    try:
        answers = answer(json.load(sys.stdin))
    except TsotsallmError as error:
        answers = {"error": str(error)}
    with answered:
        json.dump(answers, answered)
    sys.stdout.flush()
    os._exit(0)                         # the engine's threads may abort while the interpreter ends


if __name__ == "__main__":
    main()
