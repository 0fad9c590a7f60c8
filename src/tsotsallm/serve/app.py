"""The whole service: routes, limits, errors, and how it starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import socket
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from tsotsallm.errors import ServeError, TsotsallmError
from tsotsallm.files import JsonObject, one_line
from tsotsallm.serve import helm, openai, pages, studio
from tsotsallm.serve.answering import MOST_SHOWN, Gone, Refused, Service, failure
from tsotsallm.serve.guard import App, Guard, Message, Receive, Rules, Scope, Send, is_local
from tsotsallm.serve.jobs import Jobs
from tsotsallm.serve.metrics import Counting, Metrics
from tsotsallm.serve.served import Loading, Models
from tsotsallm.serve.wire import Health, Refusal
from tsotsallm.version import __version__

GRACE_S = 10
"""Seconds that running answers may still take when the service ends."""
BACKLOG = 256
FAULTS = {400: "The request is wrong, as the message says", 401: "The key is missing or wrong",
          403: "The request comes from another site's page", 404: "Not found", 405: "The method is not allowed",
          408: "No answer in time", 413: "The body is too large", 429: "Too many requests at a time",
          500: "The service failed; its log gives the reason under the id in the message"}


def create_app(models: Models, rules: Rules, *, most_tokens: int = 1024, jobs: Jobs | None = None,
               how: Loading | None = None) -> FastAPI:
    """An application that serves models; with `jobs` it also has the studio."""
    metrics = Metrics(models)
    service = Service(models, metrics, most_tokens)

    @contextlib.asynccontextmanager
    async def life(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.closing = True
        models.stop()
        if jobs is not None:
            await asyncio.to_thread(jobs.stop_all)

    app = FastAPI(title="tsotsallm", version=__version__, docs_url=None, redoc_url=None, lifespan=life,
                  responses={status: {"model": Refusal, "description": about} for status, about in FAULTS.items()})
    app.include_router(openai.routes(service))
    app.include_router(helm.routes(service))
    app.include_router(pages.routes(service, rules, jobs is not None))
    if jobs is not None:
        app.include_router(studio.routes(service, jobs, how, rules=rules))

    @app.get("/health")
    async def health() -> Health:
        """Whether the service is running, and which models it serves."""
        return Health(status="closing" if service.closing else "ok", models=list(models.by_name))

    @app.get("/metrics", response_class=PlainTextResponse)
    async def numbers() -> Response:
        """Metrics for Prometheus."""
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    _with_errors(app)
    _without_422(app)
    app.add_middleware(Unfailing)
    app.add_middleware(Guard, rules=rules)
    app.add_middleware(Counting, metrics=metrics)
    return app


def _with_errors(app: FastAPI) -> None:
    def answer(error: Refused) -> JSONResponse:
        return JSONResponse(error.plain(), error.status, headers=error.headers)

    @app.exception_handler(Refused)
    async def refused(_request: Request, error: Refused) -> Response:
        return answer(error)

    @app.exception_handler(TsotsallmError)
    async def wrong(_request: Request, error: TsotsallmError) -> Response:
        return answer(Refused(400, str(error), "not_possible", param=error.param))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        faults = error.errors()
        first = next((fault for fault in faults if fault["type"] == "refused"), faults[0])
        parts = [*map(str, first["loc"][1:]), *([first["ctx"]["param"]] if first["type"] == "refused" else [])]
        place = ".".join(itertools.takewhile(lambda part: re.fullmatch(r"\w{1,100}", part), parts))
        text = first["msg"].removeprefix("Value error, ")
        message = one_line(f"{place + ': ' if place and not text.startswith(place) else ''}{text}", MOST_SHOWN)
        return answer(Refused(400, message, "not_supported" if first["type"] == "refused" else "invalid_value",
                              param=place or None))

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> Response:
        return answer(Refused(error.status_code, str(error.detail), "not_found" if error.status_code == 404 else
                              "bad_request", headers=dict(error.headers or {})))

    @app.exception_handler(Gone)
    async def gone(_request: Request, _error: Gone) -> Response:
        return Response(status_code=499)        # nobody reads it, but the metrics count it


class Unfailing:
    """Answers unexpected exceptions with 500 in OpenAI's form; an answer that has begun breaks off."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = scope["type"] != "http"

        async def answer(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, answer)
        except Exception as error:
            if scope["type"] != "http":
                raise
            refused = failure(error)
            if not begun:
                await JSONResponse(refused.plain(), refused.status)(scope, receive, send)


def _without_422(app: FastAPI) -> None:
    """Drop 422 from the API's description: invalid requests are answered with 400, as OpenAI does."""
    made = app.openapi

    def openapi() -> JsonObject:
        content = made()
        for path in content["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return content

    app.openapi = openapi       # type: ignore[method-assign]


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes a free one. Raises ServeError where the port cannot be taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
        opened.listen(BACKLOG)          # requests that arrive before the models are loaded wait
    except (OSError, OverflowError) as error:
        opened.close()
        raise ServeError(f"cannot listen at {host}, port {port} ({getattr(error, 'strerror', None) or error}); choose "
                         "another with --port, or --port 0 for a free one") from None
    return opened


def check_rules(host: str, key: str | None) -> Rules:
    """Rules for an address; raises ServeError where other computers can reach it and no key is set, or the key is weak."""
    if not is_local(host) and not key:
        raise ServeError(f"{host} can be reached from other computers; give a key that they must know, with --api-key KEY "
                         "or in TSOTSALLM_API_KEY, or leave out --host")
    if key is not None and (not key.isascii() or not key.isprintable() or " " in key or len(key) < 8):
        raise ServeError("the key must have 8 or more characters, plain ASCII without spaces; `openssl rand -hex 16` makes "
                         "one")
    return Rules(key=key, any_host=not is_local(host))


def run(app: FastAPI, place: socket.socket, say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or a signal to end; running answers have ten more seconds."""
    import uvicorn

    host, port = place.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S, http="h11",
                            ws="none", server_header=False)
    say(f"open http://{shown}:{port}/ in a browser; Ctrl-C ends the service")
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[place])
