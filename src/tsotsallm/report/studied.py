"""The report on a study: its verdict, the front, every trial, the notebook, and how to run it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from tsotsallm.analysis.pictures import ALL_LAYERS, IMPORTANCE, ORIGINAL
from tsotsallm.errors import ReportError
from tsotsallm.files import Json
from tsotsallm.inspection import LayerMap, first_by
from tsotsallm.report import drawings
from tsotsallm.report.document import Block, Cell, Code, DataTable, Document, Glance, Number, Paragraph, Section
from tsotsallm.study.ledger import Ledger, Trial
from tsotsallm.study.study import Found, open_study
from tsotsallm.study.trial import values_of
from tsotsallm.study.verdict import approach_of, names_of, size_of, size_text, span_of, verdicts
from tsotsallm.units import human_seconds, plus_minus

Names = Mapping[int, str]
"""Number of a trial -> its recipe in words."""
LOSSES = ("kl", "perplexity", "loss")
DRAWN = 8
"""Recipes of the front that are drawn."""


def study_document(folder: Path) -> Document:
    """A report on the folder of a study; raises ReportError where it has no trial, StudyError where it cannot be read."""
    result = open_study(folder)
    ledger = Ledger(folder)
    try:
        study, notes = ledger.study() or {}, ledger.notes()
    finally:
        ledger.close()
    if not result.trials:
        raise ReportError(f"{folder} holds a study without a trial; run it first")
    size = size_of(result.objectives)
    loss = next((name for name in result.objectives if name in LOSSES), "kl")
    done = [trial for trial in result.trials if trial.status == "done"]
    seconds = sum(trial.facts.get("seconds", 0.0) for trial in result.trials)
    names = names_of(result.trials)
    took = human_seconds(seconds) + (f" and {energy:.3g} Wh" if (energy := _energy(result.trials)) else "")
    what = (f"A study of {study['model']}: {len(result.trials)} recipes tried, {len(done)} successfully, "
            f"{sum(trial.level == 'full' for trial in done)} evaluated fully; {len(result.front)} are on the front, where "
            f"no other recipe is better and as small. It took {took}.")
    glance = _glance(what, result, study, names, size, loss)
    sections = [Section("Verdict", _verdict(result, names, size)),
                Section("The front", _front(result, names, study, size, loss)),
                Section("What was done", _done(result, names)), Section("Every trial", [_trials(result, names, loss)])]
    if shown := _importance(result.trials):
        sections.append(Section("Layer importance", shown))
    sections += [Section("Notebook", _notebook(notes)), Section("How to reproduce it", _again(study))]
    return Document(f"{study['name']} on {study['model']}", glance, sections,
                    {"study": study, "trials": [trial.plain() for trial in result.trials]})


def _glance(what: str, result: Found, study: Mapping[str, Json], names: Names, size: str, loss: str) -> Glance:
    """The first screen: the two ends of the front, and how to make the recipe that loses least."""
    front = sorted(result.front, key=lambda trial: float(trial.measure(size) or 0))
    if not front:
        return Glance(what, "No recipe was evaluated fully yet.", "Not measured yet.", "tsotsallm study --help")
    first, last = front[0], front[-1]
    original = study.get("original", {}).get(size)

    def small(trial: Trial) -> str:
        share = f" ({float(trial.measure(size) or 0) / original:.0%} of the original)" if original else ""
        return f"{size_text(float(trial.measure(size) or 0), size)}{share}"

    def lost(trial: Trial) -> str:
        error = trial.measure(f"{loss}_error")
        return f"{plus_minus(float(trial.measure(loss) or 0), error)} with {names[trial.number]}"

    ends = [first] if first is last else [first, last]
    words = {"kl": "KL divergence from the original, nats per token", "perplexity": "perplexity",
             "loss": "loss, nats per token"}[loss]
    return Glance(what, f"On the front: {' to '.join(small(trial) for trial in ends)}.",
                  f"{words[0].upper() + words[1:]}: {'; '.join(lost(trial) for trial in ends)}.",
                  shlex.join(["tsotsallm", "compress", str(study["model"]), json.dumps(last.recipe), "-o", "result"])
                  + "\ntsotsallm chat result")


def _energy(trials: Sequence[Trial]) -> float:
    return sum(float(trial.facts.get("energy_wh") or 0.0) for trial in trials)


def _number(trial: Trial, name: str, spec: str = ".4g") -> Cell:
    error = trial.measure(f"{name}_error")
    return Number.of(trial.measure(name), spec, error=error)


def _verdict(result: Found, names: Names, size: str) -> list[Block]:
    rows: list[list[Cell]] = []
    for best in verdicts(result.trials, size):
        rival = best.rival
        rows.append([span_of(best, size), names[best.trial.number], _number(best.trial, "kl"),
                     _number(best.trial, "perplexity"),
                     "none was tried" if rival is None else names[rival.number],
                     "" if rival is None else _number(rival, "kl"), "" if rival is None else "yes" if best.sure else "no"])
    return [Paragraph("The best recipe in each class of sizes, and the best recipe of another approach in it. Where no "
                      "larger recipe is better, a class reaches up to the next one in which one is. A verdict is sure where "
                      "the difference is larger than twice its standard error."),
            DataTable("Which approach is best at which size", [size.replace("_", " "), "best", "KL, nats per token",
                                                               "perplexity", "next best approach", "its KL", "sure"], rows)]


def _front(result: Found, names: Names, study: Mapping[str, Json], size: str, loss: str) -> list[Block]:
    best = {trial.number for trial in result.front}
    scale = 1e6
    points = [drawings.Point(float(trial.measure(size) or 0) / scale, float(trial.measure(loss) or 0),
                             f"{trial.number}: {names[trial.number]}, {loss} {trial.measure(loss):.4g}, "
                             f"{size_text(float(trial.measure(size) or 0), size)}", trial.number in best,
                             float(trial.measure(f"{loss}_error") or 0), _kind(trial))
              for trial in result.trials if trial.level == "full" and trial.measure(loss) is not None]
    label = {"bytes": "megabytes", "parameters": "million parameters",
             "nonzero_parameters": "million nonzero parameters"}[size]
    words = {"kl": "KL divergence, nats per token", "perplexity": "perplexity", "loss": "loss, nats per token"}[loss]
    if not points:
        return [Paragraph("No trial was evaluated fully.")]
    blocks: list[Block] = [drawings.plane("front", points, label, words, "Every fully evaluated recipe; those of the front "
                                          "are filled and joined. Touch a point to see its recipe.")]
    rows: list[list[Cell]] = []
    for trial in sorted(result.front, key=lambda best: float(best.measure(size) or 0)):
        rows.append([f"{trial.number}: {names[trial.number]}", _number(trial, "kl"), _number(trial, "perplexity"),
                     Number.of(trial.measure("bytes"), ",.0f"), Number.of(trial.measure("nonzero_parameters"), ",.0f")])
        if any(other.measure("decode_tokens_per_s") for other in result.front):
            rows[-1].append(Number.of(trial.measure("decode_tokens_per_s"), ".1f"))
    blocks.append(DataTable("The front, from the smallest",
                            ["trial", "KL", "perplexity", "bytes", "not zero", "tokens/s"][:len(rows[0])], rows))
    return blocks + _published(result, names, study, size)


def _kind(trial: Trial) -> str:
    """The techniques of a recipe, for colours."""
    return " + ".join(part.partition(" ")[0] for part in approach_of(trial).split(" + "))


def _published(result: Found, names: Names, study: Mapping[str, Json], size: str) -> list[Block]:
    """The same recipes as published for another model: share of the size against growth of the perplexity."""
    published = study["spec"].get("published")
    original = study.get("original", {}).get(size)
    if not published or not original:
        return []
    points = [drawings.Point(share, ratio, f"published, {name}: {share:.0%} of the size, {ratio:.3g} times the perplexity",
                             kind=f"published: {published['about']}")
              for name, (share, ratio) in published["points"].items()]
    for trial in result.trials:
        before = trial.measures.get(trial.level, {}).get("reference_perplexity")
        if before and trial.measure(size):
            share, ratio = float(trial.measure(size) or 0) / original, float(trial.measure("perplexity") or 0) / before
            points.append(drawings.Point(share, ratio, f"here, {names[trial.number]}: {share:.0%} of the size, {ratio:.3g} "
                                         "times the perplexity", kind=f"here: {study['model']}"))
    return [drawings.plane("published", points, "share of the original's size", "perplexity relative to the original's",
                           "The same recipes on another model, as published, and here. Models and texts differ; compare how "
                           "steeply the loss rises.")]


def _done(result: Found, names: Names) -> list[Block]:
    blocks: list[Block] = []
    for trial in result.front[:DRAWN]:
        known = trial.facts.get("layers")
        if known:
            plan = LayerMap(known["layers"], tuple(known["runs"]), tuple(known["bits"]), known["ends"])
            blocks.append(drawings.layers(f"layers-{trial.number}", plan, f"Trial {trial.number}, {names[trial.number]}: "
                                          "colours show the bits per weight; × is removed, 2× runs twice."))
    if len(result.front) > DRAWN:
        blocks.append(Paragraph(f"{len(result.front) - DRAWN} more recipes of the front are not drawn."))
    return blocks or [Paragraph("The layers of the front's recipes were not recorded.")]


def _trials(result: Found, names: Names, loss: str) -> DataTable:
    best = {trial.number for trial in result.front}
    marks, rows = set(), []
    for place, trial in enumerate(result.trials):
        if trial.number in best:
            marks.add(place)
        values = values_of(trial.measures, [loss])
        row: list[Cell] = [f"{trial.number}: {names[trial.number]}", trial.error or trial.level,
                           _number(trial, "kl") if values else "",
                           _number(trial, "perplexity") if values else "", Number.of(trial.measure("bytes"), ",.0f"),
                           Number.of(trial.facts.get("seconds"), ".0f"), trial.reason]
        rows.append(row)
    header = ["trial", "evaluation", "KL", "perplexity", "bytes", "seconds", "why"]
    return DataTable(f"All {len(rows)} trials; those of the front are marked", header, rows, frozenset(marks), True)


def _importance(trials: Sequence[Trial]) -> list[Block]:
    known: dict[str, tuple[dict[str, float], Trial]] = {}
    for trial in trials:
        for metric, values in trial.facts.get("importance", {}).items():
            known.setdefault(metric, (values, trial))
    blocks: list[Block] = []
    for metric, (values, trial) in known.items():
        whole = trial.facts.get("importance_of_whole", {}).get(metric)     # older studies lack it
        blocks.append(drawings.by_place(f"importance-{metric}", values, "layer", IMPORTANCE[metric],
                                        f"Importance of the layers that may be removed, by {metric}, as measured for trial "
                                        f"{trial.number}{drawings.the_line(whole is not None)}.", baseline=whole,
                                        named=ORIGINAL if first_by(metric, trial.recipe) else ALL_LAYERS))
    return blocks


def _notebook(notes: Sequence[Mapping[str, object]]) -> list[Block]:
    rows: list[list[Cell]] = [[f"{note['cycle']}, {note['phase']}", str(note["text"])] for note in notes]
    return [DataTable("Plan, implement, revise, re-implement, cycle by cycle", ["cycle and phase", "note"], rows)]


def _again(study: Mapping[str, Json]) -> list[Block]:
    source = study["source"]["shards"]
    weights = ", ".join(f"{name} ({shard['sha256_of_ends'][:12]})" for name, shard in source.items())
    words = ["tsotsallm", "study", "study.yaml", "--model", str(study["model"]), "-o", "study"]
    spec = {key: value for key, value in study["spec"].items() if key != "published"}
    text = yaml.safe_dump(json.loads(json.dumps(spec)), sort_keys=False, default_flow_style=None, width=100)
    return [Code(f"The command, with the weights {weights}", shlex.join(words)), Code("study.yaml", text.strip(), long=True)]
