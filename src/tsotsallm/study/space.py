"""A space of recipes: stages with open values, the orders that they may have, and conditions between them.

    stages:
      - depth: {remove: {one_of: [0, 1, 2]}}
      - one_of: [{sparsity: {prune: 2, group: 4}}, none]
      - quantize: {grid: {one_of: [q3_k, q4_k]}, damp: {from: 0.005, to: 0.05, log: true}}
    order: {one_of: [[depth, sparsity, quantize], [sparsity, depth, quantize]]}
    conditions:
      - when: {stage 2: sparsity}
        then: {quantize.grid: [q3_k]}

A value is open where it is {one_of: [...]} or {from:, to:, step: or log:}. Its name is STAGE.FIELD; a choice between
stages at place n is called `stage n`, the choice of an order `order`. `depth: {remove: 0}` leaves the stage out.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tsotsallm.errors import StudyError, nearest
from tsotsallm.files import Json, JsonObject, one_line, quoted
from tsotsallm.recipe import Recipe
from tsotsallm.store import key_of

NONE = "none"
MOST_CHOICES = 10_000
"""Steps of a range."""
DRAWS = 2000
"""Tries to draw a recipe that meets all conditions before the space is called empty."""
SEEN = 50
"""Recipes of a larger space that are read before a study begins."""

Assignment = JsonObject
"""Name of an open value -> the value chosen for it, as in the spec; for a choice between stages, its label."""


@dataclass(frozen=True)
class Domain:
    """What an open value may be: one of some choices, or a number in a range; a range with steps becomes choices."""

    choices: tuple[Json, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False

    @classmethod
    def read(cls, where: str, plain: Mapping[str, Json]) -> Domain:
        """Read {one_of: [...]} or {from:, to:, step: or log:}; raises StudyError, naming `where`, for anything else."""
        if "one_of" in plain:
            choices = plain["one_of"]
            if set(plain) != {"one_of"} or not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
                raise StudyError(f"{where}: one_of takes a list of at least one choice, and no other key beside it")
            try:
                unique = list({json.dumps(choice, sort_keys=True): choice for choice in choices}.values())
            except TypeError:
                raise StudyError(f"{where}: one_of holds keys and values whose keys have several types; write all keys as "
                                 "text") from None
            return cls(tuple(unique))
        if unknown := set(plain) - {"from", "to", "step", "log"}:
            raise StudyError(f"{where}: a range has from, to, and step or log, but this one also has "
                             f"{one_line(', '.join(sorted(map(str, unknown))), 80)}")
        low, high, step, log = (plain.get(key) for key in ("from", "to", "step", "log"))
        numbers = [low, high] + ([step] if step is not None else [])
        if any(isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number)
               for number in numbers):
            raise StudyError(f"{where}: from, to and step take numbers")
        assert low is not None
        assert high is not None
        if low > high or (step is not None and step <= 0) or (log and (low <= 0 or step is not None)):
            raise StudyError(f"{where}: the range from {low} to {high} is empty, or its step or log does not fit it")
        if step is None and isinstance(low, int) and isinstance(high, int) and not log:
            step = 1
        if step is not None:
            count = math.floor((high - low) / step + 1e-9) + 1
            if count > MOST_CHOICES:
                raise StudyError(f"{where}: the range has {count:.3g} steps, more than {MOST_CHOICES}; take a wider step")
            return cls(tuple(round(low + place * step, 12) for place in range(count)))
        return cls(low=float(low), high=float(high), log=bool(log))

    def draw(self, rng: random.Random) -> Json:
        """One value at random: any choice alike; from a range uniformly, or uniformly in its logarithm."""
        if self.choices:
            return rng.choice(self.choices)
        if self.log:
            return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return rng.uniform(self.low, self.high)


@dataclass(frozen=True)
class Condition:
    """Where all of `when` holds, all of `then` must hold; each maps names of open values to the values allowed."""

    when: dict[str, list[object]]
    then: dict[str, list[object]]

    def met(self, values: Assignment) -> bool:
        """Whether an assignment meets the condition."""
        return not all(values.get(name) in some for name, some in self.when.items()) or all(
            values.get(name) in some for name, some in self.then.items())


@dataclass(frozen=True)
class Space:
    """Recipes with open values, or a list of recipes by name; stages are as written in the spec."""

    stages: tuple[Json, ...]
    domains: dict[str, Domain]
    conditions: tuple[Condition, ...] = ()
    named: tuple[tuple[str, Json], ...] = ()

    @classmethod
    def of_recipes(cls, recipes: Mapping[str, Json]) -> Space:
        """The space of a study's `recipes`; raises StudyError where there are none, RecipeError where one is wrong."""
        if not isinstance(recipes, Mapping) or not recipes:
            raise StudyError("recipes is empty; it takes NAME: RECIPE, at least one")
        for recipe in recipes.values():
            Recipe.parse(recipe)
        return cls((), {"recipe": Domain(tuple(str(name) for name in recipes))}, (),
                   tuple((str(name), recipe) for name, recipe in recipes.items()))

    @classmethod
    def read(cls, plain: Mapping[str, Json]) -> Space:
        """A space from a study's `stages`, `order` and `conditions`.

        Raises StudyError where one of them is wrong or where no recipe meets the conditions, RecipeError where a recipe is.
        """
        stages = plain.get("stages")
        if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
            raise StudyError("the study's space is empty: `stages` takes a list of at least one stage")
        domains: dict[str, Domain] = {}
        for place, stage in enumerate(stages, 1):
            _collect(stage, place, domains)
        if "order" in plain:
            domains["order"] = Domain.read("order", plain["order"])
            for order in domains["order"].choices:
                if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
                    raise StudyError(f"order has the choice {quoted(order)}; it takes lists of stages by name")
        conditions = tuple(_condition(condition, domains) for condition in plain.get("conditions") or ())
        space = cls(tuple(stages), domains, conditions)
        space._require_some()
        return space

    @property
    def finite(self) -> bool:
        """Whether every open value has a finite number of choices."""
        return all(domain.choices for domain in self.domains.values())

    @property
    def size(self) -> int | None:
        """Number of assignments, including those that conditions exclude; None where a range has no steps."""
        return math.prod(len(domain.choices) for domain in self.domains.values()) if self.finite else None

    def all(self) -> Iterator[Assignment]:
        """Every assignment that meets the conditions, each recipe once; StudyError where a range has no steps."""
        if not self.finite:
            open_ = next(name for name, domain in self.domains.items() if not domain.choices)
            raise StudyError(f"{open_} is a range without steps: not every recipe can be tried; give it a step, or choose "
                             "the strategy random or tpe")
        seen = set()
        for values in itertools.product(*(domain.choices for domain in self.domains.values())):
            assignment = dict(zip(self.domains, values, strict=True))
            if self.allows(assignment) and (key := key_of(self.recipe(assignment).plain())) not in seen:
                seen.add(key)
                yield assignment

    def draw(self, rng: random.Random) -> Assignment:
        """One assignment at random that meets the conditions; StudyError where DRAWS attempts find none."""
        for _ in range(DRAWS):
            assignment = {name: domain.draw(rng) for name, domain in self.domains.items()}
            if self.allows(assignment):
                return assignment
        raise StudyError(f"none of {DRAWS} recipes drawn meets the conditions; correct those that contradict each other")

    def allows(self, values: Assignment) -> bool:
        """Whether an assignment meets all conditions."""
        return all(condition.met(values) for condition in self.conditions)

    def recipe(self, values: Assignment) -> Recipe:
        """The recipe of an assignment; raises RecipeError where its values make none."""
        if self.named:
            return Recipe.parse(dict(self.named)[values["recipe"]])
        stages = [filled for place, stage in enumerate(self.stages, 1)
                  if (filled := _filled(stage, place, values)) is not None]
        if "order" in values:
            wanted = list(values["order"])
            stages.sort(key=lambda stage: wanted.index(_name(stage)) if _name(stage) in wanted else len(wanted))
        return Recipe.parse(stages)

    def name(self, values: Assignment) -> str:
        """A short name for an assignment; a stage with one open option is named alone: depth 2, not depth.remove 2."""
        if self.named:
            return str(values["recipe"])
        open_options = Counter(name.partition(".")[0] for name in values)
        stages = {name: name.partition(".")[0] for name in values}
        return ", ".join(f"{stages[name] if open_options[stages[name]] == 1 else name} {_short(value)}"
                         for name, value in values.items()) or "the only recipe"

    def _require_some(self) -> None:
        """Raise where no recipe is left or one is wrong: checks all recipes of a small space, some of a large one."""
        if self.finite and (self.size or 0) <= DRAWS:
            if not sum(1 for _ in self.all()):
                raise StudyError("the conditions contradict each other: no recipe of the space meets them all; correct them")
        else:
            for seed in range(SEEN):
                self.recipe(self.draw(random.Random(seed)))


def _collect(stage: object, place: int, domains: dict[str, Domain]) -> None:
    if isinstance(stage, str):
        Recipe.parse([stage])
        return
    if not isinstance(stage, Mapping) or len(stage) != 1:
        raise StudyError(f"stage {place} is {quoted(stage)}; it takes NAME: {{options}}, a short form such as gptq:4, or "
                         "{one_of: [stages or none]}")
    [(name, fields)] = stage.items()
    if name == "one_of":
        domain = Domain.read(f"stage {place}", stage)
        for choice in domain.choices:
            if choice not in (NONE, None):
                _collect(choice, place, domains)
        _add(f"stage {place}", Domain(_labels(domain)), domains)
        return
    if not isinstance(fields, Mapping | None):
        raise StudyError(f"stage {place}: {quoted(name)} has the value {quoted(fields)}; it takes keys and values")
    for field, value in (fields or {}).items():
        if isinstance(value, Mapping) and ("one_of" in value or "from" in value):
            _add(f"{name}.{field}", Domain.read(f"{name}.{field}", value), domains)


def _add(name: str, domain: Domain, domains: dict[str, Domain]) -> None:
    """Add an open value; raises StudyError where its name has other choices already."""
    if domains.setdefault(name, domain) != domain:
        raise StudyError(f"{name} is open in two places with different choices; write the choices out as whole stages, "
                         "under one_of")


def _filled(stage: Json, place: int, values: Assignment) -> Json:
    """A stage with every open value set, or None where it is left out."""
    if isinstance(stage, str):
        return stage
    [(name, fields)] = stage.items()
    if name == "one_of":
        domain = Domain.read(f"stage {place}", stage)
        chosen = domain.choices[_labels(domain).index(values[f"stage {place}"])]
        return None if chosen in (NONE, None) else _filled(chosen, place, values)
    filled = {field: values.get(f"{name}.{field}", value) for field, value in (fields or {}).items()}
    return None if name == "depth" and filled.get("remove") == 0 else {name: filled}


def _labels(domain: Domain) -> tuple[str, ...]:
    """Labels of a choice between stages: the technique, with a number where several are alike."""
    labels = [NONE if choice in (NONE, None) else _name(choice) for choice in domain.choices]
    return tuple(f"{label} {number}" if labels.count(label) > 1 else label for number, label in enumerate(labels, 1))


def _name(stage: Json) -> str:
    """The technique of a stage as written."""
    return Recipe.parse([stage]).stages[0].name if isinstance(stage, str) else str(next(iter(stage)))


def _condition(plain: object, domains: Mapping[str, Domain]) -> Condition:
    if not isinstance(plain, Mapping) or set(plain) != {"when", "then"} or not all(
            isinstance(part, Mapping) for part in plain.values()):
        raise StudyError(f"a condition takes {{when: {{NAME: values}}, then: {{NAME: values}}}}, but this one is "
                         f"{quoted(plain)}")
    sides = []
    for part in (plain["when"], plain["then"]):
        side = {}
        for name, values in part.items():
            if name not in domains:
                raise StudyError(f"a condition names {quoted(name)}, which is not an open value of the space"
                                 f"{nearest(str(name), domains)}")
            wanted = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
            choices = domains[name].choices
            if choices and not any(choice in wanted for choice in choices):
                raise StudyError(f"a condition requires {name} to be {one_line(_short(wanted), 80)}, which it can never be; "
                                 f"it can be {one_line(_short(list(choices)), 200)}")
            side[name] = wanted
        sides.append(side)
    return Condition(*sides)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "+".join(map(_short, value))
    return str(value) if not isinstance(value, Mapping) else json.dumps(value)
