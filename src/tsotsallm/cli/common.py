"""Options that several commands have, and how every command ends: an answer, or one line about what is wrong."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from tsotsallm.files import one_line
from tsotsallm.machine import MOST_THREADS, THREADS, use_threads

TRACEBACK = "TSOTSALLM_TRACEBACK"
MOST_CHARACTERS = 1000
UsageError: Any = typer.BadParameter.__bases__[0]
"""What typer raises for a wrong option or argument; it has moved between typer's versions."""

Model = Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or 'embedded' for the model that comes along.")]
RecipeText = Annotated[str, typer.Argument(help="YAML file, packaged name, inline YAML, or one line such as "
                                                "'depth:2, wanda:2:4, gptq:4'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda where there is a GPU.")]
Windows = Annotated[int, typer.Option(help="Calibration windows.")]
Window = Annotated[int, typer.Option(help="Tokens of a calibration window (at most what the model knows).")]
Restart = Annotated[bool, typer.Option("--restart", help="Delete unfinished work of an earlier attempt; begin again.")]
Workers = Annotated[str | None, typer.Option(help="Scheduler of a Dask cluster, such as tcp://192.168.1.5:8786.")]
TlsCa = Annotated[str | None, typer.Option("--tls-ca", help="Certificate of the authority, for tls:// addresses.")]
TlsCert = Annotated[str | None, typer.Option("--tls-cert", help="This computer's certificate.")]
TlsKey = Annotated[str | None, typer.Option("--tls-key", help="Its key.")]


def _ask_threads(count: int | None) -> int | None:
    use_threads(count)
    return count


def _take_threads(count: int | None) -> int | None:
    return count if count is None else _ask_threads(count)


Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, envvar=THREADS, callback=_ask_threads,
                                             help="Threads to compute on (default: as many as cores are idle).")]
"""Of every command that computes; the callback does all, before torch is loaded."""
ServingThreads = Annotated[int | None, typer.Option("--threads", min=1, max=MOST_THREADS, envvar=THREADS,
                                                    callback=_take_threads, help="Threads to compute on (default: all).")]
"""Of what runs for days: what is busy when it begins says nothing."""


@contextmanager
def answers(as_json: bool = False) -> Iterator[None]:
    """Turn whatever goes wrong into one line on stderr and an exit code: 1, 2 for a wrong option, 130 for Ctrl-C."""
    from tsotsallm.errors import TsotsallmError

    _quiet_libraries()
    try:
        yield
    except (SystemExit, typer.Exit):
        raise
    except UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "tsotsallm"
        _fail(f"{error.format_message().rstrip('.')}; `{where} --help` says what there is", type(error).__name__, as_json, 2)
    except TsotsallmError as error:
        _fail(str(error), type(error).__name__, as_json)
    except KeyboardInterrupt:
        # a terminal shows ^C on the line that it stopped in
        print("\n" * sys.stderr.isatty() + "stopped; what is finished is kept: run the same command again to go on",
              file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        where = error.filename or "a file, or the output"
        told = f"{where}: {error.strerror}; check the path, its permissions and the free space"
        _fail(_unexpected(error) if error.errno is None else told, type(error).__name__, as_json)
    except BaseException as error:      # panics of Rust libraries are no Exceptions
        _fail(_unexpected(error), type(error).__name__, as_json)


def _unexpected(error: BaseException) -> str:
    """What to say about an exception that should not have come so far; where it arose as well, where that is asked for."""
    import traceback

    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    message = one_line(error) or "no more is known"
    if isinstance(error, MemoryError) or "can't allocate memory" in message:
        return "memory ran out; close other programs, or take a smaller model or fewer windows"
    return (f"internal error: {type(error).__name__}: {message}; please report it with what was asked for; {TRACEBACK}=1 "
            "shows where it arose")


def _fail(message: str, kind: str, as_json: bool, code: int = 1) -> None:
    message = one_line(message, MOST_CHARACTERS)
    if as_json:
        print(json.dumps({"error": kind, "message": message}))
    else:
        print(f"tsotsallm: {message}", file=sys.stderr)
    sys.exit(code)


def close_output() -> None:
    """Write what is still to be written to stdout; where that fails, end with 1, and without the interpreter's own words."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"tsotsallm: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)


def _quiet_libraries() -> None:
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def computers_from(workers: str | None, ca: str | None, cert: str | None, key: str | None) -> Any:
    """The cluster that options name; None without one."""
    from tsotsallm.api.computers import Computers
    from tsotsallm.errors import ClusterError

    if workers is None and (ca or cert or key):
        raise ClusterError("--tls-ca, --tls-cert and --tls-key belong to --workers, which is not given")
    return None if workers is None else Computers(workers, ca, cert, key)


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))


Tokens = Annotated[int, typer.Option(help="New tokens at most.")]
Kv = Annotated[str, typer.Option(help="Key-value cache of a GGUF file: f32, f16, q8_0 or q4_0.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens of this share together.")]
TopK = Annotated[int, typer.Option(help="Sample among so many likeliest tokens; 0: all.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Country = Annotated[str | None, typer.Option(help="ISO code (CMR, KEN, ...): energy of every answer as well.")]
GgufOrCheckpoint = Annotated[str, typer.Argument(help="GGUF file, checkpoint directory, hub id, or 'embedded'.")]
Adapter = Annotated[Path | None, typer.Option(help="GGUF adapter beside a GGUF file.")]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def progress(workers: Any = None) -> Callable[[str], None]:
    """Who is told how far work is: whoever watches a terminal, as with bars; of work on a cluster, always."""
    return to_stderr if workers is not None or sys.stderr.isatty() else lambda _line: None
