"""Which recipe to try next, and why: each in turn, at random, or where Optuna's samplers expect the most.

A strategy is a function of the trials so far: the same trials give the same proposal, however often a study was stopped.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tsotsallm.errors import MissingExtraError
from tsotsallm.store import key_of
from tsotsallm.study.ledger import Trial
from tsotsallm.study.pareto import front
from tsotsallm.study.space import Assignment, Domain, Space
from tsotsallm.study.trial import values_of

REDRAWS = 200


@dataclass(frozen=True)
class Proposal:
    """A recipe to try, why, the trials that the reason refers to, and attributes that its sampler needs back later."""

    values: Assignment
    key: str
    reason: str
    based_on: tuple[int, ...] = ()
    sampler: dict[str, object] = field(default_factory=dict)


class Strategy(ABC):
    """Proposes recipes of a space that no trial has tried."""

    def __init__(self, space: Space, objectives: Sequence[str], seed: int) -> None:
        self.space, self.objectives, self.seed = space, tuple(objectives), seed

    @abstractmethod
    def propose(self, number: int, trials: Sequence[Trial]) -> Proposal | None:
        """The recipe for trial `number`, or None when nothing is left to try."""

    def key(self, values: Assignment) -> str:
        """Hash of an assignment's recipe, by which a recipe that was tried is recognised."""
        return key_of(self.space.recipe(values).plain())

    def _fresh(self, number: int, tried: set[str], reason: str, based_on: tuple[int, ...] = ()) -> Proposal | None:
        rng = random.Random(f"{self.seed}/{number}")
        for _ in range(REDRAWS):
            values = self.space.draw(rng)
            if (key := self.key(values)) not in tried:
                return Proposal(values, key, reason, based_on)
        return None


class All(Strategy):
    """Every recipe of the space, in order."""

    def propose(self, number: int, trials: Sequence[Trial]) -> Proposal | None:
        """The first recipe of the space that was not tried."""
        tried = {trial.key for trial in trials}
        for values in self.space.all():
            if (key := self.key(values)) not in tried:
                return Proposal(values, key, "one of all recipes of the space")
        return None


class AtRandom(Strategy):
    """Recipes drawn at random, each trial with a seed of its own."""

    def propose(self, number: int, trials: Sequence[Trial]) -> Proposal | None:
        """A recipe drawn by the study's seed and the trial's number; None where REDRAWS draws give nothing new."""
        return self._fresh(number, {trial.key for trial in trials}, "drawn at random")


class BySampler(Strategy):
    """Optuna's multi-objective samplers: tpe (arXiv:2304.11127) or nsga2; seeded for each trial.

    The trials so far are given to a new Optuna study each time, so that the proposal depends on the ledger alone; with
    `storage` they are also kept in a file beside it that Optuna's own tools read. Raises MissingExtraError without Optuna.
    """

    def __init__(self, space: Space, objectives: Sequence[str], seed: int, sampler: str, storage: Path | None) -> None:
        super().__init__(space, objectives, seed)
        self.sampler, self.storage = sampler, storage
        _optuna()

    def propose(self, number: int, trials: Sequence[Trial]) -> Proposal | None:
        """The recipe that the sampler expects most of; one drawn at random where it repeats what was tried."""
        optuna = _optuna()
        tried = {trial.key for trial in trials}
        measured = [(trial, values) for trial in trials
                    if (values := values_of(trial.measures, self.objectives)) is not None]
        best = front([values for _, values in measured])
        based_on = tuple(measured[place][0].number for place in best)
        seed = random.Random(f"{self.seed}/{number}").getrandbits(31)
        sampler = (optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8) if self.sampler == "tpe" else
                   optuna.samplers.NSGAIISampler(seed=seed, population_size=12))
        study = optuna.create_study(directions=["minimize"] * len(self.objectives), sampler=sampler)
        distributions = {name: _distribution(optuna, domain) for name, domain in self.space.domains.items()}
        for trial, values in measured:
            study.add_trial(optuna.trial.create_trial(
                params=_params(self.space, trial.values), distributions=distributions, values=values,
                system_attrs=trial.facts.get("sampler", {})))
        for _ in range(REDRAWS):
            asked = study.ask(distributions)
            chosen = {name: _value(self.space.domains[name], asked.params[name]) for name in distributions}
            key = self.key(chosen) if self.space.allows(chosen) else ""
            if key and key not in tried:
                attributes = dict(study.trials[asked.number].system_attrs)
                return Proposal(chosen, key, f"{self.sampler} expects most of it, after {len(measured)} results", based_on,
                                attributes)
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return self._fresh(number, tried, f"{self.sampler} proposed only recipes that were tried; drawn at random", based_on)

    def keep(self, trials: Sequence[Trial]) -> None:
        """Write the trials to `storage` for Optuna's own tools."""
        if self.storage is None:
            return
        optuna = _optuna()
        self.storage.unlink(missing_ok=True)
        study = optuna.create_study(directions=["minimize"] * len(self.objectives), study_name="tsotsallm",
                                    storage=_address(self.storage))
        study.set_user_attr("objectives", list(self.objectives))
        distributions = {name: _distribution(optuna, domain) for name, domain in self.space.domains.items()}
        for trial in trials:
            values = values_of(trial.measures, self.objectives)
            study.add_trial(optuna.trial.create_trial(
                params=_params(self.space, trial.values), distributions=distributions, values=values,
                state=optuna.trial.TrialState.COMPLETE if values is not None else optuna.trial.TrialState.FAIL,
                user_attrs={"number": trial.number, "name": trial.name}))


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "study", "the strategies tpe and nsga2") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _address(path: Path) -> str:
    """The URL of an SQLite file with any name: as SQLAlchemy writes it, with braces doubled because Optuna formats it."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(path)).render_as_string().replace("{", "{{").replace("}", "}}")


def _distribution(optuna: ModuleType, domain: Domain) -> Any:
    if not domain.choices:
        return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)
    return optuna.distributions.CategoricalDistribution(list(range(len(domain.choices))))


def _params(space: Space, values: Assignment) -> dict[str, object]:
    """An assignment as Optuna stores it: choices by index."""
    return {name: domain.choices.index(values[name]) if domain.choices else values[name]
            for name, domain in space.domains.items()}


def _value(domain: Domain, param: float) -> object:
    return domain.choices[int(param)] if domain.choices else float(param)
