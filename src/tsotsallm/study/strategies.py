"""Which recipe to try next, and why: all of them, at random, or where Optuna's samplers expect most.

A strategy is a function of the trials so far: the same trials, the same proposal, however often a study was stopped.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
    """A recipe to try, why, the trials that gave the reason, and what its sampler wants to be told again."""

    values: Assignment
    key: str
    reason: str
    based_on: tuple[int, ...] = ()
    sampler: dict[str, Any] = field(default_factory=dict)


class Strategy(ABC):
    """Proposes recipes that no trial has tried."""

    def __init__(self, space: Space, objectives: Sequence[str], seed: int) -> None:
        self.space, self.objectives, self.seed = space, tuple(objectives), seed

    @abstractmethod
    def propose(self, number: int, trials: Sequence[Trial]) -> Proposal | None:
        """The recipe for trial `number`; None when nothing is left to try."""

    def key(self, values: Assignment) -> str:
        return key_of(self.space.recipe(values).plain())

    def _fresh(self, number: int, tried: set[str], reason: str, based_on: tuple[int, ...] = ()) -> Proposal | None:
        rng = random.Random(f"{self.seed}/{number}")
        for _ in range(REDRAWS):
            values = self.space.draw(rng)
            if (key := self.key(values)) not in tried:
                return Proposal(values, key, reason, based_on)
        return None


class All(Strategy):
    """Every recipe of the space, in its order."""

    def propose(self, number: int, trials: Sequence[Trial]) -> Proposal | None:
        tried = {trial.key for trial in trials}
        for values in self.space.all():
            if (key := self.key(values)) not in tried:
                return Proposal(values, key, "one of all recipes of the space")
        return None


class AtRandom(Strategy):
    """Recipes drawn alike, each trial with a seed of its own."""

    def propose(self, number: int, trials: Sequence[Trial]) -> Proposal | None:
        return self._fresh(number, {trial.key for trial in trials}, "drawn at random")


class BySampler(Strategy):
    """Optuna's multi-objective samplers: tpe (arXiv:2304.11127) or nsga2; seeded for each trial.

    The trials so far are told to a new Optuna study each time, so that the ledger alone decides; with `storage` they are
    also kept in a file beside it that Optuna's own tools read.
    """

    def __init__(self, space: Space, objectives: Sequence[str], seed: int, sampler: str, storage: Path | None) -> None:
        super().__init__(space, objectives, seed)
        self.sampler, self.storage = sampler, storage
        _optuna()

    def propose(self, number: int, trials: Sequence[Trial]) -> Proposal | None:
        optuna = _optuna()
        tried = {trial.key for trial in trials}
        told = [(trial, values) for trial in trials if (values := values_of(trial.measures, self.objectives)) is not None]
        best = front([values for _, values in told])
        based_on = tuple(told[place][0].number for place in best)
        seed = random.Random(f"{self.seed}/{number}").getrandbits(31)
        sampler = (optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=8) if self.sampler == "tpe" else
                   optuna.samplers.NSGAIISampler(seed=seed, population_size=12))
        study = optuna.create_study(directions=["minimize"] * len(self.objectives), sampler=sampler)
        distributions = {name: _distribution(optuna, domain) for name, domain in self.space.domains.items()}
        for trial, values in told:
            study.add_trial(optuna.trial.create_trial(
                params=_params(self.space, trial.values), distributions=distributions, values=values,
                system_attrs=trial.facts.get("sampler", {})))
        for _ in range(REDRAWS):
            asked = study.ask(distributions)
            chosen = {name: _value(self.space.domains[name], asked.params[name]) for name in distributions}
            key = self.key(chosen) if self.space.allows(chosen) else ""
            if key and key not in tried:
                attributes = dict(study.trials[asked.number].system_attrs)
                return Proposal(chosen, key, f"{self.sampler} expects most of it, after {len(told)} results", based_on,
                                attributes)
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return self._fresh(number, tried, f"{self.sampler} proposed only what was tried; drawn at random", based_on)

    def keep(self, trials: Sequence[Trial]) -> None:
        """Write the trials for Optuna's own tools."""
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


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "study", "the strategies tpe and nsga2") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _address(path: Path) -> str:
    """The URL of an SQLite file whatever its name, as SQLAlchemy writes it and Optuna, which formats it, wants it."""
    from sqlalchemy import URL

    return URL.create("sqlite", database=str(path)).render_as_string().replace("{", "{{").replace("}", "}}")


def _distribution(optuna: Any, domain: Domain) -> Any:
    if not domain.choices:
        return optuna.distributions.FloatDistribution(domain.low, domain.high, log=domain.log)
    return optuna.distributions.CategoricalDistribution(list(range(len(domain.choices))))


def _params(space: Space, values: Assignment) -> dict[str, Any]:
    """What Optuna calls an assignment: choices by place."""
    return {name: domain.choices.index(values[name]) if domain.choices else values[name]
            for name, domain in space.domains.items()}


def _value(domain: Domain, param: Any) -> Any:
    return domain.choices[int(param)] if domain.choices else float(param)
