"""Options that several commands have, and how every command ends: with its output, or with one line about an error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tsotsallm.files import one_line
from tsotsallm.machine import MOST_THREADS, THREADS, use_threads

TRACEBACK = "TSOTSALLM_TRACEBACK"
MOST_CHARACTERS = 1000
UsageError: Any = typer.BadParameter.__bases__[0]
"""What typer raises for a wrong option or argument; it has moved between typer's versions."""


class Verbs(TyperGroup):
    """A group of commands in which one, `default`, needs no name: `tsotsallm study SPEC` is `tsotsallm study run SPEC`."""

    default = ""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that arguments name, or the default one."""
        return super().resolve_command(ctx, args if args[0] in self.commands else [self.default, *args])


# -- models and recipes -----------------------------------------------------------------------------------------------

Model = Annotated[str, typer.Argument(help="Model to read: a checkpoint directory, a hub id (NAME/MODEL), a GGUF file, a "
                                           "model of Ollama (ollama:NAME), or 'embedded' for the small model that is "
                                           "included.")]
GgufOrCheckpoint = Annotated[str, typer.Argument(help="Model to run: a GGUF file, a model of Ollama (ollama:NAME), a "
                                                      "checkpoint directory, a hub id (NAME/MODEL), or 'embedded'.")]
RecipeText = Annotated[str, typer.Argument(help="Recipe to follow: a YAML file, the name of a packaged recipe, inline YAML, "
                                                "or one line such as 'depth:2, gptq:mixed:4.5'.")]
Calibration = Annotated[str | None, typer.Option(help="Text to calibrate on: a text file, a directory of texts, a .jsonl "
                                                      "file of conversations, a data set on the hub, 'self' for text "
                                                      "that the model writes itself first, or several with their "
                                                      "shares (novels/:0.5,self:0.5).")]
Windows = Annotated[int, typer.Option(help="Number of calibration windows.")]
Window = Annotated[int | None, typer.Option(help="Length of a calibration window in tokens, at most the model's context "
                                                 "(default: 1024, for fit and --imatrix 512, or the context where that is "
                                                 "shorter).")]
WindowsSeed = Annotated[int, typer.Option(help="Random seed that selects the calibration windows.")]
Adapter = Annotated[Path | None, typer.Option(help="GGUF adapter to apply to a GGUF file.")]

# -- evaluation -------------------------------------------------------------------------------------------------------

Tasks = Annotated[str | None, typer.Option(help="Tasks to evaluate on, separated by commas.")]
Data = Annotated[Path | None, typer.Option(help="File with the data of one task, or folder with the data of several.")]
Items = Annotated[int | None, typer.Option(help="Evaluate at most this number of items of every task.")]
ItemsSeed = Annotated[int, typer.Option(help="Random seed that selects the items.")]
EvaluationCountry = Annotated[str | None, typer.Option(help="Report energy and CO₂ for a country, given by its ISO code "
                                                            "(CMR, KEN, ...), or for several, separated by commas.")]
Speed = Annotated[bool, typer.Option(help="Measure speed and memory as well.")]

# -- generation -------------------------------------------------------------------------------------------------------

Tokens = Annotated[int, typer.Option(help="Write at most this number of new tokens.")]
Kv = Annotated[str, typer.Option(help="Number type of a GGUF file's key-value cache: f32, f16, q8_0 or q4_0.")]
Context = Annotated[int | None, typer.Option(min=2, help="Context of a GGUF file in tokens (default: as many as the model "
                                                         "knows, at most 8192 and what a quarter of the free memory "
                                                         "holds).")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample among the likeliest tokens whose probabilities add up to this value, at "
                                          "most 1.")]
TopK = Annotated[int, typer.Option(help="Sample among this number of likeliest tokens; 0 samples among all.")]
Seed = Annotated[int, typer.Option(help="Random seed of sampling.")]
Country = Annotated[str | None, typer.Option(help="Report the energy of every answer for a country, given by its ISO code "
                                                  "(CMR, KEN, ...).")]

# -- how a command runs -----------------------------------------------------------------------------------------------

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
CacheBytes = Annotated[str | None, typer.Option(help="Disk that a model on the hub may take while it is fetched layer by "
                                                     "layer, such as 2GB; what is there stays for the next command "
                                                     "(default: what the recipe needs, deleted at the end).")]
Device = Annotated[str, typer.Option(help="Device to compute on: cpu, or cuda where there is a GPU.")]
Scratch = Annotated[Path | None, typer.Option(help="Directory for hidden states (default: the system's temporary one).")]
Restart = Annotated[bool, typer.Option("--restart", help="Delete unfinished work of an earlier attempt and start again.")]
Workers = Annotated[str | None, typer.Option(help="Address of a Dask cluster's scheduler, such as tcp://192.168.1.5:8786.")]
TlsCa = Annotated[str | None, typer.Option("--tls-ca", help="File with the certificate of the authority, for tls:// "
                                                            "addresses.")]
TlsCert = Annotated[str | None, typer.Option("--tls-cert", help="File with this computer's certificate.")]
TlsKey = Annotated[str | None, typer.Option("--tls-key", help="File with the key of this computer's certificate.")]


def _use_threads(count: int | None) -> int | None:
    use_threads(count)
    return count


def _use_threads_if_given(count: int | None) -> int | None:
    return count if count is None else _use_threads(count)


Threads = Annotated[int | None, typer.Option(min=1, max=MOST_THREADS, envvar=THREADS, callback=_use_threads,
                                             help="Number of threads to compute with (default: the number of idle cores).")]
"""Of every command that computes; the callback does all, before torch is loaded."""
ServingThreads = Annotated[int | None, typer.Option("--threads", min=1, max=MOST_THREADS, envvar=THREADS,
                                                    callback=_use_threads_if_given,
                                                    help="Number of threads to compute with (default: all cores).")]
"""Of commands that run for days: which cores are busy when they begin says nothing."""


# -- how a command ends -----------------------------------------------------------------------------------------------

@contextmanager
def answers(as_json: bool = False) -> Iterator[None]:
    """Turn whatever goes wrong into one line on stderr and an exit code: 1, 2 for a wrong option, 130 for Ctrl-C."""
    from tsotsallm.errors import read_on_a_command_line

    with read_on_a_command_line():
        yield from _ended(as_json)


def _ended(as_json: bool) -> Iterator[None]:
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
        print("\n" * sys.stderr.isatty() + "stopped; finished work is kept: run the same command again to resume",
              file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        where = error.filename or "a file, or the output"
        known = f"{where}: {error.strerror}; check the path, its permissions and the free space"
        _fail(_unexpected(error) if error.errno is None else known, type(error).__name__, as_json)
    except BaseException as error:      # panics of Rust libraries are no Exceptions
        _fail(_unexpected(error), type(error).__name__, as_json)


def _unexpected(error: BaseException) -> str:
    """The message about an exception that should not have come so far; its traceback as well, where that is asked for."""
    import traceback

    if os.environ.get(TRACEBACK):
        traceback.print_exception(error)
    message = one_line(error) or "no more is known"
    if isinstance(error, MemoryError) or "can't allocate memory" in message:
        return "memory ran out; close other programs, or take a smaller model or fewer windows"
    return (f"internal error: {type(error).__name__}: {message}; please report it with the command that you ran; "
            f"{TRACEBACK}=1 shows where it arose")


def _fail(message: str, kind: str, as_json: bool, code: int = 1) -> None:
    message = one_line(message, MOST_CHARACTERS)
    if as_json:
        print(json.dumps({"error": kind, "message": message}))
    else:
        print(f"tsotsallm: {message}", file=sys.stderr)
    sys.exit(code)


def close_output() -> None:
    """Write what is still to be written to stdout; where that fails, exit with 1 and one line about it."""
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


# -- values of options, and output ------------------------------------------------------------------------------------

def computers_from(workers: str | None, ca: str | None, cert: str | None, key: str | None) -> Any:
    """The cluster that options name, as an `api.computers.Computers`; None without one."""
    from tsotsallm.api.computers import Computers
    from tsotsallm.errors import ClusterError

    if workers is None and (ca or cert or key):
        raise ClusterError("--tls-ca, --tls-cert and --tls-key belong to --workers, which is not given")
    return None if workers is None else Computers(workers, ca, cert, key)


def bytes_or_none(text: str | None, option: str) -> int | None:
    """The bytes that an option names; None where it is not given."""
    from tsotsallm.errors import TsotsallmError
    from tsotsallm.units import bytes_from_text

    return None if text is None else bytes_from_text(text, option, TsotsallmError)


def names_in(text: str | None) -> list[str]:
    """The names in an option's value, separated by commas."""
    return text.split(",") if text else []


def print_json(content: Any) -> None:
    """Print what has a JSON form, indented."""
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))


def to_stderr(line: str) -> None:
    """Print a line beside the output."""
    print(line, file=sys.stderr)


def progress(workers: object = None) -> Callable[[str], None]:
    """What lines of progress are passed to: stderr where it is a terminal, as with bars, or work is on a cluster."""
    return to_stderr if workers is not None or sys.stderr.isatty() else lambda _line: None
