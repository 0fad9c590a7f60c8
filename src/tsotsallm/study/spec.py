"""A study as data: SPEC.yaml says what is tried, how, on what and for how long; it is checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from tsotsallm.errors import StudyError, nearest
from tsotsallm.files import parse_yaml, quoted, read_utf8
from tsotsallm.study.space import Space
from tsotsallm.study.trial import Setup
from tsotsallm.units import bytes_from_text

STRATEGIES = ("all", "random", "tpe", "nsga2", "halving")
KEYS = ("about", "needs", "layers", "stages", "order", "conditions", "recipes", "strategy", "objectives", "trials", "hours",
        "seed", "size_limit", "cycle", "calibration", "evaluation", "published")
CALIBRATION = ("source", "windows", "window", "seed")
EVALUATION = ("text", "context", "cheap", "full", "tasks", "data", "limit", "speed", "country")
KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("strategy", "source", "text", "data", "country"), (str,)),
    **dict.fromkeys(("layers", "trials", "seed", "cycle", "windows", "window", "context", "cheap", "full", "limit"), (int,)),
    **dict.fromkeys(("needs", "order", "recipes", "calibration", "evaluation", "published"), (Mapping,)),
    **dict.fromkeys(("stages", "conditions", "objectives"), (list,)),
    "about": (str, int, float), "hours": (int, float), "size_limit": (str, int), "tasks": (str, list), "speed": (bool,)}
"""Key -> the types that it takes."""
_KIND_NAMES = {str: "text", int: "a whole number", float: "a number", list: "a list", bool: "true or false",
               Mapping: "keys and values"}
OBJECTIVES = ("kl", "perplexity", "loss", "bytes", "parameters", "nonzero_parameters", "decode")


@dataclass(frozen=True)
class Spec:
    """A study.

    strategy    all, random, tpe, nsga2; or halving: many recipes under `size_limit` bytes are evaluated on little text, the
                best third on three times as much, and so on
    objectives  measures to minimise; `decode` counts as seconds per token
    trials      at most this many
    hours       no trial begins later than this
    cycle       trials after which the notebook draws a conclusion
    setup       what `Setup` takes besides the model
    content     the spec as given, for the ledger
    """

    name: str
    about: str
    space: Space
    strategy: str = "all"
    objectives: tuple[str, ...] = ("kl", "bytes")
    trials: int | None = None
    hours: float | None = None
    seed: int = 0
    size_limit: int | None = None
    cycle: int = 8
    setup: dict[str, Any] = field(default_factory=dict)
    content: dict[str, object] = field(default_factory=dict)

    def setup_for(self, model: str) -> Setup:
        """What all trials have in common when the study runs on `model`."""
        return Setup(model=model, **self.setup)


def packaged_specs() -> dict[str, Traversable]:
    """Name -> file of the studies that come with the package."""
    files = resources.files("tsotsallm.study.specs").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=lambda file: file.name)
            if file.name.endswith(".yaml")}


def read_spec(source: str | Path, *, layers: int, given: Mapping[str, str] | None = None) -> Spec:
    """A study from a file or a packaged name, for a model of `layers` layers; `given` holds the values that it needs.

    Raises StudyError where the spec cannot be read or is wrong.
    """
    return spec_from(Path(source).stem, read_content(source), layers=layers, given=given)


def read_content(source: str | Path) -> dict[str, Any]:
    """The content of a study's file, or of a packaged study; StudyError where it cannot be read or is empty."""
    packaged = packaged_specs()
    try:
        text = (packaged[str(source)].read_text("utf-8") if str(source) in packaged else
                read_utf8(Path(source), StudyError))
    except OSError as error:
        raise StudyError(f"the study {source} cannot be read ({error.strerror or error}); packaged studies: "
                         f"{', '.join(packaged)}") from None
    content = parse_yaml(text, str(source), StudyError)
    if not isinstance(content, Mapping) or not content:
        raise StudyError(f"{source} is empty; a study has stages or recipes, and a strategy")
    return dict(content)


def spec_from(name: str, content: dict[str, Any], *, layers: int, given: Mapping[str, str] | None = None) -> Spec:
    """A study from plain data, for a model of `layers` layers; `$NAME` anywhere in it stands for a value of `given`.

    Raises StudyError where a key, a value or their combination is wrong.
    """
    _known(content, KEYS, "a study")
    content = _with_given(content, given or {})
    _check_kinds(content, KINDS, "a study")
    if ("stages" in content) == ("recipes" in content):
        raise StudyError("a study's space is either `stages` with open values or `recipes` by name; give one of them")
    as_given: dict[str, object] = dict(content)
    if content.get("layers") not in (None, layers):
        content = _rescaled(content, int(content["layers"]), layers)
    strategy = content.get("strategy") or "all"
    if strategy not in STRATEGIES:
        raise StudyError(f"there is no strategy {quoted(strategy)}{nearest(str(strategy), STRATEGIES)}")
    objectives = tuple(content.get("objectives") or ("kl", "bytes"))
    for objective in objectives:
        if objective not in OBJECTIVES:
            raise StudyError(f"there is no objective {quoted(objective)}{nearest(str(objective), OBJECTIVES)}")
    calibration, evaluation = content.get("calibration") or {}, dict(content.get("evaluation") or {})
    _known(calibration, CALIBRATION, "calibration")
    _known(evaluation, EVALUATION, "evaluation")
    _check_kinds(calibration, KINDS, "calibration")
    _check_kinds(evaluation, KINDS, "evaluation")
    if "decode" in objectives and not evaluation.setdefault("speed", True):
        raise StudyError("the objective decode needs evaluation.speed; leave out speed: false, or leave out the objective")
    tasks = evaluation.pop("tasks", ())
    setup = {"calibration" if key == "source" else key: value for key, value in calibration.items()} | evaluation
    setup["tasks"] = tuple(tasks.split(",") if isinstance(tasks, str) else tasks)
    _check_numbers(content, setup)
    limit = content.get("size_limit")
    spec = Spec(name, str(content.get("about", "")),
                Space.of_recipes(content["recipes"]) if "recipes" in content else Space.read(content), strategy, objectives,
                content.get("trials"), content.get("hours"), content.get("seed") or 0,
                None if limit is None else bytes_from_text(str(limit), "size_limit", StudyError), content.get("cycle") or 8,
                setup, as_given)
    if strategy == "halving" and spec.size_limit is None:
        raise StudyError("the strategy halving compares models below one size; give size_limit, such as 700MB")
    if strategy not in ("all", "halving") and spec.trials is None and spec.hours is None:
        raise StudyError(f"the strategy {strategy} never ends by itself; give trials or hours")
    if strategy == "halving" and spec.trials is None:
        raise StudyError("the strategy halving needs a number of recipes to begin with; give trials")
    return spec


def _with_given(content: dict[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    needs = content.get("needs") or {}
    for name, about in needs.items():
        if name not in given:
            raise StudyError(f"this study needs {name}: {about}; give it with --set {name}=FILE")
    for name in given:
        if name not in needs:
            raise StudyError(f"this study does not need {quoted(name)}{nearest(name, needs)}")

    def walk(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("$") and value[1:] in given:
            return given[value[1:]]
        if isinstance(value, Mapping):
            return {key: walk(part) for key, part in value.items()}
        return [walk(part) for part in value] if isinstance(value, list) else value

    return {key: value if key == "needs" else walk(value) for key, value in content.items()}


def _known(content: Mapping[str, object], keys: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in keys:
            raise StudyError(f"{where} has no {quoted(key)}{nearest(str(key), keys)}")


def _check_kinds(content: Mapping[str, object], kinds: Mapping[str, tuple[type, ...]], where: str) -> None:
    """Raise StudyError where a value has no type that its key takes; an empty value stands for the default."""
    for key, value in content.items():
        allowed = kinds[key]
        if value is None or (isinstance(value, allowed) and (not isinstance(value, bool) or bool in allowed)):
            continue
        names = " or ".join(_KIND_NAMES[kind] for kind in allowed)
        raise StudyError(f"{key} of {where} is {quoted(value)}; it takes {names}")


def _check_numbers(content: Mapping[str, object], setup: Mapping[str, object]) -> None:
    for name, least in (("trials", 1), ("cycle", 1)):
        value = content.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise StudyError(f"{name} is {quoted(value)}; it takes a whole number, {least} or more")
    hours = content.get("hours")
    if hours is not None and (not isinstance(hours, (int, float)) or isinstance(hours, bool) or hours <= 0):
        raise StudyError(f"hours is {quoted(hours)}; it takes a number above 0")
    cheap, full = setup.get("cheap", 8), setup.get("full", 60)
    if not isinstance(full, int) or full < 1 or (cheap is not None and not (isinstance(cheap, int) and 1 <= cheap <= full)):
        raise StudyError(f"evaluation.cheap is {quoted(cheap)} and full is {quoted(full)}; they take numbers of windows, of "
                         "which cheap is the smaller")


def _rescaled(content: dict[str, Any], source: int, layers: int) -> dict[str, Any]:
    """Adapt a study of a model of `source` layers to a model of `layers` layers.

    Numbers of layers to remove keep their share, rounded to the nearest integer but at least one where there was one; equal
    ones become one. Protected layers are rescaled in the same way. Layer orders keep their share of layers and the depths,
    as `tsotsallm.evaluation.franken.rescale` does.
    """
    from tsotsallm.evaluation.franken import rescale
    from tsotsallm.stages.layers import expand

    def share(number: int) -> int:
        return 0 if number == 0 else max(1, int(number * layers / source + 0.5))

    def walk(value: Any, key: str = "") -> Any:
        if key in ("remove", "first", "last"):
            if isinstance(value, Mapping):
                return {name: [share(number) for number in part] if name == "one_of" else
                        share(part) if name != "step" else part for name, part in value.items()}
            return share(value)
        if key == "order" and isinstance(value, list) and all(isinstance(part, (int, str)) for part in value) and value and (
                isinstance(value[0], int) or str(value[0])[:1].isdigit()):
            return rescale(expand(value, "order"), source, layers)
        if isinstance(value, Mapping):
            return {name: walk(part, name) for name, part in value.items()}
        return [walk(part) for part in value] if isinstance(value, list) else value

    return {key: walk(value) if key in ("stages", "recipes") else value for key, value in content.items()}
