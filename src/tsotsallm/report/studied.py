"""The report on a study: its verdict, the front, every trial, the notebook, and how to run it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tsotsallm.errors import ReportError
from tsotsallm.inspection import LayerMap
from tsotsallm.report import drawings
from tsotsallm.report.document import Block, Cell, Code, Document, Number, Paragraph, Section, Table
from tsotsallm.study.ledger import Ledger, Trial
from tsotsallm.study.study import Found, open_study
from tsotsallm.study.trial import values_of
from tsotsallm.study.verdict import approach_of, size_of, verdicts
from tsotsallm.units import human_bytes, human_seconds

LOSSES = ("kl", "perplexity", "loss")
DRAWN = 8
"""Recipes of the front that are drawn."""


def study_document(folder: Path) -> Document:
    """A report on the folder of a study."""
    found = open_study(folder)
    ledger = Ledger(folder)
    try:
        study, notes = ledger.study() or {}, ledger.notes()
    finally:
        ledger.close()
    if not found.trials:
        raise ReportError(f"{folder} holds a study without a trial; run it first")
    size = size_of(found.objectives)
    loss = next((one for one in found.objectives if one in LOSSES), "kl")
    done = [trial for trial in found.trials if trial.status == "done"]
    seconds = sum(trial.facts.get("seconds", 0.0) for trial in found.trials)
    lead = (f"{len(found.trials)} recipes tried on {study['model']}, {len(done)} with success, "
            f"{sum(trial.level == 'full' for trial in done)} evaluated fully; {len(found.front)} are on the front. It took "
            f"{human_seconds(seconds)}" + (f" and {energy:.1f} Wh" if (energy := _energy(found.trials)) else "") + ".")
    sections = [Section("Verdict", _verdict(found, size)), Section("The front", _front(found, study, size, loss)),
                Section("What was done", _done(found)), Section("Every trial", [_trials(found, loss)])]
    if shown := _importance(found.trials):
        sections.append(Section("Layer importance", shown))
    sections += [Section("Notebook", _notebook(notes)), Section("How to do it again", _again(study))]
    return Document(f"{study['name']} on {study['model']}", lead, sections,
                    {"study": study, "trials": [trial.plain() for trial in found.trials]})


def _energy(trials: Sequence[Trial]) -> float:
    return sum(float(trial.facts.get("energy_wh") or 0.0) for trial in trials)


def _number(trial: Trial, name: str, spec: str = ".4f") -> Cell:
    error = trial.measure(f"{name}_error")
    return Number.of(trial.measure(name), spec, error=error)


def _verdict(found: Found, size: str) -> list[Block]:
    rows: list[list[Cell]] = []
    for one in verdicts(found.trials, size):
        span = _size(one.smallest, size) if one.smallest == one.largest else (
            f"{_size(one.smallest, size)} to {_size(one.largest, size)}")
        rival = one.rival
        rows.append([span, f"{one.trial.name} ({one.approach})", _number(one.trial, "kl"),
                     _number(one.trial, "perplexity", ".3f"),
                     "none was tried" if rival is None else f"{rival.name} ({one.rival_approach})",
                     "" if rival is None else _number(rival, "kl"), "" if rival is None else "yes" if one.sure else "no"])
    return [Paragraph("The best recipe in each class of sizes, and the best of another approach there. It is sure where the "
                      "difference is larger than twice its standard error."),
            Table("Which approach is best at which size", [size.replace("_", " "), "best", "KL, nats a token", "perplexity",
                                                           "next best approach", "its KL", "sure"], rows)]


def _size(value: float, size: str) -> str:
    return human_bytes(value) if size == "bytes" else f"{value / 1e6:.2f} million"


def _front(found: Found, study: Mapping[str, Any], size: str, loss: str) -> list[Block]:
    best = {trial.number for trial in found.front}
    scale = 1e6
    points = [drawings.Point(float(trial.measure(size) or 0) / scale, float(trial.measure(loss) or 0),
                             f"{trial.number}: {trial.name}, {loss} {trial.measure(loss):.4g}, "
                             f"{_size(float(trial.measure(size) or 0), size)}", trial.number in best,
                             float(trial.measure(f"{loss}_error") or 0), _kind(trial))
              for trial in found.trials if trial.level == "full" and trial.measure(loss) is not None]
    label = {"bytes": "megabytes", "parameters": "million parameters",
             "nonzero_parameters": "million parameters that are not zero"}[size]
    words = {"kl": "KL divergence, nats a token", "perplexity": "perplexity", "loss": "loss, nats a token"}[loss]
    if not points:
        return [Paragraph("No trial was evaluated fully.")]
    blocks: list[Block] = [drawings.plane("front", points, label, words, "Every fully evaluated recipe; filled and joined: "
                                          "the front. Touch a point to see which it is.")]
    rows: list[list[Cell]] = []
    for trial in sorted(found.front, key=lambda one: float(one.measure(size) or 0)):
        rows.append([f"{trial.number}: {trial.name}", _number(trial, "kl"), _number(trial, "perplexity", ".3f"),
                     Number.of(trial.measure("bytes"), ",.0f"), Number.of(trial.measure("nonzero_parameters"), ",.0f")])
        if any(one.measure("decode_tokens_per_s") for one in found.front):
            rows[-1].append(Number.of(trial.measure("decode_tokens_per_s"), ".1f"))
    blocks.append(Table(f"The front, from the smallest; hypervolume {found.hypervolume:.6g} up to "
                        f"{', '.join(f'{one:.4g}' for one in found.reference)}",
                        ["trial", "KL", "perplexity", "bytes", "not zero", "tokens/s"][:len(rows[0])], rows))
    return blocks + _published(found, study, size)


def _kind(trial: Trial) -> str:
    """The techniques of a recipe, for colours."""
    return " + ".join(part.partition(" ")[0] for part in approach_of(trial).split(" + "))


def _published(found: Found, study: Mapping[str, Any], size: str) -> list[Block]:
    """The same recipes as published of another model: share of the size against the factor of the perplexity."""
    published = study["spec"].get("published")
    original = study.get("original", {}).get(size)
    if not published or not original:
        return []
    points = [drawings.Point(share, ratio, f"published, {name}: {share:.0%} of the size, {ratio:.3g} times the perplexity",
                             kind=f"published: {published['about']}")
              for name, (share, ratio) in published["points"].items()]
    for trial in found.trials:
        before = trial.measures.get(trial.level, {}).get("reference_perplexity")
        if before and trial.measure(size):
            share, ratio = float(trial.measure(size) or 0) / original, float(trial.measure("perplexity") or 0) / before
            points.append(drawings.Point(share, ratio, f"here, {trial.name}: {share:.0%} of the size, {ratio:.3g} times "
                                         "the perplexity", kind=f"here: {study['model']}"))
    return [drawings.plane("published", points, "share of the original's size", "perplexity beside the original's",
                           "The same recipes on another model, as published, and here. Models and texts differ: what "
                           "compares is how steeply the loss rises.")]


def _done(found: Found) -> list[Block]:
    blocks: list[Block] = []
    for trial in found.front[:DRAWN]:
        known = trial.facts.get("layers")
        if known:
            plan = LayerMap(known["layers"], tuple(known["runs"]), tuple(known["bits"]), known["ends"])
            blocks.append(drawings.layers(f"layers-{trial.number}", plan, f"Trial {trial.number}, {trial.name}: colour "
                                          "tells the bits a weight; × is removed, 2× runs twice."))
    if len(found.front) > DRAWN:
        blocks.append(Paragraph(f"{len(found.front) - DRAWN} more recipes of the front are not drawn."))
    return blocks or [Paragraph("No recipe of the front is noted with its layers.")]


def _trials(found: Found, loss: str) -> Table:
    best = {trial.number for trial in found.front}
    marks, rows = set(), []
    for place, trial in enumerate(found.trials):
        if trial.number in best:
            marks.add(place)
        values = values_of(trial.measures, [loss])
        row: list[Cell] = [f"{trial.number}: {trial.name}", trial.error or trial.level,
                           _number(trial, "kl") if values else "",
                           _number(trial, "perplexity", ".3f") if values else "", Number.of(trial.measure("bytes"), ",.0f"),
                           Number.of(trial.facts.get("seconds"), ".0f"), trial.reason]
        rows.append(row)
    header = ["trial", "evaluation", "KL", "perplexity", "bytes", "seconds", "why"]
    return Table(f"All {len(rows)} trials; those of the front are marked", header, rows, frozenset(marks), True)


def _importance(trials: Sequence[Trial]) -> list[Block]:
    known: dict[str, tuple[dict[str, float], Trial]] = {}
    for trial in trials:
        for metric, values in trial.facts.get("importance", {}).items():
            known.setdefault(metric, (values, trial))
    blocks: list[Block] = []
    for metric, (values, trial) in known.items():
        blocks.append(drawings.bars(f"importance-{metric}", values, "layer", metric, "Importance of the layers that could "
                                    f"go, by {metric}, as measured for trial {trial.number}."))
    return blocks


def _notebook(notes: Sequence[Mapping[str, Any]]) -> list[Block]:
    rows: list[list[Cell]] = [[f"{note['cycle']}, {note['phase']}", note["text"]] for note in notes]
    return [Table("Plan, implement, revise, re-implement, cycle by cycle", ["cycle and phase", "what was noted"], rows)]


def _again(study: Mapping[str, Any]) -> list[Block]:
    source = study["source"]["shards"]
    told = ", ".join(f"{name} ({one['sha256_of_ends'][:12]})" for name, one in source.items())
    words = ["tsotsallm", "study", "study.yaml", "--model", str(study["model"]), "-o", "study"]
    spec = {key: value for key, value in study["spec"].items() if key != "published"}
    text = yaml.safe_dump(json.loads(json.dumps(spec)), sort_keys=False, default_flow_style=None, width=100)
    return [Code(f"The command, with the weights {told}", shlex.join(words)), Code("study.yaml", text.strip(), long=True)]
