"""Options that several commands have, and how every command ends: an answer, or one line about what is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or 'embedded' for the model that comes along.")]
RecipeText = Annotated[str, typer.Argument(help="YAML file, packaged name, inline YAML, or one line such as "
                                                "'depth:2, wanda:2:4, gptq:4'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda where there is a GPU.")]
Windows = Annotated[int, typer.Option(help="Calibration windows.")]
Window = Annotated[int, typer.Option(help="Tokens of a calibration window (at most what the model knows).")]
Workers = Annotated[str | None, typer.Option(help="Scheduler of a Dask cluster, such as tcp://192.168.1.5:8786.")]
TlsCa = Annotated[str | None, typer.Option("--tls-ca", help="Certificate of the authority, for tls:// addresses.")]
TlsCert = Annotated[str | None, typer.Option("--tls-cert", help="This computer's certificate.")]
TlsKey = Annotated[str | None, typer.Option("--tls-key", help="Its key.")]


@contextmanager
def answers(as_json: bool = False) -> Iterator[None]:
    """Turn errors into one line on stderr and an exit code: 1 for a user's error, 130 for Ctrl-C."""
    from tsotsallm.errors import TsotsallmError

    _quiet_libraries()
    try:
        yield
    except TsotsallmError as error:
        _fail(str(error), type(error).__name__, as_json)
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept: run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the free "
              "space", type(error).__name__, as_json)


def _fail(message: str, kind: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": kind, "message": message}))
    else:
        print(f"tsotsallm: {message}", file=sys.stderr)
    raise typer.Exit(1)


def _quiet_libraries() -> None:
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


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
