"""The studio's routes: choose a model and a goal, see the plan, start, watch and stop a job, and talk to the result.

No path ever comes from a request: models are chosen from a list that is made here, and the studio's recipes name no files.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import Field

from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.compression import plan
from tsotsallm.errors import RecipeError, ServeError, TsotsallmError
from tsotsallm.evaluation.cost import devices
from tsotsallm.fit.target import Target, target_of
from tsotsallm.inspection import inspect_checkpoint
from tsotsallm.recipe import Recipe, packaged_recipes
from tsotsallm.serve.answering import Refused, Service
from tsotsallm.serve.jobs import Jobs, StudioJob
from tsotsallm.serve.pages import report_page
from tsotsallm.serve.served import Loading, load
from tsotsallm.serve.wire import RequestBody, Text
from tsotsallm.units import bytes_from_text, human_bytes, human_seconds

DEEP = 2
"""Levels of folders below the chosen one that are searched for models."""
CALIBRATION = (32, 512)
"""Windows of calibration text and tokens per window, as in `fit` by default."""


class Wish(RequestBody):
    """What a model should become: one that fits a device or a size, or the result of a recipe."""

    model: Text = Field(max_length=1000)
    device: Text | None = Field(None, max_length=100)
    bytes: Text | None = Field(None, max_length=40)
    recipe: Text | None = Field(None, max_length=20_000)
    minutes: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] = 30.0
    quick: bool = True



def routes(service: Service, jobs: Jobs, how: Loading | None = None) -> APIRouter:
    """The studio's routes; `how` says how finished models are loaded to be served."""
    router = APIRouter(prefix="/studio", include_in_schema=False)
    maker = _Maker(jobs)

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

    @router.post("/jobs/{key}/serve")
    async def serve(key: str) -> dict[str, object]:
        job = _job(jobs, key)
        if job.state != "done":
            raise Refused(400, f"job {key} is {job.state}; its model can be served once it is done", "not_done")
        if job.served is None or job.served not in service.models.by_name:
            fitted = Path(job.out) / "model.gguf"
            path = str(fitted if fitted.exists() else job.out)
            loading = how or Loading()
            served = await asyncio.to_thread(load, path, service.models.free_name(Path(job.out).name), loading)
            job.served = service.models.add(served).name
        return {"model": job.served}

    return router


def _job(jobs: Jobs, key: str) -> StudioJob:
    job = jobs.get(key)
    if job is None:
        raise Refused(404, f"there is no job {key!r}", "not_found")
    return job


class _Maker:
    """Plans and jobs for the models of a folder."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.folder = jobs, jobs.folder

    def models(self) -> dict[str, str]:
        """Id -> path of the embedded model and of the checkpoints in the folder."""
        models = {EMBEDDED: EMBEDDED}
        for depth in range(1, DEEP + 1):
            for config in sorted(self.folder.glob("*/" * depth + "config.json")):
                where = config.parent
                if any(where.glob("*.safetensors")) and not any(part.endswith(".partial") for part in where.parts) and (
                        where.resolve().is_relative_to(self.folder.resolve())):
                    models[where.relative_to(self.folder).as_posix()] = str(where)
        return models

    def choices(self) -> dict[str, object]:
        """The models, devices and packaged recipes to choose from."""
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

    def plan(self, wish: Wish) -> dict[str, object]:
        """What a wish will take, and the command line that does the same."""
        path, target, recipe = self._read(wish)
        checkpoint = Checkpoint.open(path)
        stages = recipe.plain() if recipe is not None else [{"quantize": {"file_bytes": target.bytes if target else 0}}]
        try:
            planned = plan(path, stages, self._out(wish), windows=CALIBRATION[0],
                           window=min(CALIBRATION[1], checkpoint.spec.context))
        except RecipeError as error:
            if target is None:
                raise
            sizes = [("weights", human_bytes(checkpoint.weight_bytes)), ("target", human_bytes(target.bytes))]
            return {"facts": _facts(sizes),
                    "warnings": [f"Fewer bits alone do not make it that small ({error}); layers or neurons must be removed "
                                 "as well."],
                    "command": self._command(wish)}
        kind, size = ("result", planned.result_bytes) if target is None else ("target", target.bytes)
        facts = [("weights", human_bytes(planned.bytes)), ("parameters", f"{planned.parameters:,}"),
                 (kind, human_bytes(size)),
                 ("memory", f"{human_bytes(planned.ram_bytes)} / {human_bytes(planned.free_ram_bytes)}"),
                 ("disk", f"{human_bytes(planned.disk_bytes)} / {human_bytes(planned.free_disk_bytes)}"),
                 ("time", f"≥ {human_seconds(planned.floor_s)}" + ("" if target is None else f", ≤ {wish.minutes:g} min"))]
        return {"facts": _facts(facts), "warnings": list(planned.warnings), "command": self._command(wish)}

    def start(self, wish: Wish) -> StudioJob:
        """Check a wish and add its job."""
        self._read(wish)
        out = self._out(wish)
        goal = wish.device or wish.bytes or "recipe"
        return self.jobs.add(f"{wish.model}: {goal}", [*self._arguments(wish, out), "--json"], out)

    def _read(self, wish: Wish) -> tuple[str, Target | None, Recipe | None]:
        """The path of a wish's model and its goal; raises Refused or TsotsallmError where the wish is wrong."""
        path = self.models().get(wish.model)
        if path is None:
            raise Refused(404, f"there is no model {wish.model!r} in {self.folder}", "model_not_found", param="model")
        goals = sum(goal is not None for goal in (wish.device, wish.bytes, wish.recipe))
        if goals != 1:
            raise ServeError(f"{goals} goals are given; give exactly one: a device, a size, or a recipe")
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
        return StudioJob("", "", self._arguments(wish, self._out(wish)), "").command

    def _out(self, wish: Wish) -> Path:
        """A free name in the folder for the result of a wish."""
        goal = wish.device or wish.bytes or "recipe"
        name = re.sub(r"[^\w.-]+", "-", f"{wish.model}-{goal}").strip("-.")
        taken = {Path(job.out).name for job in self.jobs.jobs.values()}
        names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 1000))]
        return next(self.folder / free for free in names
                    if free not in taken and not any((self.folder / (free + end)).exists() for end in ("", ".partial")))


def inline_recipe(text: str) -> Recipe:
    """A recipe given in the studio: a packaged name, one line, or YAML; raises RecipeError where it names a file."""
    text = text.strip()
    if text in packaged_recipes():
        return Recipe.parse(text)
    if "\n" not in text and re.fullmatch(r"[\w./\\~-]+\.(ya?ml|txt|json)|[./\\~].*", text):
        raise RecipeError(f"{text!r} is the name of a file; the studio takes packaged names, lines such as "
                          "'depth:2, gptq:4', or YAML")
    recipe = Recipe.parse_text(text)
    _refuse_paths(recipe.plain())
    return recipe


def _refuse_paths(value: object) -> None:
    if isinstance(value, str) and (re.search(r"[/\\]|\.\w+$", value) or Path(value).exists()):
        raise RecipeError(f"the recipe names the file or data set {value!r}, which the studio does not read; use the "
                          "command line instead")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            _refuse_paths(part)


def _facts(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Lines of a plan, as plain data; the page has a name for each key."""
    return [{"key": key, "value": value} for key, value in pairs]
