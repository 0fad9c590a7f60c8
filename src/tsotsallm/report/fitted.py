"""The report on a fit: the model found, what units cost, what was expected of every candidate and what it is."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsotsallm.errors import ReportError
from tsotsallm.evaluation.examination import Examination
from tsotsallm.files import read_json
from tsotsallm.report import drawings
from tsotsallm.report.document import Block, Code, Document, Number, Paragraph, Samples, Section, Table
from tsotsallm.report.result import result_document
from tsotsallm.units import human_bytes


def fit_document(folder: Path, examinations: Sequence[Examination], samples: Samples | None = None) -> Document:
    """A report on the folder of a fit."""
    fit = read_json(folder / "fit.json", ReportError)
    best, target = fit["best"], fit["target"]
    inner = result_document({str(fit["model"]): str(fit["model"]), "fitted": str(folder / "model")}, examinations, samples)
    wanted = f"{target['bytes']:,} bytes" + (f" ({target['device']})" if target["device"] else "") + (
        f", faster than {target['faster_than']} tokens a second" if target["faster_than"] else "")
    lead = (f"The best model found for {wanted}: {best['structure']}, {human_bytes(best['bytes'])} as GGUF, KL divergence "
            f"{best['measured']:.4f} ± {best['error']:.4f} nats a token.")
    sections = [inner.sections[0], Section("Predicted and measured", _rounds(fit)),
                Section("On held-out text", [_held_out(fit["evaluation"])]), *inner.sections[1:-1],
                Section("What units cost", _units(fit["measured"])), Section("How to do it again", [_command(fit)])]
    return Document(f"{fit['model']} for {target['device'] or human_bytes(target['bytes'])}", lead, sections,
                    {"fit": fit, **inner.data})


def _rounds(fit: Mapping[str, Any]) -> list[Block]:
    rounds, best = fit["rounds"], fit["best"]["number"]
    rows = [[f"{one['number']}: {one['structure']}", Number.of(one["windows"], ".0f"), Number.of(one["predicted"]),
             Number.of(one["measured"], error=one["error"]),
             Number.of(one["measured_structure"]), Number.of(one["bytes"], ",.0f"),
             Number.of(one["predicted_tokens_per_s"], ".1f"), Number.of(one["decode_tokens_per_s"], ".1f"),
             Number.of(one["seconds"], ".0f")] for one in rounds]
    speed = any(one["decode_tokens_per_s"] for one in rounds)
    header = ["round", "windows", "predicted", "measured", "of which structure", "bytes", "tokens/s predicted", "measured",
              "seconds"]
    if not speed:
        rows, header = [[*row[:6], row[8]] for row in rows], [*header[:6], header[8]]
    off = fit["corrections"]
    return [drawings.predictions("rounds", rounds, "Loss that was expected of each candidate, and that it has, on held-out "
                                 "text."),
            Table("Candidates; KL divergence in nats a token", header, rows, frozenset([best])),
            Paragraph(f"Measured losses of structure were {off['structure']:.2f} times the sums of their units, those of "
                      f"grids {off['grids']:.2f} times. The prediction for the "
                      f"best, made with {fit['settings']['windows']} windows of calibration text, "
                      f"{'holds' if fit['holds'] else 'does not hold'} within 15%.")]


def _held_out(found: Mapping[str, Any]) -> Table:
    """The best on all the text that candidates were compared on, beside the original."""
    protocol = found["protocol"]
    rows = [["perplexity", Number.of(found["perplexity"]), Number.of(found["reference_perplexity"])],
            ["nats a token", Number.of(found["loss"], error=found["loss_standard_error"]), ""],
            ["bits a byte", Number.of(found["bits_per_byte"]), ""],
            ["KL divergence from the original", Number.of(found["kl"], error=found["kl_standard_error"]), ""],
            ["same likeliest token", Number.of(found["same_top_token"], ".1%"), ""]]
    return Table(f"{protocol['kind']} of {protocol['context']} tokens, {protocol['predicted_tokens']} predicted; nothing "
                 "was calibrated on this text, but candidates were chosen by it", ["", "fitted", "original"], rows)


def _units(measured: Mapping[str, Any]) -> list[Block]:
    gone = [str(layer) for layer in measured["order"]]
    blocks: list[Block] = []
    if measured["alone"]:
        alone = {layer: measured["alone"][layer] for layer in sorted(measured["alone"], key=int)}
        blocks.append(drawings.bars("alone", alone, "layer", "nats a token",
                                    "What the loss rises by without each layer alone; marked: those that go first.",
                                    marked=gone))
    blocks.append(drawings.curve("depth", list(enumerate(measured["depth"])), "layers fewer", "nats a token",
                                 f"Loss with the first layers gone, in the order {', '.join(gone)}."))
    if len(measured["width"]) > 1:
        blocks.append(drawings.curve("width", [(float(share), loss) for share, loss in measured["width"].items()],
                                     "share of neurons fewer", "nats a token", "Loss with fewer feed-forward neurons."))
    if len(measured["vocabulary"]) > 1:
        blocks.append(drawings.curve("vocabulary", [(int(size), loss) for size, loss in measured["vocabulary"].items()],
                                     "tokens", "nats a token", "Loss with smaller vocabularies."))
    grids: dict[str, float] = {}
    for losses in measured["grids"].values():
        for name, loss in losses.items():
            grids[name] = grids.get(name, 0.0) + loss
    blocks.append(drawings.bars("grids", dict(sorted(grids.items(), key=lambda one: -one[1])), "grid", "nats a token",
                                "Predicted loss with every matrix that can take a grid on it."))
    if measured["seconds"]:
        blocks.append(drawings.bars("seconds", {name: 1e9 * value for name, value in measured["seconds"].items()}, "grid",
                                    "ns a weight", "Time that a weight takes in a new token on this machine."))
    return blocks


def _command(fit: Mapping[str, Any]) -> Code:
    target, asked = fit["target"], fit["settings"]
    words = ["tsotsallm", "fit", str(fit["model"]), "-o", "fitted"]
    words += ["--device", target["device"]] if target["device"] else ["--bytes", str(target["bytes"])]
    words += ["--faster-than", str(target["faster_than"])] if target["faster_than"] else []
    for text in asked["keep_text"]:
        words += ["--keep-text", text]
    words += ["--calibration", asked["calibration"]] if asked["calibration"] else []
    words += [part for name in ("windows", "window", "minutes", "seed") for part in (f"--{name}", str(asked[name]))]
    words += ["--recover"] if asked["recover"] else []
    words += ["--quick"] if asked["quick"] else []
    return Code("The command", shlex.join(words))
