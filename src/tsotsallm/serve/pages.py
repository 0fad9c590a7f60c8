"""The local page and its data: its files, and the models with their recipes and reports."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from tsotsallm.serve.answering import Refused, Service
from tsotsallm.serve.guard import Rules
from tsotsallm.version import __version__

KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
         ".mjs": "text/javascript; charset=utf-8", ".json": "application/json"}
EMBEDDED = "embedded"
"""The model of this package: the page offers questions about its world where it is served, whole or reduced."""
REPORT_POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
                 "sandbox allow-scripts")
"""A report brings its own styles and script; it can reach nothing else, not even this page."""


def page_files() -> dict[str, Traversable]:
    """Name -> file of the page; those in folders of it as `folder/name`."""
    def inside(folder: Traversable, start: str) -> Iterator[tuple[str, Traversable]]:
        for file in folder.iterdir():
            if file.is_dir():
                yield from inside(file, f"{start}{file.name}/")
            elif _ending(file.name) in KINDS:
                yield start + file.name, file

    return dict(inside(resources.files("tsotsallm.serve") / "page", ""))


def _ending(name: str) -> str:
    return "." + name.rpartition(".")[2]


def routes(service: Service, rules: Rules, studio: bool) -> APIRouter:
    """The routes of the page: its files, its state, and the reports of models; `studio` shows the studio's tab."""
    router = APIRouter(include_in_schema=False)
    files = page_files()

    @router.get("/")
    async def start() -> Response:
        return _file("page.html")

    @router.get("/page/state")
    async def state(request: Request) -> dict[str, object]:
        known = rules.knows({name.lower(): value for name, value in request.scope["headers"]})
        models = [{
            "name": served.name, "kind": served.kind, "bytes": served.bytes, "parameters": served.parameters,
            "context": served.speaker.context, "converses": served.speaker.converses,
            "original": service.models.original_of(served),
            "embedded": EMBEDDED in (served.name, served.path, served.original), "recipe": served.recipe,
            "report": served.report is not None,
        } for served in service.models.by_name.values()]
        return {"version": __version__, "needs_key": rules.key is not None, "key_ok": known, "studio": studio and known,
                "models": models if known else [],
                "limits": {"tokens": service.most_tokens, "timeout_s": service.models.timeout_s}}

    @router.get("/page/{name:path}")
    async def file(name: str) -> Response:
        if name not in files or name == "page.html":
            raise Refused(404, f"the page has no file {name!r}", "not_found")
        return _file(name)

    @router.get("/models/{name}/report")
    async def report(name: str) -> Response:
        served = service.model(name)
        if served.report is None:
            raise Refused(404, f"{name} has no report; `tsotsallm report` writes one", "not_found")
        return report_page(served.report.read_text("utf-8"))

    def _file(name: str) -> Response:
        return Response(files[name].read_bytes(), media_type=KINDS[_ending(name)])

    return router


def report_page(text: str) -> HTMLResponse:
    """A report as a response, with a policy that keeps it to itself."""
    return HTMLResponse(text, headers={"Content-Security-Policy": REPORT_POLICY})
