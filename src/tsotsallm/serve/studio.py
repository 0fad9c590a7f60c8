"""The studio's routes: choose a model and a goal, see the plan, start, watch, stop, and talk to what came out.

No path ever comes from a request: models are chosen from a list that is made here, and recipes of the studio name no files.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import Field

from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.compression import plan
from tsotsallm.errors import RecipeError, ServeError, TsotsallmError
from tsotsallm.evaluation.cost import devices
from tsotsallm.inspection import inspect_checkpoint
from tsotsallm.recipe import Recipe, packaged_recipes
from tsotsallm.serve.answering import Refused, Service
from tsotsallm.serve.jobs import Job, Jobs
from tsotsallm.serve.pages import report_page
from tsotsallm.serve.served import Loading, load
from tsotsallm.serve.wire import Asked, Text
from tsotsallm.study.fit import Target, target_of
from tsotsallm.units import bytes_from_text, human_bytes, human_seconds

DEEP = 2
"""Folders below the chosen one in which models are looked for."""
CALIBRATION = (32, 512)
"""Windows of calibration text, and tokens of each, as `fit` has them by default."""


class Wish(Asked):
    """What is wanted of a model: that it fits a device or some bytes, or a recipe."""

    model: Text = Field(max_length=1000)
    device: Text | None = Field(None, max_length=100)
    bytes: Text | None = Field(None, max_length=40)
    recipe: Text | None = Field(None, max_length=20_000)
    minutes: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] = 30.0
    quick: bool = True


class Fact(Asked):
    key: Literal["weights", "result", "target", "memory", "disk", "time", "parameters"]
    value: str


def routes(service: Service, jobs: Jobs, how: Loading | None = None) -> APIRouter:
    router = APIRouter(prefix="/studio", include_in_schema=False)
    maker = _Maker(jobs)

    @router.get("/choices")
    async def choices() -> dict[str, Any]:
        return await asyncio.to_thread(maker.choices)

    @router.post("/plan")
    async def see(wish: Wish) -> dict[str, Any]:
        return await asyncio.to_thread(maker.plan, wish)

    @router.post("/jobs", status_code=201)
    async def start(wish: Wish) -> dict[str, Any]:
        return {"id": (await asyncio.to_thread(maker.start, wish)).id}

    @router.get("/jobs")
    async def all_jobs() -> dict[str, Any]:
        return {"jobs": [job.plain() for job in reversed(list(jobs.jobs.values()))]}

    @router.get("/jobs/{key}")
    async def one_job(key: str) -> dict[str, Any]:
        return _job(jobs, key).plain()

    @router.post("/jobs/{key}/stop")
    async def stop(key: str) -> dict[str, Any]:
        job = _job(jobs, key)
        await asyncio.to_thread(jobs.stop, job)
        return job.plain()

    @router.post("/jobs/{key}/resume")
    async def resume(key: str) -> dict[str, Any]:
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

    @router.post("/jobs/{key}/serve")
    async def serve(key: str) -> dict[str, Any]:
        job = _job(jobs, key)
        if job.state != "done":
            raise Refused(400, f"job {key} is {job.state}; there is nothing to talk to yet", "not_done")
        if job.served is None or job.served not in service.models.by_name:
            fitted = Path(job.out) / "model.gguf"
            path = str(fitted if fitted.exists() else job.out)
            loading = how or Loading()
            found = await asyncio.to_thread(load, path, service.models.free_name(Path(job.out).name), loading)
            job.served = service.models.add(found).name
        return {"model": job.served}

    return router


def _job(jobs: Jobs, key: str) -> Job:
    found = jobs.get(key)
    if found is None:
        raise Refused(404, f"there is no job {key!r}", "not_found")
    return found


class _Maker:
    """Plans and jobs for the models of a folder."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.folder = jobs, jobs.folder

    def models(self) -> dict[str, str]:
        """Id -> path of the embedded model and of the checkpoints in the folder."""
        found = {EMBEDDED: EMBEDDED}
        for depth in range(1, DEEP + 1):
            for config in sorted(self.folder.glob("*/" * depth + "config.json")):
                where = config.parent
                if any(where.glob("*.safetensors")) and not any(part.endswith(".partial") for part in where.parts) and (
                        where.resolve().is_relative_to(self.folder.resolve())):
                    found[where.relative_to(self.folder).as_posix()] = str(where)
        return found

    def choices(self) -> dict[str, Any]:
        models = []
        for key, path in self.models().items():
            try:
                anatomy = inspect_checkpoint(Checkpoint.open(path))
            except TsotsallmError:      # not a model that this package reads
                continue
            models.append({"id": key, "label": key, "bytes": anatomy.bytes, "parameters": anatomy.parameters,
                           "layers": anatomy.layers})
        return {"folder": str(self.folder), "models": models,
                "devices": [{"name": name, "about": facts["about"], "bytes": facts["weight_bytes"]}
                            for name, facts in devices().items()],
                "recipes": [{"name": name, "text": file.read_text("utf-8")} for name, file in packaged_recipes().items()]}

    def plan(self, wish: Wish) -> dict[str, Any]:
        """What a wish will take, and the command that does the same."""
        path, target, recipe = self._read(wish)
        checkpoint = Checkpoint.open(path)
        stages: Any = recipe.plain() if recipe is not None else [{"quantize": {"file_bytes": target.bytes if target else 0}}]
        try:
            found = plan(path, stages, self._out(wish), windows=CALIBRATION[0],
                         window=min(CALIBRATION[1], checkpoint.spec.context))
        except RecipeError as error:
            if target is None:
                raise
            sizes = [("weights", human_bytes(checkpoint.weight_bytes)), ("target", human_bytes(target.bytes))]
            return {"facts": _facts(sizes),
                    "warnings": [f"Bits alone do not make it that small ({error}); layers or neurons must go as well."],
                    "command": self._command(wish)}
        kind, size = ("result", found.result_bytes) if target is None else ("target", target.bytes)
        facts = [("weights", human_bytes(found.bytes)), ("parameters", f"{found.parameters:,}"),
                 (kind, human_bytes(size)),
                 ("memory", f"{human_bytes(found.ram_bytes)} / {human_bytes(found.free_ram_bytes)}"),
                 ("disk", f"{human_bytes(found.disk_bytes)} / {human_bytes(found.free_disk_bytes)}"),
                 ("time", f"≥ {human_seconds(found.floor_s)}" + ("" if target is None else f", ≤ {wish.minutes:g} min"))]
        return {"facts": _facts(facts), "warnings": list(found.warnings), "command": self._command(wish)}

    def start(self, wish: Wish) -> Job:
        self._read(wish)
        out = self._out(wish)
        goal = wish.device or wish.bytes or "recipe"
        return self.jobs.add(f"{wish.model}: {goal}", [*self._arguments(wish, out), "--json"], out)

    def _read(self, wish: Wish) -> tuple[str, Target | None, Recipe | None]:
        """The path of a wish's model, and its goal; refused when wrong."""
        path = self.models().get(wish.model)
        if path is None:
            raise Refused(404, f"there is no model {wish.model!r} in {self.folder}", "model_not_found", param="model")
        if sum(one is not None for one in (wish.device, wish.bytes, wish.recipe)) != 1:
            raise ServeError("give one goal: a device, a size, or a recipe")
        checkpoint = Checkpoint.open(path)
        if wish.recipe is not None:
            recipe = inline_recipe(wish.recipe)
            recipe.check(checkpoint.spec)
            return path, None, recipe
        size = None if wish.bytes is None else bytes_from_text(wish.bytes, "the size", ServeError)
        return path, target_of(checkpoint.spec.kv_bytes_per_token(), device=wish.device, size=size, faster_than=None), None

    def _arguments(self, wish: Wish, out: Path) -> list[str]:
        path = self.models()[wish.model]
        window = str(min(CALIBRATION[1], Checkpoint.open(path).spec.context))
        if wish.recipe is not None:
            text = wish.recipe.strip()
            recipe = text if text in packaged_recipes() else json.dumps(inline_recipe(text).plain(), ensure_ascii=False)
            return ["compress", path, recipe, "-o", str(out), "--windows", str(CALIBRATION[0]), "--window", window]
        goal = ["--device", wish.device] if wish.device is not None else ["--bytes", str(wish.bytes)]
        return ["fit", path, *goal, "-o", str(out), "--window", window, "--minutes", f"{wish.minutes:g}",
                *(["--quick"] if wish.quick else [])]

    def _command(self, wish: Wish) -> str:
        return Job("", "", self._arguments(wish, self._out(wish)), "").command

    def _out(self, wish: Wish) -> Path:
        """A free name in the folder for what a wish makes."""
        goal = wish.device or wish.bytes or "recipe"
        name = re.sub(r"[^\w.-]+", "-", f"{wish.model}-{goal}").strip("-.")
        taken = {Path(job.out).name for job in self.jobs.jobs.values()}
        names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 1000))]
        return next(self.folder / one for one in names
                    if one not in taken and not any((self.folder / (one + end)).exists() for end in ("", ".partial")))


def inline_recipe(text: str) -> Recipe:
    """A recipe of the studio: a packaged name, one line, or YAML; it names no file."""
    text = text.strip()
    if text in packaged_recipes():
        return Recipe.parse(text)
    if "\n" not in text and re.fullmatch(r"[\w./\\~-]+\.(ya?ml|txt|json)|[./\\~].*", text):
        raise RecipeError("the studio's recipes are packaged names, lines such as 'depth:2, gptq:4', or YAML, not files")
    recipe = Recipe.parse_text(text)
    _refuse_paths(recipe.plain())
    return recipe


def _refuse_paths(value: Any) -> None:
    if isinstance(value, str) and (re.search(r"[/\\]|\.\w+$", value) or Path(value).exists()):
        raise RecipeError(f"the recipe names the file or data set {value!r}, which the studio does not read; use the "
                          "command line for it")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            _refuse_paths(one)


def _facts(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"key": key, "value": value} for key, value in pairs]
