"""A study from its first trial to its verdict: propose, try, note, conclude; stopped at any point, it resumes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.compression import check_device
from tsotsallm.errors import RecipeError, StudyError
from tsotsallm.evaluation.cost import count_nonzero
from tsotsallm.evaluation.examination import check_tasks
from tsotsallm.files import one_line
from tsotsallm.inspection import inspect_checkpoint
from tsotsallm.journal import held
from tsotsallm.planning import whole_spec
from tsotsallm.recipe import Recipe
from tsotsallm.study.ledger import Ledger, Trial
from tsotsallm.study.pareto import front, hypervolume
from tsotsallm.study.spec import STORE_BYTES, Spec
from tsotsallm.study.strategies import All, AtRandom, BySampler, Proposal, Strategy
from tsotsallm.study.trial import Outcome, Setup, TrialJob, values_of
from tsotsallm.study.workers import Here, Workers
from tsotsallm.units import human_bytes, plus_minus

Say = Callable[[str], None]
THIRD = 3
"""Successive halving keeps one recipe in three and evaluates it on three times as much text (arXiv:1502.07943)."""


@dataclass(frozen=True)
class Found:
    """The trials of a study so far, and the front of those that were evaluated fully.

    reference  the corner point of the hypervolume: 10% worse than the worst trial in every objective
    """

    folder: Path
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    hypervolume: float
    reference: tuple[float, ...]
    objectives: tuple[str, ...]

    def plain(self) -> dict[str, object]:
        """Everything as plain data for JSON; the front by trial numbers."""
        return {"folder": str(self.folder), "trials": [trial.plain() for trial in self.trials],
                "front": [trial.number for trial in self.front], "hypervolume": self.hypervolume,
                "hypervolume_reference": list(self.reference)}


def run_study(spec: Spec, model: str, out: Path, workers: Workers | None = None, say: Say = lambda _line: None, *,
              device: str = "cpu") -> Found:
    """Run a study on a model with its ledger in `out`; trials that an earlier attempt finished are not run again.

    Trials compute on `device`, of this computer or of the workers. Raises StudyError where `out` holds another study,
    ResumeError where another process is working in it, TaskError for a task that cannot be taken.
    """
    checkpoint = Checkpoint.open(model)
    if workers is None:
        check_device(device)
    setup = spec.setup_for(model)
    if setup.tasks:
        check_tasks(setup.tasks, data=setup.data, limit=setup.limit)
    what = setup.plain() | {"store_bytes": STORE_BYTES}
    del what["device"]                  # where and how long it computes may change from run to run
    content = {name: value for name, value in spec.content.items() if name != "hours"}
    with held(out), closing(Ledger(out)) as ledger:
        anatomy = inspect_checkpoint(checkpoint)
        original = {"bytes": anatomy.bytes, "parameters": anatomy.parameters,
                    "nonzero_parameters": count_nonzero(checkpoint)}
        ledger.begin({"spec": content, "name": spec.name, "model": model, "original": original,
                      "source": checkpoint.fingerprint(),
                      "setup": what, "objectives": list(spec.objectives)})
        for trial in ledger.trials("running"):
            ledger.forget(trial.number)
        _Study(spec, replace(setup, device=device), ledger, workers or Here(out / "work"), _strategy(spec, out),
               whole_spec(checkpoint), say).run()
        return found_in(out, ledger, spec.objectives)


def found_in(folder: Path, ledger: Ledger, objectives: Sequence[str]) -> Found:
    """The trials of a ledger, their front among full evaluations, and its hypervolume."""
    trials = ledger.trials()
    measured = [(trial, values) for trial in trials if trial.level == "full"
                and (values := values_of(trial.measures, objectives)) is not None]
    points = [values for _, values in measured]
    worst = [max(column) for column in zip(*points, strict=True)]
    reference = tuple(1.1 * value if value > 0 else 1.0 for value in worst)
    best = tuple(measured[place][0] for place in front(points))
    return Found(folder, tuple(trials), best, hypervolume(points, reference) if points else 0.0, reference,
                 tuple(objectives))


def open_study(folder: Path) -> Found:
    """The results of a study so far; raises StudyError where the folder holds none, or one that cannot be read."""
    if not (folder / "ledger.sqlite").exists() and not (folder / "trials.jsonl").exists():
        raise StudyError(f"{folder} holds no study; give the folder that `tsotsallm study` wrote with -o")
    with closing(Ledger(folder)) as ledger:
        study = ledger.study()
        if study is None:
            raise StudyError(f"{folder} holds a study that never began; run `tsotsallm study` again")
        try:
            return found_in(folder, ledger, [str(name) for name in study["objectives"]])
        except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError) as error:
            raise StudyError(f"{folder} holds a study that cannot be read ({type(error).__name__}: {one_line(error)}); "
                             "restore its ledger from a copy") from None


def _strategy(spec: Spec, out: Path) -> Strategy:
    if spec.strategy == "all":
        return All(spec.space, spec.objectives, spec.seed)
    if spec.strategy in ("tpe", "nsga2"):
        return BySampler(spec.space, spec.objectives, spec.seed, spec.strategy, out / "optuna.sqlite")
    return AtRandom(spec.space, spec.objectives, spec.seed)


class _Study:
    """A study while it runs."""

    def __init__(self, spec: Spec, setup: Setup, ledger: Ledger, workers: Workers, strategy: Strategy, whole: ModelSpec,
                 say: Say) -> None:
        self.spec, self.setup, self.ledger, self.workers = spec, setup, ledger, workers
        self.strategy, self.whole, self.say = strategy, whole, say
        self.began = time.monotonic()

    def run(self) -> None:
        """Run every trial of the strategy; what a stopped run finished is in the ledger already."""
        halving = self.spec.strategy == "halving"
        full = ("full", self.setup.full)
        cheap = full if self.setup.cheap in (None, self.setup.full) else ("cheap", self.setup.cheap)
        levels = (cheap,) if halving or cheap == full else (cheap, full)
        self._try_all(levels)
        if halving:
            self._halve(*cheap)
        if isinstance(self.strategy, BySampler):
            self.strategy.keep(self.ledger.trials())

    def _over(self, count: int) -> bool:
        late = self.spec.hours is not None and time.monotonic() - self.began > 3600 * self.spec.hours
        return late or (self.spec.trials is not None and count >= self.spec.trials)

    def _try_all(self, levels: tuple[tuple[str, int], ...]) -> None:
        running: dict[int, Trial] = {}
        exhausted = False
        while True:
            while not exhausted and len(running) < self.workers.capacity:
                trials = self.ledger.trials()
                taken = {trial.number for trial in trials}
                number = next(number for number in range(len(trials) + 1) if number not in taken)
                if self._over(len(trials)) or (proposal := self.strategy.propose(number, trials)) is None:
                    exhausted = True
                    break
                self._plan(number, trials)
                running[number] = self._start(number, proposal, levels, trials)
            if not running:
                if trials := self.ledger.trials():
                    self._conclude(trials[-1].number, last=True)
                return
            for job, outcome in self.workers.finished():
                self._settle(running.pop(job.number), outcome)

    def _start(self, number: int, proposal: Proposal, levels: tuple[tuple[str, int], ...], trials: Sequence[Trial]) -> Trial:
        recipe = self._resolved(self.spec.space.recipe(proposal.values)).plain()
        facts = {"sampler": proposal.sampler} if proposal.sampler else {}
        trial = Trial(number, proposal.key, self.spec.space.name(proposal.values), recipe, proposal.values, proposal.reason,
                      proposal.based_on, facts=facts)
        self.ledger.add(trial)
        known = tuple((earlier.measures["full"]["kl"], earlier.measures["model"]["bytes"]) for earlier in trials
                      if earlier.level == "full")
        halving = self.spec.strategy == "halving"
        self.workers.submit(self.setup, TrialJob(number, trial.key, recipe, known, levels, keep=halving))
        return trial

    def _resolved(self, recipe: Recipe) -> Recipe:
        """A recipe with its groups written out; one that does not fit the model stays as it is, and its trial fails."""
        try:
            recipe.check(self.whole)
        except RecipeError:
            return recipe
        return recipe.resolved(self.whole)

    def _settle(self, trial: Trial, outcome: Outcome) -> None:
        trial = replace(trial, status="failed" if outcome.error else "done", measures=outcome.measures,
                        facts=trial.facts | outcome.facts, error=outcome.error)
        self.ledger.settle(trial)
        self.say(_line(trial))
        self._conclude(trial.number)

    # -- the notebook -------------------------------------------------------------------------------------------------

    def _plan(self, number: int, trials: Sequence[Trial]) -> None:
        cycle, place = divmod(number, self.spec.cycle)
        if place == 0:
            size = self.spec.space.size
            what = {"all": f"try every recipe of the space ({size} before conditions)",
                    "random": "draw recipes at random", "halving": "draw recipes at random, with little text for each"}.get(
                        self.spec.strategy, f"let {self.spec.strategy} propose recipes, given {len(trials)} results")
            last = min(number + self.spec.cycle, self.spec.trials or number + self.spec.cycle) - 1
            self.ledger.note(cycle, "plan", f"Trials {number} to {last}: {what}; smaller is better for "
                                            f"{' and '.join(self.spec.objectives)}.")

    def _conclude(self, number: int, *, last: bool = False) -> None:
        """Close a cycle when its trials are finished; the last cycle of a study may be shorter."""
        cycle = number // self.spec.cycle
        trials = self.ledger.trials()
        mine = [trial for trial in trials if trial.number // self.spec.cycle == cycle]
        end = (cycle + 1) * self.spec.cycle
        most = min(end, self.spec.trials or end) - cycle * self.spec.cycle
        if any(trial.status == "running" for trial in mine) or (len(mine) < most and not last):
            return
        numbers = [trial.number for trial in mine]
        failed = [trial for trial in mine if trial.status == "failed"]
        full = [trial for trial in mine if trial.level == "full"]
        self.ledger.note(cycle, "implement", f"{len(mine)} recipes tried, {len(full)} evaluated fully, {len(failed)} failed"
                         + "".join(f"; trial {trial.number}: {trial.error}" for trial in failed) + ".", numbers)
        so_far = found_in(self.ledger.folder, self.ledger, self.spec.objectives)
        new = [trial for trial in so_far.front if trial.number in numbers]
        self.ledger.note(cycle, "revise", "On the front now: " + ("; ".join(
            f"trial {trial.number} ({trial.name}): {_measures(trial)}" for trial in new) or "none of these") + ".",
            [trial.number for trial in new])
        best = [f"trial {trial.number}" for trial in so_far.front]
        self.ledger.note(cycle, "re-implement", f"The front holds {', '.join(best) or 'nothing yet'}; later trials must "
                         "beat it, or be smaller.", [trial.number for trial in so_far.front])

    # -- successive halving -------------------------------------------------------------------------------------------

    def _halve(self, level: str, windows: int) -> None:
        """Evaluate the best third on three times as much text, until those that are left are evaluated fully."""
        assert self.spec.size_limit is not None
        alive = [trial for trial in self.ledger.trials("done")
                 if trial.measures["model"]["bytes"] <= self.spec.size_limit and level in trial.measures]
        if not alive:
            raise StudyError(f"no recipe that was tried stays within size_limit {human_bytes(self.spec.size_limit)}; give "
                             "more trials, a larger limit, or a space with smaller models")
        while windows < self.setup.full:
            kept = sorted(alive, key=lambda trial: (trial.measures[level]["kl"], trial.number))
            alive = kept[:max(1, -(-len(kept) // THIRD))]
            windows = min(windows * THIRD, self.setup.full)
            level = "full" if windows == self.setup.full else f"{windows} windows"
            waiting = {trial.number: trial for trial in alive if level not in trial.measures}
            queue = list(waiting.values())
            while queue or waiting:
                while queue and len(waiting) - len(queue) < self.workers.capacity:
                    trial = queue.pop(0)
                    self.workers.submit(self.setup, TrialJob(trial.number, trial.key, trial.recipe, (), ((level, windows),),
                                                             keep=True))
                for job, outcome in self.workers.finished():
                    trial = waiting.pop(job.number)
                    self.ledger.settle(replace(
                        trial, measures=trial.measures | outcome.measures, error=outcome.error,
                        status="failed" if outcome.error else "done",
                        facts=trial.facts | {f"{level} seconds": outcome.facts["seconds"]}))
                    self.say(_line(self.ledger.trials()[trial.number]))
            numbers = {trial.number for trial in alive}
            alive = [trial for trial in self.ledger.trials("done") if trial.number in numbers]


def _line(trial: Trial) -> str:
    seconds = trial.facts.get("seconds", 0.0)
    reused = f", {len(trial.facts['reused'])} pieces reused" if trial.facts.get("reused") else ""
    return f"{trial.number:4} {trial.name}: {trial.error or _measures(trial)} ({seconds:.0f} s{reused})"


def _measures(trial: Trial) -> str:
    loss = trial.measures.get(trial.level, {})
    text = f"KL {plus_minus(loss['kl'], loss['kl_error'])}, perplexity {loss['perplexity']:.3f}, " if loss else ""
    return f"{text}{human_bytes(trial.measures.get('model', {}).get('bytes', 0))}, {trial.level} evaluation"


def ledger_json(folder: Path, *, repeatable: bool = False) -> str:
    """All trials of a study as JSON; `repeatable` leaves out times, energy and machines."""
    with closing(Ledger(folder)) as ledger:
        return json.dumps([trial.plain(repeatable=repeatable) for trial in ledger.trials()], indent=1)
