"""The report on one result, or on several side by side: the recipe, the losses and the cost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import yaml

from tsotsallm.analysis.pictures import ALL_LAYERS, IMPORTANCE, ORIGINAL
from tsotsallm.checkpoint.provenance import Provenance, Stages
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.evaluation.cost import Cost
from tsotsallm.evaluation.energy import ANSWERS_A_DAY
from tsotsallm.evaluation.examination import Examination
from tsotsallm.evaluation.results import Comparison, Exchange, TaskResult
from tsotsallm.inspection import first_by, importance_in, inspect_checkpoint, layer_map, whole_in
from tsotsallm.report import drawings
from tsotsallm.report.document import Block, Cell, Code, DataTable, Document, Glance, Number, Paragraph, Section, TextSamples
from tsotsallm.study.verdict import recipe_in_words
from tsotsallm.units import human_bytes, plus_minus

PROTOCOL = {"protocol": "text in", "context": "tokens per window", "shots": "examples before each question",
            "max_new_tokens": "new tokens up to", "limit": "limit", "seed": "seed", "data_sha256": "data",
            "reference": "against"}
"""Keys of a task's protocol that the report shows -> their names."""
LOSSES = ("KL from reference", "perplexity")
"""Measures of the headline."""
NOT_MEASURED = "Not measured here; `tsotsallm report` with --reference and --text measures it."
LONG_RECIPE = 30
"""Lines of a recipe above which it is folded."""
SIDE_BY_SIDE = 3
"""Most models that have a column each; of more, every model has a row for each measure."""


def result_document(models: Mapping[str, str], examinations: Sequence[Examination],
                    samples: TextSamples | None = None) -> Document:
    """A report on models by the names to show; where there are several, differences are from the first."""
    checkpoints = {name: Checkpoint.open(model) for name, model in models.items()}
    results = {name: checkpoint for name, checkpoint in checkpoints.items() if checkpoint.provenance is not None}
    glance = _glance(models, checkpoints, examinations)
    sections = [Section("What was done", _done(results))]
    if examinations:
        sections.append(Section("What was lost", lost_blocks(list(models), examinations)))
        sections += answered_sections(list(models), examinations)
    costs = examinations[0].costs if examinations else ()
    sections.append(Section("What it costs", _costs(checkpoints, costs)))
    if shown := _importance(results):
        sections.append(Section("Layer importance", shown))
    if samples is not None:
        sections.append(Section("What they write", [Paragraph("The likeliest continuation, token by token."), samples]))
    sections.append(Section("How to reproduce it", [command for name, result in results.items()
                                                    for command in _commands(name, result.provenance)]
                            or [Paragraph("None of these models is the result of a recipe.")]))
    title = " and ".join(results or models) if len(results or models) < 3 else f"{len(models)} models compared"
    return Document(title, glance, sections, {"examinations": [examination.plain() for examination in examinations],
                                            "provenance": {
        name: result.provenance.plain() for name, result in results.items() if result.provenance is not None}})


def _glance(models: Mapping[str, str], checkpoints: Mapping[str, Checkpoint], examinations: Sequence[Examination]) -> Glance:
    """The first screen: of one model, of one beside its original, or of several."""
    sizes = [inspect_checkpoint(checkpoint) for checkpoint in checkpoints.values()]
    first, last = sizes[0], sizes[-1]
    small = (f"{human_bytes(last.bytes)} of weights, {last.parameters / 1e6:.1f} million parameters, {last.layers} layers"
             + (f"; {last.bytes / first.bytes:.0%} of the original's bytes." if len(models) == 2 else "."))
    if len(models) > 2:
        least, most = min(one.bytes for one in sizes), max(one.bytes for one in sizes)
        return Glance(f"{len(models)} models side by side: {', '.join(models)}. Differences are from {next(iter(models))}.",
                      f"From {human_bytes(least)} to {human_bytes(most)} of weights.",
                      _losses_in_words(list(models), examinations) or NOT_MEASURED,
                      shlex.join(["tsotsallm", "serve", *models.values()]))
    *_, (name, path) = models.items()
    made = checkpoints[name].provenance
    what = "An original checkpoint; no recipe was applied." if made is None else (
        f"{made.source}, made smaller: {recipe_in_words(made.recipe)}.")
    return Glance(what, small, (_loss_in_words(examinations) if len(models) == 2 else "") or NOT_MEASURED,
                  shlex.join(["tsotsallm", "chat", path]))


def _losses_in_words(models: Sequence[str], examinations: Sequence[Examination]) -> str:
    """KL divergence of every model from the first; empty where it was not measured."""
    scores = next((comparison.scores for examination in examinations for comparison in examination.comparisons
                   if not comparison.group and comparison.measure == "KL from reference"), ())
    shown = [f"{name} {plus_minus(score.value, score.standard_error)}" for name, score in zip(models, scores, strict=False)
             if score.value]
    return f"KL divergence from {models[0]}, nats per token: {'; '.join(shown)}." if shown else ""


def _loss_in_words(examinations: Sequence[Examination]) -> str:
    """What the last model lost against the first on a text; empty where no text was evaluated."""
    found = {comparison.measure: comparison.scores for examination in examinations
             for comparison in examination.comparisons if not comparison.group and comparison.measure in LOSSES}
    words = []
    if "KL from reference" in found:
        score = found["KL from reference"][-1]
        words.append(f"KL divergence from the original {plus_minus(score.value, score.standard_error)} nats per token")
    if "perplexity" in found:
        first, last = found["perplexity"][0], found["perplexity"][-1]
        words.append(f"perplexity {first.value:.4g} before and {last.value:.4g} after")
    return f"Measured loss: {'; '.join(words)}." if words else ""


def _done(results: Mapping[str, Checkpoint]) -> list[Block]:
    blocks: list[Block] = []
    for number, (name, result) in enumerate(results.items()):
        blocks.append(drawings.layers(f"layers-{number}", layer_map(result), f"The layers of {name}: colours show the bits "
                                      "per weight; × is removed, 2× runs twice."))
        if (provenance := result.provenance) is not None:
            recipe = _as_yaml(provenance.recipe)
            blocks.append(Code(f"The recipe of {name}, as recipe.yaml", recipe, long=recipe.count("\n") > LONG_RECIPE))
            blocks += [Paragraph(note) for note in provenance.notes]
    return blocks or [Paragraph("These are original checkpoints; no recipe was applied.")]


def _as_yaml(recipe: Stages) -> str:
    return yaml.safe_dump(list(recipe), sort_keys=False, default_flow_style=None, width=100).strip()


def lost_blocks(models: Sequence[str], examinations: Sequence[Examination]) -> list[Block]:
    """Scores of every model with their errors, and differences from the first with their paired 95% intervals."""
    blocks: list[Block] = []
    shown = [comparison for examination in examinations for comparison in examination.comparisons if not comparison.group]
    wide = len(models) <= SIDE_BY_SIDE
    rows: list[list[Cell]] = []
    for comparison in shown:
        row: list[Cell] = [f"{comparison.task}: {comparison.measure}", str(comparison.items)]
        for name, (score, difference) in zip(models, _score_cells(comparison), strict=True):
            if not wide:
                rows.append([row[0], name, score, difference])
            row += [score, *([difference] if name != models[0] else [])]
        if wide:
            rows.append(row)
    header = ["measure", "items", models[0]]
    for name in models[1:]:
        header += [name, f"{name} − {models[0]}"]
    if not wide:
        header = ["measure", "model", "score", f"difference from {models[0]}"]
    blocks.append(DataTable("Scores with standard errors; differences with paired 95% intervals, ≈ where within noise",
                            header, rows))
    for examination in examinations:
        for row_of_task in examination.results:
            protocol = row_of_task[0].protocol
            listed = ", ".join(f"{name} {protocol[key]}" for key, name in PROTOCOL.items() if protocol.get(key) is not None)
            blocks.append(Paragraph(f"Protocol of {row_of_task[0].task}: {listed}."))
    return blocks


def answered_sections(models: Sequence[str], examinations: Sequence[Examination]) -> list[Section]:
    """What every model answered to instructions, side by side: how often it went wrong, by kind, then every answer."""
    sections = []
    for row in (row for examination in examinations for row in examination.results if row[0].exchanges):
        by_model = dict(zip(models, row, strict=True))
        kinds = list(dict.fromkeys(row[0].groups)) if len(set(row[0].groups)) > 1 else []
        header, rows, whole = _shares_by_kind(models, row, kinds)
        samples = TextSamples([one.prompt for one in row[0].exchanges],
                              {model: [one.reply for one in result.exchanges] for model, result in by_model.items()},
                              {model: [_remark(one) for one in result.exchanges] for model, result in by_model.items()})
        sections.append(Section(f"What they answer: {row[0].task}", [
            Paragraph("Greedy answers in the chat template, each cut off where it had not ended by itself. Whether an "
                      "answer is true is not judged."),
            DataTable("Share of the answers, by kind", header, rows, marks=frozenset(range(whole))), samples]))
    return sections


def _shares_by_kind(models: Sequence[str], results: Sequence[TaskResult],
                    kinds: Sequence[str]) -> tuple[list[str], list[list[Cell]], int]:
    """Header and rows of the shares of answers, of all kinds together in the first rows, and how many those are.

    There is a column for each measure and model, or a row for each kind and model where there are many.
    """
    measures = [measure.name for measure in results[0].measures if measure.share]

    def shares(result: TaskResult, kind: str) -> list[Cell]:
        of = {score.measure: score for score in result.scores if score.group == kind}
        return [Number.share(of[name].value, of[name].standard_error) if name in of else "" for name in measures]

    cells = {kind: [shares(result, kind) for result in results] for kind in ("", *kinds)}
    if len(models) > SIDE_BY_SIDE:
        return ["kind of instruction", "model", *measures], [
            [kind or "all", model, *values] for kind, of_kind in cells.items()
            for model, values in zip(models, of_kind, strict=True)], len(models)
    return ["kind of instruction", *(f"{model}: {name}" for name in measures for model in models)], [
        [kind or "all", *(values[place] for place in range(len(measures)) for values in of_kind)]
        for kind, of_kind in cells.items()], 1


def _remark(exchange: Exchange) -> str:
    """What is wrong with an answer, in a few words."""
    found = [words for name, wrong, words in (("stops", 0.0, "does not end"), ("repeats", 1.0, "repeats itself"),
                                              ("follows", 0.0, "not the form that was asked for"))
             if exchange.features[name] == wrong]
    return ", ".join(found)


def _score_cells(comparison: Comparison) -> list[tuple[Cell, Cell]]:
    """Of every model: its score with its error, and its difference from the first with its interval."""
    cells: list[tuple[Cell, Cell]] = []
    for score, difference in zip(comparison.scores, comparison.differences, strict=True):
        shown: Cell = Number.share(score.value, score.standard_error) if comparison.share else Number.of(
            score.value, error=score.standard_error)
        cells.append((shown, "" if difference is None else Number.difference(
            difference.value, difference.low, difference.high, scale=100.0 if comparison.share else 1.0,
            mark="≈ " if difference.within_noise else "")))
    return cells


def _costs(checkpoints: Mapping[str, Checkpoint], costs: Sequence[Cost]) -> list[Block]:
    sizes = {name: inspect_checkpoint(checkpoint).bytes_by_part for name, checkpoint in checkpoints.items()}
    blocks: list[Block] = [drawings.bytes_by_part("bytes", sizes, "Bytes of the weights by part.")]
    if not costs:
        return blocks

    def line(name: str, values: Sequence[float | None], spec: str = ".4g", unit: str = "") -> list[Cell]:
        return [name, *(Number.of(value, spec, unit=unit) for value in values)]

    rows: list[list[Cell]] = [
        line("bytes on disk", [cost.disk_bytes for cost in costs], ",.0f"),
        line("parameters", [cost.parameters for cost in costs], ",.0f"),
        line("of which not zero", [cost.nonzero_parameters for cost in costs], ",.0f"),
        line("cache, bytes per token", [cost.kv_cache_bytes_per_token for cost in costs], ",.0f"),
        line("multiply-accumulates, prompt of 512 tokens", [cost.prefill_512_macs for cost in costs]),
        line("multiply-accumulates, one new token after it", [cost.decode_after_512_macs for cost in costs])]
    speeds = [cost.speed for cost in costs]
    if any(speeds):
        rows += [line("prompt tokens per second", [speed.prefill_tokens_per_s if speed else None for speed in speeds],
                      ".1f"),
                 line("new tokens per second", [speed.decode_tokens_per_s if speed else None for speed in speeds], ".1f"),
                 line("peak memory, bytes", [speed.peak_rss_bytes if speed else None for speed in speeds], ",.0f")]
    energies = [speed.energy if speed else None for speed in speeds]
    if any(energies):
        rows += [line("Wh, 1000 prompt tokens", [energy.prefill_wh_per_1000_tokens if energy else None
                                                 for energy in energies]),
                 line("Wh, 1000 new tokens", [energy.decode_wh_per_1000_tokens if energy else None for energy in energies]),
                 line(f"kWh, a year of {ANSWERS_A_DAY} answers a day", [energy.year_kwh if energy else None
                                                                        for energy in energies])]
    rows.append(["fits", *(", ".join(name for name, holds in cost.fits.items() if holds) or "none of the target devices"
                           for cost in costs)])
    header = ["", *checkpoints]
    if len(checkpoints) > SIDE_BY_SIDE:
        header, *rows = [list(column) for column in zip(*([header, *rows]), strict=True)]
    blocks.append(DataTable("What each costs", [str(name) for name in header], rows))
    if (known := next((energy for energy in energies if energy is not None), None)) is not None:
        blocks.append(Paragraph(f"Energy is {known.label}; electricity of {known.country}: "
                                f"{known.carbon_g_per_kwh:.0f} g CO₂ per kWh. An answer is {next(iter(known.query_wh))}."))
    return blocks


def _importance(results: Mapping[str, Checkpoint]) -> list[Block]:
    blocks: list[Block] = []
    for number, (name, result) in enumerate(results.items()):
        gone = set(range(layer_map(result).layers)) - set(layer_map(result).runs)
        made, whole = result.provenance, whole_in(result.provenance)
        for metric, values in importance_in(made).items():
            original = made is not None and made.ancestry is None and first_by(metric, made.recipe)
            blocks.append(drawings.by_place(f"importance-{number}-{metric}", values, "layer", IMPORTANCE[metric],
                                        f"Importance of the layers of {name} that may be removed, by {metric}; marked: "
                                        f"removed{drawings.the_line(metric in whole)}.",
                                        marked=[str(layer) for layer in sorted(gone)], baseline=whole.get(metric),
                                        named=ORIGINAL if original else ALL_LAYERS))
    return blocks


def _commands(name: str, provenance: Provenance | None) -> list[Code]:
    if provenance is None or provenance.inputs is None:
        return []
    text = provenance.calibration
    words = ["tsotsallm", "compress", provenance.source, "recipe.yaml", "-o", name.replace(" ", "-")]
    if text is not None and text.window is not None:
        words += ["--windows", str(text.windows), "--window", str(text.window), "--seed", str(text.seed)]
        words += ["--calibration", text.given] if text.given else []
    on_machine = ", ".join(f"{key} {value}" for key, value in provenance.inputs.machine.items())
    digest = ", ".join(f"{name} ({shard.sha256_of_ends[:12]})" for name, shard in provenance.inputs.source.shards.items())
    return [Code(f"{name}: with recipe.yaml from above and the weights {digest}; {on_machine}", shlex.join(words))]
