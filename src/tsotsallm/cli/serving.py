"""Commands: serve, studio, bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tsotsallm.cli.common import AsJson, Country, Kv, ServingThreads, answers, print_json, to_stderr

app = typer.Typer(rich_markup_mode=None)
ApiKey = Annotated[str | None, typer.Option(help="Key that requests must bring.", envvar="TSOTSALLM_API_KEY")]
Slots = Annotated[int, typer.Option(help="Answers at a time of a GGUF file.", min=1, max=64)]
Queue = Annotated[int, typer.Option(help="Questions that may wait; more are turned away (429).", min=0)]
MaxTokens = Annotated[int, typer.Option(help="New tokens of an answer at most.", min=1)]
Timeout = Annotated[float, typer.Option(help="Seconds that a request may take.", min=1)]
MaxBody = Annotated[str, typer.Option(help="Bytes of a request at most.")]
PromptCache = Annotated[bool, typer.Option(help="Whether what was read serves the next question that begins alike; off, the "
                                                "same seed gives the same text in one slot.")]


@app.command()
def serve(models: Annotated[list[str], typer.Argument(help="GGUF files, checkpoints, hub ids or 'embedded'; NAME=PATH names "
                                                           "one.")],
          port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.")] = 8080,
          host: Annotated[str, typer.Option(help="Address to listen at; others than this computer's need --api-key.")] =
          "127.0.0.1",
          api_key: ApiKey = None, slots: Slots = 4, queue: Queue = 16, max_tokens: MaxTokens = 1024,
          timeout: Timeout = 300.0, max_body: MaxBody = "1MB", kv: Kv = "f16", prompt_cache: PromptCache = True,
          country: Country = None, threads: ServingThreads = None) -> None:
    """Serve models over HTTP: OpenAI's API, and a page to talk on.

    As well as /process and /tokenize.
    """
    with answers():
        from tsotsallm.api import serving

        serving.serve(models, port=port, host=host, key=api_key, slots=slots, queue=queue, max_tokens=max_tokens,
                      timeout_s=timeout, max_body=max_body, kv=kv, prompt_cache=prompt_cache, country=country)


@app.command()
def studio(folder: Annotated[Path, typer.Option(help="Folder with models, and for those that are made.")] = Path("."),
           models: Annotated[list[str] | None, typer.Argument(help="Models to talk to from the start.")] = None,
           port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.")] = 8080,
           slots: Slots = 4, max_tokens: MaxTokens = 1024, country: Country = None, threads: ServingThreads = None) -> None:
    """Make models on a page in the browser.

    Choose, see the plan, start, watch, stop, open the report, talk.
    """
    with answers():
        from tsotsallm.api import serving

        serving.serve(models or [], port=port, slots=slots, max_tokens=max_tokens, country=country, studio=folder)


class _Bundles(TyperGroup):
    """`tsotsallm bundle MODEL` makes a bundle; verify looks at one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args and (args[0] in self.commands or args[0] == "--help")
        return super().resolve_command(ctx, args if known else ["make", *args])


bundles = typer.Typer(cls=_Bundles, rich_markup_mode=None,
                      help="All that runs a model offline. `tsotsallm bundle MODEL -o FOLDER` writes it; verify checks it.")


app.add_typer(bundles, name="bundle")


@bundles.command("make")
def bundle_make(models: Annotated[list[str], typer.Argument(help="GGUF files, folders of `fit`, or checkpoints.")],
                out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must not exist.")],
                platform: Annotated[str | None, typer.Option(help="Such as linux-x86_64, linux-aarch64, windows-x86_64, "
                                                                  "macos-arm64 (default: as here).")] = None,
                python: Annotated[str | None, typer.Option(help="Version of Python there, such as 3.12.")] = None,
                index: Annotated[str | None, typer.Option(help="A further package index, such as torch's for CPUs.")] = None,
                as_json: AsJson = False) -> None:
    """Write wheels, models, page and scripts into a folder.

    With checksums; for a USB stick.
    """
    with answers(as_json):
        from tsotsallm.api import serving
        from tsotsallm.units import human_bytes

        found = serving.make_bundle(models, out, platform=platform, python=python, index=index,
                                    say=to_stderr if as_json else print)
        print_json(asdict(found)) if as_json else print(
            f"{found.path}: {len(found.models)} model{'s' * (len(found.models) > 1)}, {found.wheels} wheels, "
            f"{human_bytes(found.bytes)}")


@bundles.command("verify")
def bundle_verify(folder: Annotated[Path, typer.Argument(help="A bundle.")]) -> None:
    """Check every file against its checksum."""
    with answers():
        from tsotsallm.api import serving

        print(f"{serving.verify_bundle(folder)} files are as they were written")
