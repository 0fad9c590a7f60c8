"""The studio's routes: choose a model and a goal, see the plan, start, watch and stop a job, and talk to the result."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

from tsotsallm.errors import TsotsallmError
from tsotsallm.serve.answering import Refused, Service
from tsotsallm.serve.guard import Rules
from tsotsallm.serve.jobs import Jobs, StudioJob
from tsotsallm.serve.pages import report_page
from tsotsallm.serve.served import Loading, Served, load, name_of
from tsotsallm.serve.wishes import Maker, Wish


def routes(service: Service, jobs: Jobs, how: Loading | None = None, *, rules: Rules) -> APIRouter:
    """The studio's routes; `how` says how finished models are loaded to be served, and `rules` sign links to their files."""
    router = APIRouter(prefix="/studio", include_in_schema=False)
    maker, loads = Maker(jobs), asyncio.Lock()

    @router.get("/choices")
    async def choices() -> dict[str, object]:
        return await asyncio.to_thread(maker.choices)

    @router.post("/plan")
    async def see(wish: Wish) -> dict[str, object]:
        return await asyncio.to_thread(maker.plan, wish)

    @router.post("/jobs", status_code=201)
    async def start(wish: Wish) -> dict[str, object]:
        return {"id": (await asyncio.to_thread(maker.start, wish)).id}

    @router.get("/jobs")
    async def all_jobs() -> dict[str, object]:
        return {"jobs": [job.plain() for job in reversed(list(jobs.jobs.values()))]}

    @router.get("/jobs/{key}")
    async def one_job(key: str) -> dict[str, object]:
        return _job(jobs, key).plain()

    @router.post("/jobs/{key}/stop")
    async def stop(key: str) -> dict[str, object]:
        job = _job(jobs, key)
        await asyncio.to_thread(jobs.stop, job)
        return job.plain()

    @router.post("/jobs/{key}/resume")
    async def resume(key: str) -> dict[str, object]:
        job = _job(jobs, key)
        await asyncio.to_thread(jobs.resume, job)
        return job.plain()

    @router.get("/jobs/{key}/report")
    async def report(key: str) -> Response:
        job = _job(jobs, key)
        path = Path(job.out) / "report.html"
        if job.state != "done" or not path.is_file():
            raise Refused(404, f"job {key} has no report", "not_found")
        return report_page(path.read_text("utf-8"))

    @router.get("/jobs/{key}/file")
    async def file(key: str) -> Response:
        job = _job(jobs, key)
        if job.file is None:
            raise Refused(404, f"job {key} has no GGUF file", "not_found")
        return FileResponse(job.file, filename=f"{Path(job.out).name}.gguf", media_type="application/octet-stream")

    @router.post("/jobs/{key}/link")
    async def link(key: str) -> dict[str, object]:
        """A link to the file that a browser follows by itself, so that it goes to the disk and not through the page."""
        if _job(jobs, key).file is None:
            raise Refused(404, f"job {key} has no GGUF file", "not_found")
        return {"href": rules.link(f"/studio/jobs/{key}/file")}

    @router.post("/jobs/{key}/serve")
    async def serve(key: str) -> dict[str, object]:
        """Serve a result, and beside it the model that it was made from, where that is in the folder and memory holds both.

        `why` is the error where the original could not be loaded.
        """
        job = _job(jobs, key)
        if job.state != "done":
            raise Refused(400, f"job {key} is {job.state}; its model can be served once it is done", "not_done")
        models = service.models

        async def loaded(path: str, name: str) -> Served:
            return models.add(await asyncio.to_thread(load, path, models.free_name(name), how or Loading()))

        async with loads:
            if job.served is None or job.served not in models.by_name:
                job.served = (await loaded(str(job.file or job.out), Path(job.out).name)).name
            result, why = models.by_name[job.served], None
            original = next((one for one in models.by_name.values() if one.path == job.source), None)
            try:
                if original is None and maker.is_here(job.source):
                    original = await loaded(job.source, name_of(job.source))
            except TsotsallmError as error:
                why = str(error)
            if original is not None:
                result.original = original.path
        return {"model": job.served, "original": original and original.name, "why": why}

    @router.post("/texts", status_code=201)
    async def add_text(request: Request, kind: Literal["txt", "jsonl"] = "txt") -> dict[str, object]:
        """Keep a text, or conversations as lines of JSON, for calibration or as a language to keep."""
        content = await request.body()
        return await asyncio.to_thread(maker.add_text, content, kind)

    return router


def _job(jobs: Jobs, key: str) -> StudioJob:
    job = jobs.get(key)
    if job is None:
        raise Refused(404, f"there is no job {key!r}", "not_found")
    return job
