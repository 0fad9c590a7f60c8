"""What a study will take, before it starts: memory, disk, and the time of making and of evaluating its recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import work_of
from tsotsallm.compression import plan
from tsotsallm.errors import StudyError, TsotsallmError
from tsotsallm.evaluation.examination import plan_examination
from tsotsallm.machine import free_disk_bytes, free_ram_bytes, gemm_flops_per_second
from tsotsallm.pace import ELSEWHERE_RATIO
from tsotsallm.planning import Forecast
from tsotsallm.records import Record
from tsotsallm.study.spec import Spec
from tsotsallm.study.strategies import All
from tsotsallm.study.study import open_study
from tsotsallm.study.trial import Setup


@dataclass(frozen=True)
class StudyForecast(Record):
    """The forecast of a study that tries every recipe.

    recipes       that can be applied to the model; `impossible` has the others, with the reason
    made_s        to make their models, passes that several recipes have in common counted once
    apart_s       the same without what they have in common
    evaluated_s   to evaluate each of them, in full
    tasks_s       the least time that the tasks among that take
    longest       the recipe that takes most, and its seconds
    disk_bytes    of the largest run, besides the store of what recipes have in common
    runs          passes on this computer that the least known of its passes is judged by
    finished      recipes that the study in this folder has tried already, which count no more
    hours         after which no recipe begins
    notes         which recipes are left out, and why
    """

    recipes: int
    made_s: float
    apart_s: float
    evaluated_s: float
    tasks_s: float
    longest: tuple[str, float]
    ram_bytes: int
    disk_bytes: int
    store_bytes: int
    free_ram_bytes: int
    free_disk_bytes: int
    runs: int
    impossible: dict[str, str] = field(default_factory=dict)
    finished: int = 0
    hours: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Of the whole study."""
        return self.made_s + self.evaluated_s + self.tasks_s


def forecast_study(spec: Spec, model: str, out: Path) -> StudyForecast:
    """Forecast a study in the folder `out` as `plan` does its recipes, by what passes took on this computer.

    Raises StudyError where recipes are drawn one after another, so that nobody knows them yet, or where none can be applied.
    """
    if spec.strategy != "all":
        raise StudyError(f"the strategy {spec.strategy} draws recipes one after another, so that the time of all of them is "
                         "not known before; --hours sets a limit")
    setup = spec.setup_for(model)
    checkpoint = Checkpoint.streamed(model)
    window = min(setup.window, checkpoint.spec.context)
    passes: dict[tuple[str, ...], float] = {}
    impossible: dict[str, str] = {}
    planned: dict[str, Forecast] = {}
    finished = {trial.key for trial in open_study(out).trials} if (out / "trials.jsonl").exists() else set()
    strategy = All(spec.space, spec.objectives, spec.seed)
    waiting = [values for values in spec.space.all() if strategy.key(values) not in finished]
    for values in waiting if spec.trials is None else waiting[:max(0, spec.trials - len(finished))]:
        name = spec.space.name(values)
        try:
            planned[name] = plan(model, spec.space.recipe(values).plain(), calibration=setup.calibration,
                                 windows=setup.windows, window=window)
        except TsotsallmError as error:
            impossible[name] = str(error)
            continue
        done: tuple[str, ...] = ()
        for sweep in planned[name].sweeps:
            done = (*done, sweep.kind.stages)
            passes[done] = sweep.expected_s
    if not planned and not impossible:
        raise StudyError(f"{out} has tried every recipe already; `tsotsallm study show` shows them")
    if not planned:
        raise StudyError(f"no recipe of {spec.name} can be applied to {model}; the first: {next(iter(impossible.values()))}")
    every = planned.values()
    longest = max(planned, key=lambda name: planned[name].expected_s)
    count = len(planned)
    return StudyForecast(
        count, sum(passes.values()), sum(one.expected_s for one in every), count * _evaluated_s(setup, checkpoint),
        (count + 1) * _tasks_s(setup), (longest, planned[longest].expected_s), max(one.ram_bytes for one in every),
        max(one.disk_bytes for one in every), setup.store_bytes, free_ram_bytes(), free_disk_bytes(out),
        min(one.runs for one in every), impossible, len(finished), spec.hours, spec.notes)


def _evaluated_s(setup: Setup, checkpoint: Checkpoint) -> float:
    """Seconds in which the text of a cheap and a full evaluation passes a model, its head and the original's."""
    spec, context = checkpoint.spec, min(setup.context, checkpoint.spec.context)
    products = work_of(spec).prefill(context) + spec.vocabulary * spec.hidden * context
    return ELSEWHERE_RATIO * 2 * products * (setup.full + (setup.cheap or 0)) / gemm_flops_per_second()


def _tasks_s(setup: Setup) -> float:
    """The least seconds that the tasks of a full evaluation take."""
    if not setup.tasks:
        return 0.0
    return sum(task.floor_s for task in plan_examination([setup.model], list(setup.tasks), data=setup.data,
                                                         limit=setup.limit, seed=setup.seed))
