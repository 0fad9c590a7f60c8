"""The report on one result, or on several side by side: what was done, what was lost, what it costs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.evaluation.cost import Cost
from tsotsallm.evaluation.examination import Examination
from tsotsallm.inspection import importance_in, inspect_checkpoint, layer_map
from tsotsallm.report import drawings
from tsotsallm.report.document import Block, Cell, Code, Document, Number, Paragraph, Samples, Section, Table
from tsotsallm.units import human_bytes

PROTOCOL = {"protocol": "text in", "context": "tokens of a window", "shots": "examples before each question",
            "max_new_tokens": "new tokens at most", "limit": "limit", "seed": "seed", "data_sha256": "data",
            "reference": "against"}
"""What is told of how tasks were asked -> its name."""


def result_document(models: Mapping[str, str], examinations: Sequence[Examination],
                    samples: Samples | None = None) -> Document:
    """A report on models by the names to show; where there are several, differences are to the first."""
    checkpoints = {name: Checkpoint.open(model) for name, model in models.items()}
    results = {name: one for name, one in checkpoints.items() if one.provenance is not None}
    last = list(checkpoints.values())[-1]
    first = inspect_checkpoint(next(iter(checkpoints.values())))
    anatomy = inspect_checkpoint(last)
    lead = (f"{human_bytes(anatomy.bytes)} of weights, {anatomy.parameters / 1e6:.1f} million parameters, {anatomy.layers} "
            "layers" + (f"; {anatomy.bytes / first.bytes:.0%} of the original's bytes." if len(models) > 1 else "."))
    if len(models) > 2:
        lead = f"{len(models)} models side by side; differences are to {next(iter(models))}."
    sections = [Section("What was done", _done(results))]
    if examinations:
        sections.append(Section("What was lost", lost_blocks(list(models), examinations)))
    costs = examinations[0].costs if examinations else ()
    sections.append(Section("What it costs", _costs(checkpoints, costs)))
    if shown := _importance(results):
        sections.append(Section("Layer importance", shown))
    if samples is not None:
        sections.append(Section("What they write", [Paragraph("The likeliest continuation, token by token."), samples]))
    sections.append(Section("How to do it again", [command for name, one in results.items()
                                                   for command in _commands(name, one.provenance or {})]
                            or [Paragraph("No model here is a result of a recipe.")]))
    title = " and ".join(results or models) if len(results or models) < 3 else f"{len(models)} models compared"
    return Document(title, lead, sections, {"examinations": [one.plain() for one in examinations],
                                            "provenance": {name: one.provenance for name, one in results.items()}})


def _done(results: Mapping[str, Checkpoint]) -> list[Block]:
    blocks: list[Block] = []
    for number, (name, one) in enumerate(results.items()):
        provenance = one.provenance or {}
        blocks.append(drawings.layers(f"layers-{number}", layer_map(one), f"The layers of {name}: colour tells the bits a "
                                      "weight; × is removed, 2× runs twice."))
        blocks.append(Code(f"The recipe of {name}", _as_yaml(provenance["recipe"])))
        blocks += [Paragraph(note) for note in provenance.get("notes", [])]
    return blocks or [Paragraph("These are checkpoints as they were found; no recipe was applied.")]


def _as_yaml(recipe: Any) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100).strip()


def lost_blocks(models: Sequence[str], examinations: Sequence[Examination]) -> list[Block]:
    """Scores of every model with their errors, and differences to the first with their paired 95% intervals."""
    blocks: list[Block] = []
    shown = [one for found in examinations for one in found.comparisons if not one.group]
    rows: list[list[Cell]] = []
    for one in shown:
        scale, unit = (100.0, " %") if one.share else (1.0, "")
        spec = ".1f" if one.share else ".4g"
        row: list[Cell] = [f"{one.task}: {one.measure}", str(one.items)]
        for score, difference in zip(one.scores, one.differences, strict=True):
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
    blocks.append(Table("Scores with standard errors; differences with paired 95% intervals, ≈ where within noise", header,
                        rows))
    for found in examinations:
        for row_of_task in found.results:
            protocol = row_of_task[0].protocol
            told = ", ".join(f"{name} {protocol[key]}" for key, name in PROTOCOL.items() if protocol.get(key) is not None)
            blocks.append(Paragraph(f"Protocol of {row_of_task[0].task}: {told}."))
    return blocks


def _costs(checkpoints: Mapping[str, Checkpoint], costs: Sequence[Cost]) -> list[Block]:
    sizes = {name: inspect_checkpoint(one).bytes_by_part for name, one in checkpoints.items()}
    blocks: list[Block] = [drawings.bytes_by_part("bytes", sizes, "Bytes of the weights by part.")]
    if not costs:
        return blocks

    def line(name: str, values: Sequence[float | None], spec: str = ".4g", unit: str = "") -> list[Cell]:
        return [name, *(Number.of(value, spec, unit=unit) for value in values)]

    rows: list[list[Cell]] = [
        line("bytes on disk", [one.disk_bytes for one in costs], ",.0f"),
        line("parameters", [one.parameters for one in costs], ",.0f"),
        line("of which not zero", [one.nonzero_parameters for one in costs], ",.0f"),
        line("cache, bytes a token", [one.kv_cache_bytes_per_token for one in costs], ",.0f"),
        line("multiply-accumulates, a prompt of 512", [one.prefill_512_macs for one in costs]),
        line("multiply-accumulates, a new token after it", [one.decode_after_512_macs for one in costs])]
    speeds = [one.speed for one in costs]
    if any(speeds):
        rows += [line("prompt tokens a second", [one.prefill_tokens_per_s if one else None for one in speeds], ".1f"),
                 line("new tokens a second", [one.decode_tokens_per_s if one else None for one in speeds], ".1f"),
                 line("peak memory, bytes", [one.peak_rss_bytes if one else None for one in speeds], ",.0f")]
    energies = [one.energy if one else None for one in speeds]
    if any(energies):
        rows += [line("Wh, 1000 prompt tokens", [one.prefill_wh_per_1000_tokens if one else None for one in energies]),
                 line("Wh, 1000 new tokens", [one.decode_wh_per_1000_tokens if one else None for one in energies])]
    rows.append(["fits", *(", ".join(name for name, holds in one.fits.items() if holds) or "none of the target devices"
                           for one in costs)])
    blocks.append(Table("What each costs", ["", *checkpoints], rows))
    for energy in [one for one in energies if one is not None][:1]:
        blocks.append(Paragraph(f"Energy is {energy.label}; electricity of {energy.country}: "
                                f"{energy.carbon_g_per_kwh:.0f} g CO₂ a kWh."))
    return blocks


def _importance(results: Mapping[str, Checkpoint]) -> list[Block]:
    blocks: list[Block] = []
    for number, (name, one) in enumerate(results.items()):
        gone = set(range(layer_map(one).layers)) - set(layer_map(one).runs)
        for metric, values in importance_in(one.provenance or {}).items():
            blocks.append(drawings.bars(f"importance-{number}-{metric}", values, "layer", metric,
                                        f"Importance of the layers that could go, for {name}, by {metric}; marked: removed.",
                                        marked=[str(layer) for layer in sorted(gone)]))
    return blocks


def _commands(name: str, provenance: Mapping[str, Any]) -> list[Code]:
    recipe = _as_yaml(provenance["recipe"])
    text = provenance.get("calibration") or {}
    words = ["tsotsallm", "compress", str(provenance["source"]), "recipe.yaml", "-o", name.replace(" ", "-")]
    if "window" in text:
        words += ["--windows", str(text["windows"]), "--window", str(text["window"]), "--seed", str(text["seed"])]
        words += ["--calibration", str(text["given"])] if text["given"] else []
    machine = provenance["inputs"]["machine"]
    told = ", ".join(f"{key} {value}" for key, value in machine.items())
    return [Code(f"{name}: recipe.yaml", recipe), Code(f"{name}: with the weights {_digest(provenance)}; {told}",
                                                       shlex.join(words))]


def _digest(provenance: Mapping[str, Any]) -> str:
    shards = provenance["inputs"]["source"]["shards"]
    return ", ".join(f"{name} ({one['sha256_of_ends'][:12]})" for name, one in shards.items())
