"""Which layers a model keeps: asked once, journaled, shared with recipes that ask the same."""

from __future__ import annotations

import shutil
from typing import Any

from tsotsallm.checkpoint.view import View
from tsotsallm.run.work import Work, plain_stages
from tsotsallm.stages.contract import LayerChoice, LayerEdit, Workplace


def choose(work: Work, number: int, place: int, choice: LayerChoice | LayerEdit, view: View) -> list[int]:
    """The order of layers that a choice makes of a view, now or before an interruption."""
    for entry in work.journal.find("choice", number):
        if entry["place"] == place:
            break
    else:
        scratch = work.scratch / "choice"
        tick = work.tick(number)
        shared = work.key(plain_stages(work.sweeps[number].choices[:place]), choice.measured_by, sweeps=number)
        noted = work.measured(shared) | {
            note["key"]: note["value"] for note in work.journal.find("note", number) if note["place"] == place}

        def note(key: str, value: float, noted: dict[str, Any] = noted) -> None:
            noted[key] = value
            work.journal.add(kind="note", sweep=number, place=place, key=key, value=value)

        made = choice.choose(view, Workplace(work.corpus, scratch, work.device, tick, dict(noted), note))
        work.share(shared, noted)
        if scratch.exists():
            shutil.rmtree(scratch)
        entry = {"order": made.order, "reasons": made.reasons}
        work.journal.add(kind="choice", sweep=number, place=place, **entry)
    if isinstance(choice, LayerChoice) or entry["reasons"]:
        work.reasons.append({"stage": choice.name, "order": entry["order"], **entry["reasons"]})
    return list(entry["order"])
