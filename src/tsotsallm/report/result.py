"""The report on one result, or on several side by side: the recipe, the losses and the cost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import yaml

from tsotsallm.checkpoint.provenance import Provenance, Stages
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.evaluation.cost import Cost
from tsotsallm.evaluation.examination import Examination
from tsotsallm.inspection import importance_in, inspect_checkpoint, layer_map
from tsotsallm.report import drawings
from tsotsallm.report.document import Block, Cell, Code, DataTable, Document, Number, Paragraph, Section, TextSamples
from tsotsallm.units import human_bytes

PROTOCOL = {"protocol": "text in", "context": "tokens per window", "shots": "examples before each question",
            "max_new_tokens": "new tokens up to", "limit": "limit", "seed": "seed", "data_sha256": "data",
            "reference": "against"}
"""Keys of a task's protocol that the report shows -> their names."""


def result_document(models: Mapping[str, str], examinations: Sequence[Examination],
                    samples: TextSamples | None = None) -> Document:
    """A report on models by the names to show; where there are several, differences are from the first."""
    checkpoints = {name: Checkpoint.open(model) for name, model in models.items()}
    results = {name: checkpoint for name, checkpoint in checkpoints.items() if checkpoint.provenance is not None}
    last = list(checkpoints.values())[-1]
    first = inspect_checkpoint(next(iter(checkpoints.values())))
    anatomy = inspect_checkpoint(last)
    lead = (f"{human_bytes(anatomy.bytes)} of weights, {anatomy.parameters / 1e6:.1f} million parameters, {anatomy.layers} "
            "layers" + (f"; {anatomy.bytes / first.bytes:.0%} of the original's bytes." if len(models) > 1 else "."))
    if len(models) > 2:
        lead = f"{len(models)} models side by side; differences are from {next(iter(models))}."
    sections = [Section("What was done", _done(results))]
    if examinations:
        sections.append(Section("What was lost", lost_blocks(list(models), examinations)))
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
    return Document(title, lead, sections, {"examinations": [examination.plain() for examination in examinations],
                                            "provenance": {
        name: result.provenance.plain() for name, result in results.items() if result.provenance is not None}})


def _done(results: Mapping[str, Checkpoint]) -> list[Block]:
    blocks: list[Block] = []
    for number, (name, result) in enumerate(results.items()):
        blocks.append(drawings.layers(f"layers-{number}", layer_map(result), f"The layers of {name}: colours show the bits "
                                      "per weight; × is removed, 2× runs twice."))
        if (provenance := result.provenance) is not None:
            blocks.append(Code(f"The recipe of {name}", _as_yaml(provenance.recipe)))
            blocks += [Paragraph(note) for note in provenance.notes]
    return blocks or [Paragraph("These are original checkpoints; no recipe was applied.")]


def _as_yaml(recipe: Stages) -> str:
    return yaml.safe_dump(list(recipe), sort_keys=False, default_flow_style=None, width=100).strip()


def lost_blocks(models: Sequence[str], examinations: Sequence[Examination]) -> list[Block]:
    """Scores of every model with their errors, and differences from the first with their paired 95% intervals."""
    blocks: list[Block] = []
    shown = [comparison for examination in examinations for comparison in examination.comparisons if not comparison.group]
    rows: list[list[Cell]] = []
    for comparison in shown:
        scale, unit = (100.0, " %") if comparison.share else (1.0, "")
        spec = ".1f" if comparison.share else ".4g"
        row: list[Cell] = [f"{comparison.task}: {comparison.measure}", str(comparison.items)]
        for score, difference in zip(comparison.scores, comparison.differences, strict=True):
            error = None if score.standard_error is None else scale * score.standard_error
            row.append(Number(score.value, f"{scale * score.value:{spec}}{unit}",
                              "" if error is None else f" ± {error:{spec}}"))
            if difference is not None:
                mark = "≈ " if difference.within_noise else ""
                row.append(Number(difference.value, f"{mark}{scale * difference.value:+{spec}}",
                                  f" [{scale * difference.low:{spec}}, {scale * difference.high:{spec}}]"))
        rows.append(row)
    header = ["measure", "items", models[0]]
    for name in models[1:]:
        header += [name, f"{name} − {models[0]}"]
    blocks.append(DataTable("Scores with standard errors; differences with paired 95% intervals, ≈ where within noise",
                            header, rows))
    for examination in examinations:
        for row_of_task in examination.results:
            protocol = row_of_task[0].protocol
            listed = ", ".join(f"{name} {protocol[key]}" for key, name in PROTOCOL.items() if protocol.get(key) is not None)
            blocks.append(Paragraph(f"Protocol of {row_of_task[0].task}: {listed}."))
    return blocks


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
                 line("Wh, 1000 new tokens", [energy.decode_wh_per_1000_tokens if energy else None for energy in energies])]
    rows.append(["fits", *(", ".join(name for name, holds in cost.fits.items() if holds) or "none of the target devices"
                           for cost in costs)])
    blocks.append(DataTable("What each costs", ["", *checkpoints], rows))
    if (known := next((energy for energy in energies if energy is not None), None)) is not None:
        blocks.append(Paragraph(f"Energy is {known.label}; electricity of {known.country}: "
                                f"{known.carbon_g_per_kwh:.0f} g CO₂ per kWh."))
    return blocks


def _importance(results: Mapping[str, Checkpoint]) -> list[Block]:
    blocks: list[Block] = []
    for number, (name, result) in enumerate(results.items()):
        gone = set(range(layer_map(result).layers)) - set(layer_map(result).runs)
        for metric, values in importance_in(result.provenance).items():
            blocks.append(drawings.bars(f"importance-{number}-{metric}", values, "layer", metric,
                                        f"Importance of the layers of {name} that may be removed, by {metric}; marked: "
                                        "removed.", marked=[str(layer) for layer in sorted(gone)]))
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
    return [Code(f"{name}: recipe.yaml", _as_yaml(provenance.recipe)),
            Code(f"{name}: with the weights {digest}; {on_machine}", shlex.join(words))]
