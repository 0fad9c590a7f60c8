"""Models over HTTP, and in a folder for a USB stick."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from tsotsallm.engine.llama import CacheType
from tsotsallm.errors import MissingExtraError, ServeError
from tsotsallm.serve import bundle as bundles
from tsotsallm.serve.bundle import Bundled
from tsotsallm.units import bytes_from_text


def _aloud(line: str) -> None:
    """Print a line that is heard at once, in a pipe too."""
    print(line, flush=True)


def serve(models: Sequence[str | Path], *, port: int = 8080, host: str = "127.0.0.1", key: str | None = None, slots: int = 4,
          queue: int = 16, max_tokens: int = 1024, timeout_s: float = 300.0, max_body: str | int = "1MB", kv: str = "f16",
          prompt_cache: bool = True, country: str | None = None, studio: str | Path | None = None,
          say: Callable[[str], None] = _aloud) -> None:
    """Serve models over HTTP until Ctrl-C; with `studio`, a folder, its page makes models there too.

    An address that other computers reach needs a key. With one slot and no prompt cache, the same seed gives the same text
    as `generate` does.
    """
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
    if studio is not None and not Path(studio).is_dir():
        raise ServeError(f"{studio} is not a folder; make it first, or name one with --folder")
    rules = dataclasses.replace(check_rules(host, key), body_bytes=bytes_from_text(str(max_body), "--max-body", ServeError))
    place = listening(host, port)
    try:
        how = Loading(cast(CacheType, kv), slots, prompt_cache, country)
        served = Models(queue, timeout_s)
        load_all([str(model) for model in models], how, served, say)
        jobs = None if studio is None else Jobs(Path(studio).resolve())
        run(create_app(served, rules, most_tokens=max_tokens, jobs=jobs, how=how), place, say)
    finally:
        place.close()


def make_bundle(models: Sequence[str | Path], out: str | Path, *, platform: str | None = None, python: str | None = None,
                index: str | None = None, say: Callable[[str], None] = print) -> Bundled:
    """Write a folder with everything that a computer without a connection needs to run models."""
    return bundles.bundle([str(model) for model in models], Path(out), platform=platform, python=python, index=index,
                          say=say)


def verify_bundle(folder: str | Path) -> int:
    """Check every file of a bundle against its checksum; their number."""
    return bundles.verify(Path(folder))
