"""Models over HTTP."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack, cast

from tsotsallm.engine.llama import CacheType
from tsotsallm.errors import MissingExtraError, ServeError
from tsotsallm.records import amended
from tsotsallm.units import bytes_from_text


@dataclass(frozen=True)
class ServiceOptions:
    """How much a service takes on at a time.

    slots         answers that a GGUF file writes at the same time
    queue         requests that may wait; more are refused with status 429
    max_tokens    new tokens of an answer at most
    timeout_s     seconds that a request may take
    max_body      bytes of a request at most, such as "1MB"
    kv            type of a GGUF file's key-value cache
    context       tokens of each conversation with a GGUF file; None: see `engine.llama.usual_context`
    prompt_cache  keep what was read for the next prompt that begins alike
    country       ISO code (CMR, KEN, ...): report the energy of every answer
    """

    slots: int = 4
    queue: int = 16
    max_tokens: int = 1024
    timeout_s: float = 300.0
    max_body: str | int = "1MB"
    kv: str = "f16"
    context: int | None = None
    prompt_cache: bool = True
    country: str | None = None


class ServiceKeywords(TypedDict, total=False):
    """The fields of ServiceOptions, as keywords."""

    slots: int
    queue: int
    max_tokens: int
    timeout_s: float
    max_body: str | int
    kv: str
    context: int | None
    prompt_cache: bool
    country: str | None


def _at_once(line: str) -> None:
    """Print a line so that a reader has it at once, in a pipe too."""
    print(line, flush=True)


def serve(models: Sequence[str | Path], *, port: int = 8080, host: str = "127.0.0.1", key: str | None = None,
          studio: str | Path | None = None, say: Callable[[str], None] = _at_once, options: ServiceOptions | None = None,
          **keywords: Unpack[ServiceKeywords]) -> None:
    """Serve models over HTTP until Ctrl-C; with `studio`, a folder, its page makes models there too.

    An address that other computers reach needs a key. With one slot and no prompt cache, the same seed gives the same text
    as `generate` does. More options are fields of ServiceOptions, or keywords.
    Raises MissingExtraError, and ServeError where the service cannot start.
    """
    options = amended(options or ServiceOptions(), keywords, serve)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(str(error.name), "serve", "serving models") from None
    from tsotsallm.serve.app import check_rules, create_app, listening, run
    from tsotsallm.serve.jobs import Jobs
    from tsotsallm.serve.served import Loading, Models, load_all

    if not models and studio is None:
        raise ServeError("name a model to serve, such as a GGUF file or 'embedded'")
    if studio is not None:
        try:
            Path(studio).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ServeError(f"{studio} cannot be a folder ({error.strerror or error}); name one with --folder") from None
    most = bytes_from_text(str(options.max_body), "--max-body", ServeError)
    rules = dataclasses.replace(check_rules(host, key), body_bytes=most)
    place = listening(host, port)
    try:
        how = Loading(cast(CacheType, options.kv), options.slots, options.prompt_cache, options.country,
                      options.context)
        served = Models(options.queue, options.timeout_s)
        load_all([str(model) for model in models], how, served, say)
        jobs = None if studio is None else Jobs(Path(studio).resolve())
        run(create_app(served, rules, most_tokens=options.max_tokens, jobs=jobs, how=how), place, say)
    finally:
        place.close()
