"""The verdict of a study: which approach is best at which size, and how certain that is; as text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tsotsallm.study.ledger import Trial
from tsotsallm.units import human_bytes, plus_minus

SIZES = 6
"""Number of classes that the range of sizes is split into, each larger than the one before by the same factor."""
SURE = 2.0


@dataclass(frozen=True)
class Best:
    """The best trial of a class of sizes, and the best trial of another approach in it, if there is one.

    A class in which nothing beats the best trial of a smaller one belongs to that one: whoever has room for more bytes
    keeps the smaller model.

    sure   whether their difference is larger than twice its standard error
    """

    smallest: float
    largest: float
    trial: Trial
    approach: str
    rival: Trial | None
    rival_approach: str
    sure: bool


def size_of(objectives: Sequence[str]) -> str:
    """The measure of size among a study's objectives; bytes where there is none."""
    return next((name for name in objectives if name in ("bytes", "parameters", "nonzero_parameters")), "bytes")


def approach_of(trial: Trial) -> str:
    """The techniques of a trial in order, such as depth + sparsity + quantize q4_k."""
    parts = []
    for stage in trial.recipe:
        [(name, fields)] = stage.items()
        if name == "depth" and not fields.get("remove"):
            continue
        detail = ""
        if name == "quantize":
            detail = f" {fields.get('method', 'gptq')} " + str(f"{fields['bits']} bits" if fields.get("grid") == "int" else
                                                              fields.get("grid", ""))
        elif name == "sparsity" and fields.get("prune"):
            detail = f" {fields['prune']} of {fields['group']}"
        parts.append(name + detail)
    return " + ".join(parts) or "as it is"


def names_of(trials: Sequence[Trial]) -> dict[int, str]:
    """Number of a trial -> its recipe in words, such as 2 layers fewer + q4_k.

    A name that the study gave to the recipe stays; where two recipes would have the same words, what was varied follows.
    """
    words = {trial.number: trial.name if "recipe" in trial.values else recipe_in_words(trial.recipe) for trial in trials}
    times = Counter(words.values())
    return {trial.number: words[trial.number] + (f" ({trial.name})" if times[words[trial.number]] > 1 else "")
            for trial in trials}


def recipe_in_words(recipe: Iterable[Mapping[str, Any]]) -> str:
    """What the stages of a recipe do, in order: 2 layers fewer + q4_k."""
    parts = [_stage_in_words(name, fields or {}) for stage in recipe for name, fields in stage.items()]
    return " + ".join(filter(None, parts)) or "as it is"


def _stage_in_words(name: str, fields: Mapping[str, Any]) -> str:
    """What one stage does; empty where its options make it do nothing."""
    match name:
        case "depth":
            return _fewer(fields.get("remove"), "layer")
        case "layers":
            return _fewer(len(skipped), "layer") if (skipped := fields.get("skip")) else "layers in another order"
        case "replace":
            return f"{count} layers replaced" if isinstance(count := fields.get("remove"), int) else "layers replaced"
        case "neurons":
            return "fewer neurons"
        case "vocabulary":
            return f"{size:,} tokens" if isinstance(size := fields.get("size"), int) else "fewer tokens"
        case "sparsity":
            return f"{fields['prune']} of {fields['group']} weights zero" if fields.get("prune") else "weights zeroed"
        case "quantize":
            return _grid(fields) + (" by rounding" if fields.get("method") == "rtn" else "")
        case "compensate":
            return f"correction of rank {rank}" if isinstance(rank := fields.get("rank"), int) else "low-rank correction"
        case "adapt":
            return "LoRA"
        case "distill":
            return "distilled"
        case "tune":
            return "tuned"
    return name


def _fewer(count: object, what: str) -> str:
    if not isinstance(count, int):
        return f"fewer {what}s"
    return f"{count} {what}{'s' * (count != 1)} fewer" if count else ""


def _grid(fields: Mapping[str, Any]) -> str:
    if fields.get("grids"):
        return "a mixture of grids"
    if (grid := fields.get("grid", "int")) == "int":
        return f"{fields.get('bits', 4)} bits"
    if grid == "mixed":
        return "mixed grids" + (f" of {bits} bits" if (bits := fields.get("bits") or fields.get("budget")) else "")
    return str(grid)


def verdicts(trials: Sequence[Trial], size: str = "bytes") -> list[Best]:
    """The best trial in each class of sizes, from the smallest; only full evaluations count."""
    known = [trial for trial in trials if trial.level == "full" and trial.measure(size)]
    if not known:
        return []
    low, high = (pick(float(trial.measure(size) or 0) for trial in known) for pick in (min, max))
    count = SIZES if high > low * 1.01 else 1
    edges = [low * (high / low) ** (place / count) for place in range(count + 1)]
    classes: list[list[Trial]] = []
    for place in range(count):
        last = place == count - 1
        here = [trial for trial in known if edges[place] <= float(trial.measure(size) or 0) * (1 + 1e-9)
                and (last or float(trial.measure(size) or 0) < edges[place + 1] * (1 - 1e-9))]
        if here and classes and min(map(_loss, here)) >= min(map(_loss, classes[-1])):
            classes[-1] += here
        elif here:
            classes.append(here)
    best_by_size = []
    for here in classes:
        best = min(here, key=lambda trial: (_loss(trial), float(trial.measure(size) or 0)))
        rivals = [trial for trial in here if approach_of(trial) != approach_of(best)]
        rival = min(rivals, key=_loss) if rivals else None
        sure = rival is not None and _loss(rival) - _loss(best) > SURE * math.hypot(_error(best), _error(rival))
        sizes = [float(trial.measure(size) or 0) for trial in here]
        best_by_size.append(Best(min(sizes), max(sizes), best, approach_of(best), rival,
                                 approach_of(rival) if rival is not None else "", sure))
    return best_by_size


def verdict_lines(trials: Sequence[Trial], size: str = "bytes") -> list[str]:
    """The verdict as lines for a terminal: a paragraph for each class of sizes, from the smallest."""
    lines: list[str] = []
    for best in verdicts(trials, size):
        lines += [f"{span_of(best, size)}: {_named(best.trial, best.approach, size)}",
                  f"  KL {plus_minus(_loss(best.trial), _error(best.trial))} nats per token, perplexity "
                  f"{best.trial.measure('perplexity'):.4g}"]
        if best.rival is None:
            lines.append("  no other approach was tried at this size")
        else:
            lines += [f"  next best approach: {_named(best.rival, best.rival_approach, size)}",
                      f"  its KL {plus_minus(_loss(best.rival), _error(best.rival))}; the difference is "
                      f"{'larger' if best.sure else 'not larger'} than twice its error"]
    return lines


def size_text(value: float, size: str) -> str:
    """A size in its unit, such as 4.66 MB or 11.61 million."""
    return human_bytes(value) if size == "bytes" else f"{value / 1e6:.2f} million"


def span_of(best: Best, size: str) -> str:
    """The sizes of a class, such as 3.55 MB to 4.66 MB."""
    low, high = size_text(best.smallest, size), size_text(best.largest, size)
    return low if low == high else f"{low} to {high}"


def _named(trial: Trial, approach: str, size: str) -> str:
    return f"{trial.name} ({approach}; {size_text(float(trial.measure(size) or 0), size)})"


def _loss(trial: Trial) -> float:
    return float(trial.measures["full"]["kl"])


def _error(trial: Trial) -> float:
    return float(trial.measures["full"]["kl_error"])
