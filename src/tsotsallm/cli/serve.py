"""tsotsallm serve: models over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from tsotsallm.cli.common import Context, Country, Kv, ServingThreads, answers

Port = Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")]
Slots = Annotated[int, typer.Option(help="Number of answers that a GGUF file writes at the same time.", min=1, max=64)]
MaxTokens = Annotated[int, typer.Option(help="Write at most this number of new tokens per answer.", min=1)]


def serve(models: Annotated[list[str], typer.Argument(help="Models to serve: GGUF files, checkpoint directories, hub ids or "
                                                           "'embedded'; NAME=PATH gives a name.")],
          port: Port = 8080,
          host: Annotated[str, typer.Option(help="Address to listen at; one that other computers reach needs --api-key.")] =
          "127.0.0.1",
          api_key: Annotated[str | None, typer.Option(help="Key that requests must contain.",
                                                      envvar="TSOTSALLM_API_KEY")] = None,
          slots: Slots = 4,
          queue: Annotated[int, typer.Option(help="Number of requests that may wait; more are refused with status 429.",
                                             min=0)] = 16,
          max_tokens: MaxTokens = 1024,
          timeout: Annotated[float, typer.Option(help="Seconds that a request may take.", min=1)] = 300.0,
          max_body: Annotated[str, typer.Option(help="Largest size of a request in bytes, such as 1MB.")] = "1MB",
          kv: Kv = "f16", context: Context = None,
          prompt_cache: Annotated[bool, typer.Option(help="Keep what was read for the next prompt that begins alike; "
                                                          "without it, and in one slot, the same seed gives the same "
                                                          "text.")] = True,
          country: Country = None, threads: ServingThreads = None) -> None:
    """Serve models over HTTP, with OpenAI's API and a chat page.

    /process and /tokenize are served as well.
    """
    with answers():
        from tsotsallm.api.serve import serve

        serve(models, port=port, host=host, key=api_key, slots=slots, queue=queue, max_tokens=max_tokens, timeout_s=timeout,
              max_body=max_body, kv=kv, context=context, prompt_cache=prompt_cache, country=country)
