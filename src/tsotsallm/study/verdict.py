"""The verdict of a study: which approach is best at which size, and how certain that is; as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tsotsallm.study.ledger import Trial
from tsotsallm.units import human_bytes

SIZES = 6
"""Number of classes that the range of sizes is split into, each larger than the one before by the same factor."""
SURE = 2.0


@dataclass(frozen=True)
class Best:
    """The best trial of a class of sizes, and the best trial of another approach in it, if there is one.

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


def verdicts(trials: Sequence[Trial], size: str = "bytes") -> list[Best]:
    """The best trial in each class of sizes, from the smallest; only full evaluations count."""
    known = [trial for trial in trials if trial.level == "full" and trial.measure(size)]
    if not known:
        return []
    low, high = (pick(float(trial.measure(size) or 0) for trial in known) for pick in (min, max))
    count = SIZES if high > low * 1.01 else 1
    edges = [low * (high / low) ** (place / count) for place in range(count + 1)]
    best_by_size = []
    for place in range(count):
        last = place == count - 1
        here = [trial for trial in known if edges[place] <= float(trial.measure(size) or 0) * (1 + 1e-9)
                and (last or float(trial.measure(size) or 0) < edges[place + 1] * (1 - 1e-9))]
        if not here:
            continue
        best = min(here, key=_loss)
        rivals = [trial for trial in here if approach_of(trial) != approach_of(best)]
        rival = min(rivals, key=_loss) if rivals else None
        sure = rival is not None and _loss(rival) - _loss(best) > SURE * math.hypot(_error(best), _error(rival))
        sizes = [float(trial.measure(size) or 0) for trial in here]
        best_by_size.append(Best(min(sizes), max(sizes), best, approach_of(best), rival,
                                 approach_of(rival) if rival is not None else "", sure))
    return best_by_size


def verdict_markdown(trials: Sequence[Trial], size: str = "bytes") -> str:
    """The verdict as a table in Markdown."""
    show = human_bytes if size == "bytes" else (lambda count: f"{count / 1e6:.2f} million")
    lines = [f"| {size.replace('_', ' ')} | best | KL (nats per token) | perplexity | next best approach | its KL | sure |",
             "|---|---|---|---|---|---|---|"]

    def named(trial: Trial, approach: str) -> str:
        return f"{trial.name} ({approach}; {show(float(trial.measure(size) or 0))})"

    for best in verdicts(trials, size):
        span = show(best.smallest) if best.smallest == best.largest else f"{show(best.smallest)} to {show(best.largest)}"
        rival = "none was tried" if best.rival is None else named(best.rival, best.rival_approach)
        rival_loss = "" if best.rival is None else f"{_loss(best.rival):.3g} ± {_error(best.rival):.1g}"
        perplexity = best.trial.measure("perplexity")
        sure = "" if best.rival is None else "yes" if best.sure else "no"
        lines.append(f"| {span} | {named(best.trial, best.approach)} | {_loss(best.trial):.3g} ± {_error(best.trial):.1g} | "
                     f"{perplexity:.3f} | {rival} | {rival_loss} | {sure} |")
    return "\n".join(lines)


def _loss(trial: Trial) -> float:
    return float(trial.measures["full"]["kl"])


def _error(trial: Trial) -> float:
    return float(trial.measures["full"]["kl_error"])
