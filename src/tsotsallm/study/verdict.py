"""What a study says: which approach is best at which size, and how sure that is; as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tsotsallm.study.ledger import Trial
from tsotsallm.units import human_bytes

SIZES = 6
"""The range of sizes is parted into so many classes, each larger than the one before by the same factor."""
SURE = 2.0


@dataclass(frozen=True)
class Best:
    """The best trial of a class of sizes, and the best of another approach there, if there is one.

    sure   whether the difference is larger than twice its standard error
    """

    smallest: float
    largest: float
    trial: Trial
    approach: str
    rival: Trial | None
    rival_approach: str
    sure: bool


def size_of(objectives: Sequence[str]) -> str:
    """The measure of size among a study's objectives; bytes where it has none."""
    return next((one for one in objectives if one in ("bytes", "parameters", "nonzero_parameters")), "bytes")


def approach_of(trial: Trial) -> str:
    """The techniques of a trial in their order, such as depth + sparsity + quantize q4_k."""
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
    """The best trial in each class of sizes, from the smallest; of full evaluations only."""
    known = [trial for trial in trials if trial.level == "full" and trial.measure(size)]
    if not known:
        return []
    low, high = (pick(float(trial.measure(size) or 0) for trial in known) for pick in (min, max))
    count = SIZES if high > low * 1.01 else 1
    edges = [low * (high / low) ** (place / count) for place in range(count + 1)]
    found = []
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
        found.append(Best(min(sizes), max(sizes), best, approach_of(best), rival,
                          approach_of(rival) if rival is not None else "", sure))
    return found


def verdict_markdown(trials: Sequence[Trial], size: str = "bytes") -> str:
    """The verdict as a table in Markdown."""
    show = human_bytes if size == "bytes" else (lambda count: f"{count / 1e6:.2f} million")
    lines = [f"| {size.replace('_', ' ')} | best | KL (nats a token) | perplexity | next best approach | its KL | sure |",
             "|---|---|---|---|---|---|---|"]
    for one in verdicts(trials, size):
        span = show(one.smallest) if one.smallest == one.largest else f"{show(one.smallest)} to {show(one.largest)}"
        def named(trial: Trial, approach: str) -> str:
            return f"{trial.name} ({approach}; {show(float(trial.measure(size) or 0))})"

        rival = "none was tried" if one.rival is None else named(one.rival, one.rival_approach)
        rival_loss = "" if one.rival is None else f"{_loss(one.rival):.3g} ± {_error(one.rival):.1g}"
        perplexity = one.trial.measure("perplexity")
        sure = "" if one.rival is None else "yes" if one.sure else "no"
        lines.append(f"| {span} | {named(one.trial, one.approach)} | {_loss(one.trial):.3g} ± {_error(one.trial):.1g} | "
                     f"{perplexity:.3f} | {rival} | {rival_loss} | {sure} |")
    return "\n".join(lines)


def _loss(trial: Trial) -> float:
    return float(trial.measures["full"]["kl"])


def _error(trial: Trial) -> float:
    return float(trial.measures["full"]["kl_error"])
