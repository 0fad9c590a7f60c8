"""tsotsallm push: results on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import AsJson, answers, print_json
from tsotsallm.files import JsonObject


def push(result: Annotated[Path, typer.Argument(help="Result to upload: its directory, or a GGUF file.")],
         repository: Annotated[str, typer.Argument(help="Repository on the hub, as NAME/MODEL.")],
         upload: Annotated[bool, typer.Option("--upload", help="Really upload (default: only list what would be "
                                                               "uploaded).")] = False,
         public: Annotated[bool, typer.Option(help="Make a new repository public.")] = False,
         as_json: AsJson = False) -> None:
    """Upload a result and its model card to the hub.

    Without --upload nothing is sent.
    """
    with answers(as_json):
        from tsotsallm.api.push import push

        sent = push(result, repository, upload=upload, public=public)
        print_json(sent) if as_json else print_push(sent)


def print_push(sent: JsonObject) -> None:
    """Print what was, or would be, uploaded."""
    from tsotsallm.units import human_bytes

    for name, size in sent["files"].items():
        print(f"{human_bytes(size):>10}  {name}")
    where = f"{sent['repository']} ({'public' if sent['public'] else 'private'})"
    print(f"uploaded to {where}" if sent["uploaded"] else f"nothing was sent; with --upload this goes to {where}")
