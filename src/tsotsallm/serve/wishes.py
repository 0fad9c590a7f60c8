"""What the studio's user wishes for: models and texts to choose from, texts that are added, plans, and jobs.

No path ever comes from a request: models and texts are chosen from lists that are made here, a model of the hub has a name,
texts that are added get names of ours, and recipes name no files.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field

from tsotsallm.calibration import SELF, Calibration, text_obstacle, writes_its_text
from tsotsallm.checkpoint.reader import EMBEDDED, Checkpoint
from tsotsallm.compression import plan
from tsotsallm.errors import CorpusError, RecipeError, ServeError, TsotsallmError
from tsotsallm.evaluation.cost import devices_here
from tsotsallm.fit.reach import Settings, files_of, least, require_reached
from tsotsallm.fit.target import FitsAlready, Target, refuse_what_fits, target_of, usual_minutes, usual_target
from tsotsallm.fit.vocabularies import Vocabularies
from tsotsallm.inspection import inspect_checkpoint
from tsotsallm.planning import whole_spec
from tsotsallm.recipe import Recipe, packaged_recipes
from tsotsallm.remote.names import PREFIX, hub_name
from tsotsallm.serve.answering import Refused
from tsotsallm.serve.jobs import Jobs, StudioJob
from tsotsallm.serve.wire import RequestBody, Text
from tsotsallm.training.samples import read_conversations
from tsotsallm.units import bytes_from_text, human_bytes, human_seconds

DEEP = 2
"""Levels of folders below the chosen one that are searched for models."""
TEXTS = ("*.txt", "*.jsonl")
ADDED = "texts"
"""The folder, in the studio's own, of texts that were added on the page."""
MOST_ADDED = 100
"""Texts that can be added."""
CALIBRATION = (32, 512)
"""Windows of calibration text and tokens per window, as in `fit` by default."""


class Wish(RequestBody):
    """What a model should become: one that fits this computer, a device or a size, or the result of a recipe.

    model        the id of a model in the folder, or `hub:owner/name`
    device, bytes, recipe  at most one of them; none: this computer
    calibration  the text for it: `self` for what the model writes, or the id of a text in the folder; None: the usual one
    keep         ids of texts in the languages to keep; the vocabulary loses the tokens that they do not need
    """

    model: Text = Field(max_length=1000)
    device: Text | None = Field(None, max_length=100)
    bytes: Text | None = Field(None, max_length=40)
    recipe: Text | None = Field(None, max_length=20_000)
    minutes: Annotated[float, Field(gt=0, le=10_000, allow_inf_nan=False)] | None = None
    quick: bool = True
    calibration: Text | None = Field(None, max_length=1000)
    keep: Annotated[list[Text], Field(max_length=MOST_ADDED)] = Field(default_factory=list)

    @property
    def goal(self) -> str:
        """The goal in a word, for titles and names of folders."""
        return self.device or self.bytes or ("small" if self.recipe is None else "recipe")


@contextmanager
def about(field: str | None) -> Iterator[None]:
    """Errors within name the field of a wish that they are about, unless they name one already."""
    try:
        yield
    except TsotsallmError as error:
        error.param = error.param or field
        raise


class Maker:
    """Plans and jobs for the models of a folder."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs, self.folder = jobs, jobs.folder
        self._adding, self._starting = threading.Lock(), threading.Lock()

    def models(self) -> dict[str, str]:
        """Id -> path of the embedded model, and of the checkpoints and GGUF files in the folder."""
        models = {EMBEDDED: EMBEDDED}
        for depth in range(DEEP + 1):
            for config in sorted(self.folder.glob("*/" * depth + "config.json")) if depth else ():
                if any(config.parent.glob("*.safetensors")) and self._may_read(config):
                    models[config.parent.relative_to(self.folder).as_posix()] = str(config.parent)
            for file in sorted(self.folder.glob("*/" * depth + "*.gguf")):
                made = file.with_suffix("")         # beside the checkpoint that it was written from
                later = re.search(r"-(?!0*1-of-)\d+-of-\d+$", file.stem)
                if not later and not (made / "config.json").exists() and self._may_read(file):
                    models[file.relative_to(self.folder).as_posix()] = str(file)
        return models

    def _may_read(self, path: Path) -> bool:
        """Whether a file lies in the folder itself, and is no part of unfinished work."""
        within = path.relative_to(self.folder).parts
        return path.resolve().is_relative_to(self.folder.resolve()) and not any(
            part.endswith(".partial") or part == "work" for part in within)

    def is_here(self, path: str) -> bool:
        """Whether a path is that of a model to choose from."""
        return path in self.models().values()

    def _path(self, model: str) -> str:
        """What the command line calls a model; raises Refused where there is none of its id, HubError for a wrong name."""
        if model.startswith(PREFIX):
            hub_name(model)
            return model
        if (found := self.models().get(model)) is None:
            raise Refused(404, f"there is no model {model!r} in {self.folder}", "model_not_found", param="model")
        return found

    def texts(self) -> dict[str, str]:
        """Id -> path of the texts in the folder that a model can be calibrated on."""
        found = sorted(path for depth in range(DEEP) for name in TEXTS for path in self.folder.glob("*/" * depth + name))
        return {path.relative_to(self.folder).as_posix(): str(path) for path in found if self._may_read(path)}

    def add_text(self, content: bytes, kind: str) -> dict[str, object]:
        """Keep a text in the folder, under a name of ours; raises ServeError where it is none, or there are too many."""
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ServeError(f"this is not text in UTF-8 (byte {error.start}); save it as UTF-8, then add it again"
                             ) from None
        if not text.strip():
            raise ServeError("this text is empty; add one with some pages of prose, or conversations as lines of JSON")
        folder = self.folder / ADDED
        with self._adding:
            folder.mkdir(exist_ok=True)
            names = (f"text-{number}" for number in range(1, MOST_ADDED + 1))
            name = next((name for name in names if not any(folder.glob(f"{name}.*"))), None)
            if name is None:
                raise ServeError(f"{folder} holds {MOST_ADDED} texts already; delete some of them")
            path = folder / f"{name}.{kind}"
            draft = path.with_name(f"{path.name}.partial")      # not listed until it is whole, and known to be good
            try:
                draft.write_text(text, "utf-8")
                if kind == "jsonl":
                    read_conversations(str(draft))
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        return {"id": path.relative_to(self.folder).as_posix(), "bytes": len(content)}

    def choices(self) -> dict[str, object]:
        """The models, devices, texts and packaged recipes to choose from."""
        models = []
        for key, path in self.models().items():
            try:
                anatomy = inspect_checkpoint(Checkpoint.open(path))
            except TsotsallmError:      # not a model that this package reads
                continue
            models.append({"id": key, "label": key, "bytes": anatomy.bytes, "parameters": anatomy.parameters,
                           "layers": anatomy.layers})
        return {"folder": str(self.folder), "models": models, "texts": list(self.texts()),
                "devices": [{"name": name, "about": facts["about"], "bytes": facts["weight_bytes"]}
                            for name, facts in devices_here().items()],
                "recipes": [{"name": name, "text": file.read_text("utf-8")} for name, file in packaged_recipes().items()]}

    def plan(self, wish: Wish) -> dict[str, object]:
        """What a wish will take, whether a text must be chosen for it first, and the command line that does the same."""
        try:
            path, target, recipe = self._read(wish)
        except FitsAlready as found:
            return {"facts": [], "warnings": [f"{found.found}. To make it smaller all the same, choose a size, such as "
                                              f"{found.smaller}."], "command": self._command(wish), "needs_text": False}
        lacks = self._lacks_text(wish, path, recipe)
        return self._planned(wish, path, target, recipe, lacks=lacks) | {"needs_text": lacks}

    def _lacks_text(self, wish: Wish, path: str, recipe: Recipe | None) -> bool:
        """Whether a text must be chosen; CorpusError where one was chosen that cannot be had."""
        checkpoint = Checkpoint.streamed(path)
        if wish.calibration is None and recipe is None and (wish.keep or writes_its_text(checkpoint)):
            return False
        asked = Calibration(self._calibration(wish), CALIBRATION[0], min(CALIBRATION[1], checkpoint.spec.context))
        stages = recipe.plain() if recipe is not None else [{"quantize": {"bits_per_weight": 4.5}}]
        obstacle = text_obstacle(checkpoint, asked, Recipe.parse(stages).resolved(whole_spec(checkpoint)))
        if obstacle is not None and wish.calibration is not None:
            with about("calibration"):
                raise CorpusError(obstacle)
        return obstacle is not None

    def _calibration(self, wish: Wish) -> str | None:
        """The text of a wish as the command line names it; raises Refused where there is none of its name."""
        if wish.calibration is None or wish.calibration == SELF:
            return wish.calibration
        return self._text(wish.calibration, "calibration")

    def _text(self, key: str, field: str) -> str:
        if (found := self.texts().get(key)) is None:
            raise Refused(404, f"there is no text {key!r} in {self.folder}", "text_not_found", param=field)
        return found

    def _used(self, wish: Wish, checkpoint: Checkpoint, *, lacks: bool) -> str | None:
        """The calibration text that a plan counts with: where one must be chosen first, what the page offers first."""
        writes = wish.calibration is None and wish.recipe is None and not wish.keep and writes_its_text(checkpoint)
        return SELF if lacks or writes else self._calibration(wish)

    def _minutes(self, wish: Wish, path: str, calibration: str | None) -> float:
        if wish.minutes is not None:
            return wish.minutes
        window = min(CALIBRATION[1], Checkpoint.streamed(path).spec.context)
        return usual_minutes(path, calibration, CALIBRATION[0], window)

    def _planned(self, wish: Wish, path: str, target: Target | None, recipe: Recipe | None, *, lacks: bool
                 ) -> dict[str, object]:
        checkpoint = Checkpoint.streamed(path)
        calibration = self._used(wish, checkpoint, lacks=lacks)
        stages = recipe.plain() if recipe is not None else [{"quantize": {"file_bytes": target.bytes if target else 0}}]
        try:
            planned = plan(path, stages, self._out(wish), calibration=calibration, windows=CALIBRATION[0],
                           window=min(CALIBRATION[1], checkpoint.spec.context))
        except RecipeError as error:
            if target is None:
                error.param = "recipe"
                raise
            sizes = [("weights", human_bytes(checkpoint.weight_bytes)), ("target", human_bytes(target.bytes))]
            return {"facts": _facts(sizes),
                    "warnings": [f"Fewer bits alone do not make it that small ({error}); layers or neurons must be removed "
                                 "as well."],
                    "command": self._command(wish)}
        kind, size = ("result", planned.result_bytes) if target is None else ("target", target.bytes)
        limit = None if target is None else self._minutes(wish, path, calibration)
        fetched = [] if planned.download is None else [("download", human_bytes(
            planned.download.bytes if target is None else planned.download.whole_bytes))]
        facts = [("weights", human_bytes(planned.bytes)), ("parameters", f"{planned.parameters:,}"),
                 (kind, human_bytes(size)), *fetched,
                 ("memory", f"{human_bytes(planned.ram_bytes)} / {human_bytes(planned.free_ram_bytes)}"),
                 ("disk", f"{human_bytes(planned.disk_bytes)} / {human_bytes(planned.free_disk_bytes)}"),
                 ("time", f"≈ {human_seconds(planned.expected_s)}" if limit is None else f"≤ {limit:g} min")]
        return {"facts": _facts(facts), "warnings": list(planned.warnings), "command": self._command(wish)}

    def start(self, wish: Wish) -> StudioJob:
        """Check a wish and add its job."""
        path, _, recipe = self._read(wish)
        if self._lacks_text(wish, path, recipe):
            with about("calibration"):
                raise ServeError("a text is needed to make this model smaller, and none is within reach; choose one: what "
                                 f"the model writes itself, or a text (.txt or .jsonl) in {self.folder}")
        checkpoint, limit_s = Checkpoint.streamed(path), None
        if recipe is None:
            minutes = self._minutes(wish, path, self._used(wish, checkpoint, lacks=False))
            wish, limit_s = wish.model_copy(update={"minutes": minutes}), 60 * minutes
        before = inspect_checkpoint(checkpoint).bytes
        with self._starting:            # a name is free until its job is among the others
            out = self._out(wish)
            return self.jobs.add(f"{wish.model}: {wish.goal}", [*self._arguments(wish, out), "--json"], out, source=path,
                                 before=before, limit_s=limit_s)

    def _read(self, wish: Wish) -> tuple[str, Target | None, Recipe | None]:
        """The path of a wish's model and its goal; raises Refused or TsotsallmError where the wish is wrong."""
        goals = [name for name in ("device", "bytes", "recipe") if getattr(wish, name) is not None]
        if len(goals) > 1:
            raise ServeError(f"{len(goals)} goals are given; give one of them, a device, a size or a recipe, or none for "
                             "this computer")
        with about("model"):
            path = self._path(wish.model)
            checkpoint = Checkpoint.streamed(path)
        kept = [self._text(key, "keep") for key in wish.keep]
        if wish.recipe is not None and kept:
            with about("keep"):
                raise ServeError("languages to keep belong to a device or a size; a recipe names them in its stage "
                                 "vocabulary, on the command line")
        with about(goals[0] if goals else None):
            if wish.recipe is not None:
                recipe = inline_recipe(wish.recipe)
                recipe.check(checkpoint.spec)
                return path, None, recipe
            if not goals:
                target = usual_target(checkpoint, wish.model)
            else:
                size = None if wish.bytes is None else bytes_from_text(wish.bytes, "the size", ServeError)
                target = target_of(checkpoint.spec.kv_bytes_per_token(), device=wish.device, size=size, faster_than=None)
            refuse_what_fits(checkpoint, wish.model, target)
            vocabularies = Vocabularies(checkpoint, kept)
            with about("keep" if kept else None):
                smallest = least(files_of(path, vocabularies, Settings(keep_text=tuple(kept))), vocabularies)
            require_reached(smallest, target.bytes)
        return path, target, None

    def _arguments(self, wish: Wish, out: Path) -> list[str]:
        path = self._path(wish.model)
        window = str(min(CALIBRATION[1], Checkpoint.streamed(path).spec.context))
        calibration = self._calibration(wish)
        text = [] if calibration is None else ["--calibration", calibration]
        if wish.recipe is not None:
            line = wish.recipe.strip()
            recipe = line if line in packaged_recipes() else json.dumps(inline_recipe(line).plain(), ensure_ascii=False)
            return ["compress", path, recipe, "-o", str(out), "--windows", str(CALIBRATION[0]), "--window", window, *text]
        goals = [("--device", wish.device), ("--bytes", wish.bytes)]
        goal = [word for option, value in goals if value is not None for word in (option, value)]
        kept = [word for key in wish.keep for word in ("--keep-text", self._text(key, "keep"))]
        limit = [] if wish.minutes is None else ["--minutes", f"{wish.minutes:g}"]
        return ["fit", path, *goal, "-o", str(out), "--window", window, *limit, *(["--quick"] if wish.quick else []), *kept,
                *text]

    def _command(self, wish: Wish) -> str:
        return StudioJob("", "", self._arguments(wish, self._out(wish)), "").command

    def _out(self, wish: Wish) -> Path:
        """A free name in the folder for the result of a wish."""
        model = wish.model.removeprefix(PREFIX).removesuffix(".gguf")
        name = re.sub(r"[^\w.-]+", "-", f"{model}-{wish.goal}").strip("-.")
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
