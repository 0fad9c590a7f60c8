"""tsotsallm bundle: a folder for a USB stick with everything that runs models offline."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import AsJson, Verbs, answers, print_json, to_stderr


class _Bundles(Verbs):
    """`tsotsallm bundle MODEL` makes a bundle; verify checks one."""

    default = "make"


app = typer.Typer(name="bundle", cls=_Bundles, rich_markup_mode=None,
                  help="Pack what runs a model offline into a folder. `tsotsallm bundle MODEL -o FOLDER` writes it; "
                       "`verify` checks it.")


@app.command("make")
def make(models: Annotated[list[str], typer.Argument(help="Models to pack: GGUF files, folders that `fit` wrote, or "
                                                          "checkpoints.")],
         out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must not exist.")],
         platform: Annotated[str | None, typer.Option(help="Platform of the other computer: linux-x86_64, linux-aarch64, "
                                                           "windows-x86_64 or macos-arm64 (default: this one's).")] = None,
         python: Annotated[str | None, typer.Option(help="Version of Python on the other computer, such as 3.12.")] = None,
         index: Annotated[str | None, typer.Option(help="Address of a further package index, such as torch's for CPUs.")] =
         None,
         as_json: AsJson = False) -> None:
    """Write wheels, models, the page and scripts into a folder.

    With checksums; for a USB stick.
    """
    with answers(as_json):
        from tsotsallm.api.bundle import make_bundle
        from tsotsallm.units import human_bytes

        made = make_bundle(models, out, platform=platform, python=python, index=index, say=to_stderr if as_json else print)
        print_json(asdict(made)) if as_json else print(
            f"{made.path}: {len(made.models)} model{'s' * (len(made.models) > 1)}, {made.wheels} wheels, "
            f"{human_bytes(made.bytes)}")


@app.command("verify")
def verify(folder: Annotated[Path, typer.Argument(help="Folder of a bundle.")]) -> None:
    """Check every file against its checksum."""
    with answers():
        from tsotsallm.api.bundle import verify_bundle

        print(f"{verify_bundle(folder)} files are as they were written")
