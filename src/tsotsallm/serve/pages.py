"""The local page and what it is told: its files, the models with their recipes and reports."""

from __future__ import annotations

from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from tsotsallm.serve.answering import Refused, Service
from tsotsallm.serve.guard import Rules
from tsotsallm.version import __version__

KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".json": "application/json"}
REPORT_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
                 "sandbox allow-scripts")
"""A report brings its own styles and script; it reaches nothing else, nor this page."""


def page_files() -> dict[str, Any]:
    """Name -> file of the page."""
    found = resources.files("tsotsallm.serve") / "page"
    return {one.name: one for one in found.iterdir() if "." + one.name.rpartition(".")[2] in KINDS}


def routes(service: Service, rules: Rules, studio: bool) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    files = page_files()

    @router.get("/")
    async def start() -> Response:
        return _file("page.html")

    @router.get("/page/state")
    async def state(request: Request) -> dict[str, Any]:
        known = rules.knows({name.lower(): value for name, value in request.scope["headers"]})
        told: dict[str, Any] = {"version": __version__, "needs_key": rules.key is not None, "key_ok": known,
                                "studio": studio and known, "models": [],
                                "limits": {"tokens": service.most_tokens, "timeout_s": service.models.timeout_s}}
        if known:
            told["models"] = [{
                "name": one.name, "kind": one.kind, "bytes": one.bytes, "parameters": one.parameters,
                "context": one.speaker.context, "converses": one.speaker.converses,
                "original": service.models.original_of(one), "recipe": one.recipe, "report": one.report is not None,
            } for one in service.models.by_name.values()]
        return told

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in files or name == "page.html":
            raise Refused(404, f"the page has no file {name!r}", "not_found")
        return _file(name)

    @router.get("/models/{name}/report")
    async def report(name: str) -> Response:
        one = service.model(name)
        if one.report is None:
            raise Refused(404, f"{name} has no report; `tsotsallm report` writes one", "not_found")
        return report_page(one.report.read_text("utf-8"))

    def _file(name: str) -> Response:
        return Response(files[name].read_bytes(), media_type=KINDS["." + name.rpartition(".")[2]])

    return router


def report_page(text: str) -> HTMLResponse:
    return HTMLResponse(text, headers={"Content-Security-Policy": REPORT_POLICY})
