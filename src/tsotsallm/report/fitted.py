"""The report on a fit: the model found, its measured costs, and the predicted and measured loss of every candidate."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tsotsallm.errors import ReportError
from tsotsallm.evaluation.examination import Examination
from tsotsallm.files import Json, read_json
from tsotsallm.report import drawings
from tsotsallm.report.document import Block, Cell, Code, DataTable, Document, Glance, Number, Paragraph, Section, TextSamples
from tsotsallm.report.result import result_document
from tsotsallm.units import human_bytes, plus_minus


def fit_document(folder: Path, examinations: Sequence[Examination], samples: TextSamples | None = None) -> Document:
    """A report on the folder of a fit; raises ReportError where its fit.json cannot be read."""
    fit = read_json(folder / "fit.json", ReportError)
    best, target = fit["best"], fit["target"]
    inner = result_document({str(fit["model"]): str(fit["model"]), "fitted": str(folder / "model")}, examinations, samples)
    wanted = f"{target['bytes']:,} bytes" + (f" ({target['device']})" if target["device"] else "") + (
        f", faster than {target['faster_than']} tokens per second" if target["faster_than"] else "")
    measured = fit["evaluation"]
    speed = best.get("decode_tokens_per_s") or fit.get("tokens_per_s")     # candidates are timed where a speed was asked for
    glance = Glance(
        f"The best model found for {wanted}: {fit['model']} with {best['structure']}.",
        f"{human_bytes(best['bytes'])} as a GGUF file" + (f", {speed:.0f} new tokens per second." if speed else "."),
        f"KL divergence from the original {plus_minus(best['measured'], best['error'])} nats per token; perplexity "
        f"{measured['reference_perplexity']:.4g} before and {measured['perplexity']:.4g} after.",
        shlex.join(["tsotsallm", "chat", str(folder / "model.gguf")]))
    on_answers = [Section("On answers", [_answered(fit["answered"])])] if fit.get("answered") else []
    sections = [inner.sections[0], Section("Predicted and measured", _rounds(fit)),
                Section("On held-out text", [_held_out(fit["evaluation"], fit.get("in_llama"))]),
                *on_answers, *inner.sections[1:-1],
                Section("What layers, neurons and grids cost", _units(fit["measured"])),
                Section("How to reproduce it", [_command(fit)])]
    return Document(f"{fit['model']} for {target['device'] or human_bytes(target['bytes'])}", glance, sections,
                    {"fit": fit, **inner.data})


def _rounds(fit: Mapping[str, Json]) -> list[Block]:
    rounds, best = fit["rounds"], fit["best"]["number"]
    rows = [[f"{candidate['number']}: {candidate['structure']}" + ", tuned" * bool(candidate.get("tuned")),
             Number.of(candidate["windows"], ".0f"),
             Number.of(candidate["predicted"]), Number.of(candidate["measured"], error=candidate["error"]),
             Number.of(candidate["measured_structure"]), Number.of(candidate["bytes"], ",.0f"),
             Number.of(candidate["predicted_tokens_per_s"], ".1f"), Number.of(candidate["decode_tokens_per_s"], ".1f"),
             Number.of(candidate["seconds"], ".0f")] for candidate in rounds]
    speed = any(candidate["decode_tokens_per_s"] for candidate in rounds)
    header = ["round", "windows", "predicted", "measured", "of which structure", "bytes", "tokens/s predicted", "measured",
              "seconds"]
    if not speed:
        rows, header = [[*row[:6], row[8]] for row in rows], [*header[:6], header[8]]
    off = fit["corrections"]
    return [drawings.predictions("rounds", rounds, "Predicted and measured loss of each candidate on held-out text."),
            DataTable("Candidates; KL divergence in nats per token", header, rows, frozenset([best])),
            Paragraph(f"Measured losses were {off['structure']:.2f} times the sum of the single losses for structure, and "
                      f"{off['grids']:.2f} times for grids. The prediction for the best candidate, made with "
                      f"{fit['settings']['windows']} windows of calibration text, "
                      f"{'holds' if fit['holds'] else 'does not hold'} within 15%.")]


def _held_out(evaluation: Mapping[str, Json], in_llama: Mapping[str, Json] | None) -> DataTable:
    """The best candidate beside the original, on all the text that candidates were compared on."""
    protocol = evaluation["protocol"]
    rows: list[list[Cell]] = [
            ["perplexity", Number.of(evaluation["perplexity"]), Number.of(evaluation["reference_perplexity"])],
            ["nats per token", Number.of(evaluation["loss"], error=evaluation["loss_standard_error"]), ""],
            ["bits per byte", Number.of(evaluation["bits_per_byte"]), ""],
            ["KL divergence from the original", Number.of(evaluation["kl"], error=evaluation["kl_standard_error"]), ""],
            ["same likeliest token", Number.of(evaluation["same_top_token"], ".1%"), ""]]
    if in_llama:
        rows.append(["KL divergence in llama.cpp, which rounds activations too",
                     Number.of(in_llama["kl"], error=in_llama["kl_standard_error"]), ""])
    rows += [[*row, ""] for row in _tail(evaluation.get("tail"))]
    return DataTable(f"{protocol['kind']} of {protocol['context']} tokens, {protocol['predicted_tokens']} predicted; "
                     "nothing was calibrated on this text, but candidates were chosen by it", ["", "fitted", "original"],
                     rows)


def _tail(tail: Mapping[str, Json] | None) -> list[list[Cell]]:
    if tail is None:
        return []
    return [["KL divergence of a token, median", Number.of(tail["kl_median"])],
            ["exceeded by 1% of the tokens", Number.of(tail["kl_99"])],
            ["exceeded by 0.1%", Number.of(tail["kl_999"])],
            ["probability of the original's likeliest token differs by (root mean square)",
             Number.of(tail["top_probability_rms"], ".1%")]]


def _answered(answered: Mapping[str, Json]) -> DataTable:
    """The best candidate where the original answers packaged requests."""
    rows = [["KL divergence from the original", Number.of(answered["kl"], error=answered["kl_standard_error"])],
            ["same likeliest token", Number.of(answered["same_top_token"], ".1%")], *_tail(answered["tail"])]
    return DataTable(f"{answered['conversations']} packaged requests with the original's own answers, {answered['tokens']} "
                     "tokens; candidates were chosen by their divergence here and on the held-out text, half and half",
                     ["", "fitted"], rows)


def _units(measured: Mapping[str, Json]) -> list[Block]:
    gone = [str(layer) for layer in measured["order"]]
    blocks: list[Block] = []
    if measured["alone"]:
        alone = {layer: measured["alone"][layer] for layer in sorted(measured["alone"], key=int)}
        blocks.append(drawings.by_place("alone", alone, "layer", "nats per token",
                                        "Rise of the loss without each single layer; marked: the layers that are removed "
                                        "first.", marked=gone))
    blocks.append(drawings.curve("depth", list(enumerate(measured["depth"])), "layers removed", "nats per token",
                                 f"Loss with layers removed, in the order {', '.join(gone)}."))
    if len(measured["width"]) > 1:
        blocks.append(drawings.curve("width", [(float(share), loss) for share, loss in measured["width"].items()],
                                     "share of neurons removed", "nats per token",
                                     "Loss with fewer feed-forward neurons."))
    if len(measured["vocabulary"]) > 1:
        blocks.append(drawings.curve("vocabulary", [(int(size), loss) for size, loss in measured["vocabulary"].items()],
                                     "tokens", "nats per token", "Loss with smaller vocabularies."))
    grids: dict[str, float] = {}
    for losses in measured["grids"].values():
        for name, loss in losses.items():
            grids[name] = grids.get(name, 0.0) + loss
    blocks.append(drawings.by_place("grids", dict(sorted(grids.items(), key=lambda item: -item[1])), "grid",
                                    "nats per token", "Predicted loss with every matrix that can take a grid quantised to "
                                    "it."))
    if measured["seconds"]:
        times = {name: 1e9 * value for name, value in measured["seconds"].items()}
        blocks.append(drawings.by_place("seconds", times, "grid", "ns per weight",
                                        "Time that one weight takes per new token on this machine."))
    return blocks


def _command(fit: Mapping[str, Json]) -> Code:
    target, asked = fit["target"], fit["settings"]
    words = ["tsotsallm", "fit", str(fit["model"]), "-o", "fitted"]
    words += ["--device", target["device"]] if target["device"] else ["--bytes", str(target["bytes"])]
    words += ["--faster-than", str(target["faster_than"])] if target["faster_than"] else []
    for text in asked["keep_text"]:
        words += ["--keep-text", text]
    words += ["--calibration", asked["calibration"]] if asked["calibration"] else []
    words += [part for name in ("windows", "window", "minutes", "seed") for part in (f"--{name}", str(asked[name]))]
    words += ["--recover"] if asked["recover"] else []
    words += ["--tune"] if asked.get("tune") else []
    words += ["--quick"] if asked["quick"] else []
    return Code("The command", shlex.join(words))
