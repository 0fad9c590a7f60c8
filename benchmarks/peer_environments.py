"""An environment of its own for each Python package that TSOTSALLM is compared with, with pinned versions."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measured

TORCH = "torch==2.13.0"
"""Installed first and by itself: a looser request of another package would bring a build for GPUs of several gigabytes."""


@dataclass(frozen=True)
class Environment:
    """What is installed, torch first.

    decodes  the package computes with its own packed weights on a CPU
    prepare  code that compiles what the package would compile at its first use, so that no run is timed with it
    """

    name: str
    requirements: tuple[str, ...]
    decodes: bool = True
    torch: str = TORCH
    prepare: str = ""


ENVIRONMENTS = {one.name: one for one in (
    Environment("llm-compressor", ("llmcompressor==0.14.0.1",), decodes=False),
    # its version needs a newer torch, of which there may be no build without GPU
    Environment("gptqmodel", ("gptqmodel==7.7.0",), torch="torch==2.14.1",
                prepare="from gptqmodel import extension; extension.load('pack_block_cpu')"),
    Environment("auto-round", ("auto-round==0.16.1",)),
    Environment("torchao", ("torchao==0.18.0", "transformers==5.17.0", "accelerate==1.15.0")),
    Environment("quanto", ("optimum-quanto==0.2.7", "transformers==5.17.0", "accelerate==1.15.0")))}


def environment_python(folder: Path, environment: Environment) -> Path:
    """The interpreter of an environment, which is built where it is not complete; FOLDER/NAME.txt lists what is in it.

    Raises CommandError where a package cannot be installed.
    """
    place, listed = folder.absolute() / environment.name, folder.absolute() / f"{environment.name}.txt"
    python = place / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    wanted = "\n".join(("# " + " ".join((environment.torch, *environment.requirements)), ""))
    if listed.exists() and listed.read_text("utf-8").startswith(wanted):
        return python
    print(f"installing {environment.name} ...", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.absolute() / f"{environment.name}.log"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        measured.run([sys.executable, "-m", "venv", place], log=log)
        measured.run([*install, environment.torch, "numpy"], log=log)
        measured.run([*install, environment.torch, *environment.requirements], log=log)
        if environment.prepare:
            measured.run([python, "-c", environment.prepare], log=log)
        versions = measured.run([python, "-m", "pip", "freeze"], log=log).output
    except measured.CommandError as error:
        raise measured.CommandError(f"cannot be installed: {error}") from None
    listed.write_text(wanted + versions, "utf-8")
    return python
