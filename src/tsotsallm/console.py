"""What the command line prints: tables and the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsotsallm.api import Examination
    from tsotsallm.evaluation.cost import Cost, Speed
    from tsotsallm.evaluation.engines import CachePerplexity
    from tsotsallm.evaluation.examine import Comparison
    from tsotsallm.evaluation.forecast import TaskForecast
    from tsotsallm.evaluation.franken import OrderResult
    from tsotsallm.evaluation.perplexity import Perplexity
    from tsotsallm.inspection import Anatomy
    from tsotsallm.planning import Forecast
    from tsotsallm.run import Progress, Result
    from tsotsallm.study.fit import Fitted
    from tsotsallm.study.ledger import Trial
    from tsotsallm.study.study import Found
    from tsotsallm.tables.jobs import Annotations
    from tsotsallm.tables.scoring import Score


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


class _Lines:
    """Progress as lines of JSON on stderr, a few a second."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console, self.last = Console(stderr=True), 0.0

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def tell(self, step: str, share: float) -> None:
        import json
        import sys
        import time

        if (now := time.monotonic()) - self.last > 0.2 or share >= 1:
            self.last = now
            print(json.dumps({"step": step, "share": round(share, 4)}), file=sys.stderr, flush=True)


def _told_to_programs() -> bool:
    import os

    from tsotsallm.machine import PROGRESS

    return bool(os.environ.get(PROGRESS))


def progress_bar(quiet: bool) -> tuple[Any, Callable[[Progress], None]]:
    """A progress bar with layer, stage, ETA, current and peak memory."""
    if _told_to_programs():
        lines = _Lines()

        def tell(now: Progress) -> None:
            done = (now.layer + 0.9 * now.share) / now.layers if now.layers else now.share
            where = f" {min(now.layer + 1, now.layers)}/{now.layers}" if now.layers else ""
            lines.tell(f"{now.stages}{where} {now.step}", min(1.0, (now.sweep + min(done, 1.0)) / max(now.sweeps, 1)))
        return lines, tell

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from tsotsallm.machine import human_bytes, peak_rss_bytes, rss_bytes

    console = Console(stderr=True)
    bar = Bar(TextColumn("{task.description}"), BarColumn(bar_width=10), TextColumn("{task.percentage:>3.0f}%"),
              TimeRemainingColumn(elapsed_when_finished=True), TextColumn("{task.fields[memory]}"),
              console=console, disable=quiet or not console.is_terminal)
    tasks: dict[int, Any] = {}

    def show(now: Progress) -> None:
        if now.sweep not in tasks:
            tasks[now.sweep] = bar.add_task("", total=1.0, memory="")
        done = (now.layer + 0.9 * now.share) / now.layers if now.layers else now.share
        where = f" {min(now.layer + 1, now.layers)}/{now.layers}" if now.layers else ""
        bar.update(tasks[now.sweep], completed=min(done, 1.0), description=f"{now.stages}{where} {now.step}",
                   memory=f"{human_bytes(rss_bytes())}, peak {human_bytes(peak_rss_bytes())}")
    return bar, show


def step_bar(quiet: bool) -> tuple[Any, Callable[[str, float], None]]:
    """A progress bar for passes over a model, one after another."""
    if _told_to_programs():
        lines = _Lines()
        return lines, lines.tell

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.percentage:>3.0f}%"),
              TimeRemainingColumn(), console=console, transient=True, disable=quiet or not console.is_terminal)
    tasks: dict[str, Any] = {}

    def show(step: str, share: float) -> None:
        if step not in tasks:
            tasks[step] = bar.add_task(step, total=1.0)
        bar.update(tasks[step], completed=share)
    return bar, show


def print_plan(forecast: Forecast) -> None:
    from tsotsallm.machine import human_bytes, human_seconds

    rows = []
    for number, sweep in enumerate(forecast.sweeps, 1):
        name = f"{number}. {' + '.join(sweep.stages) or 'copy'}" + (f", {sweep.engine}" if sweep.engine else "")
        rows.append([name, str(sweep.layers), human_bytes(sweep.ram_bytes), human_bytes(sweep.scratch_bytes),
                     f"{sweep.flops:.3g}", human_seconds(sweep.floor_s)])
    table("Plan", ["sweep", "layers", "RAM", "scratch", "operations", "floor of time"], rows)
    print(f"calibration {forecast.windows} windows of {forecast.window} tokens")
    print(f"parameters  {forecast.parameters:,} -> {forecast.result_parameters:,}")
    print(f"weights     {human_bytes(forecast.bytes)} -> {human_bytes(forecast.result_bytes)} at most")
    print(f"memory      {human_bytes(forecast.ram_bytes)} needed, {human_bytes(forecast.free_ram_bytes)} free")
    print(f"disk        {human_bytes(forecast.disk_bytes)} needed, {human_bytes(forecast.free_disk_bytes)} free")
    print(f"time        at least {human_seconds(forecast.floor_s)}, at {forecast.flops_per_second / 1e9:.0f} GFLOP/s "
          "(float32, measured now)")
    for warning in forecast.warnings:
        print(f"note        {warning}")


def print_result(result: Result) -> None:
    from tsotsallm.machine import human_bytes, human_seconds

    table("Result", ["", "before", "after", "ratio"], [
        ["parameters", f"{result.parameters:,}", f"{result.result_parameters:,}",
         f"{result.result_parameters / result.parameters:.3f}"],
        ["weights on disk", human_bytes(result.bytes), human_bytes(result.result_bytes),
         f"{result.result_bytes / result.bytes:.3f}"]])
    for one in result.training:
        for place in one["samples"]:
            where = f"layer {place['layer']}" if "layer" in place else place["source"]
            losses = f"{place['held_out_loss_before']:.4f} -> {place['held_out_loss']:.4f}"
            print(f"{one['stage']:8}{where}: held-out loss {losses} in {place['steps']} steps, "
                  f"{human_seconds(place['elapsed_s'])} ({one['engine']}{'; ' * bool(place['stopped'])}{place['stopped']})")
    print(f"took {human_seconds(result.elapsed_s)} (floor {human_seconds(result.floor_s)}), "
          f"peak memory {human_bytes(result.peak_rss_bytes)}")
    for note in result.notes:
        print(f"note    {note}")
    for stage in result.stages:
        print(f"stage   {stage}")
    print(f"model   {result.path}")


def print_fit(found: Fitted, answers: Examination | None) -> None:
    from tsotsallm.machine import human_bytes, human_seconds

    table("Rounds", ["round", "structure", "predicted KL", "measured KL", "file", "tokens/s"], [
        [str(one.number), one.structure, f"{one.predicted:.4f}", f"{one.measured:.4f} ± {one.error:.4f}",
         human_bytes(one.bytes), "" if one.decode_tokens_per_s is None else f"{one.decode_tokens_per_s:.1f}"]
        for one in found.rounds])
    best = found.best
    print(f"best    round {best.number}: {best.structure}; KL {best.measured:.4f} ± {best.error:.4f}, perplexity "
          f"{found.evaluation['perplexity']:.4f} (original {found.evaluation['reference_perplexity']:.4f}) on held-out "
          "text")
    print(f"file    {human_bytes(found.best.bytes)} of {human_bytes(found.target.bytes)}; the prediction "
          f"{'holds' if found.holds else 'does not hold'}; took {human_seconds(found.seconds)}")
    print(f"model   {found.path}\ngguf    {found.gguf}")
    if (report := found.path.parent / "report.html").exists():
        print(f"report  {report}")
    if answers is not None:
        print_examination(answers, groups=False)


def print_study(found: Found) -> None:
    from tsotsallm.machine import human_bytes
    from tsotsallm.study.verdict import size_of, verdict_markdown

    best = {trial.number for trial in found.front}
    rows = []
    for trial in found.trials:
        measured = trial.measures.get(trial.level, {})
        rows.append([f"{trial.number:3} {trial.name}{' *' if trial.number in best else ''}", trial.status,
                     f"{measured['kl']:.4f} ± {measured['kl_error']:.4f}" if measured else trial.error,
                     f"{measured['perplexity']:.3f}" if measured else "",
                     human_bytes(trial.measures["model"]["bytes"]) if "model" in trial.measures else "", trial.level])
    table("Trials (* on the front)", ["trial", "status", "KL", "perplexity", "bytes", "evaluation"], rows)
    print(f"hypervolume {found.hypervolume:.6g} up to {', '.join(f'{one:.4g}' for one in found.reference)}")
    print(verdict_markdown(found.trials, size_of(found.objectives)))
    print(f"ledger  {found.folder}")
    if (report := found.folder / "report.html").exists():
        print(f"report  {report}")


def print_trials(trials: list[Trial]) -> None:
    import json

    rows = [["recipe", *("\n".join(json.dumps(stage) for stage in trial.recipe) for trial in trials)],
            ["reason", *(trial.reason for trial in trials)], ["status", *(trial.error or trial.status for trial in trials)]]
    for level in ("model", "cheap", "full"):
        names = sorted({name for trial in trials for name in trial.measures.get(level, {})})
        rows += [[f"{level} {name}", *(_told(trial.measures.get(level, {}).get(name)) for trial in trials)]
                 for name in names]
    rows += [[name, *(_told(trial.facts.get(name)) for trial in trials)] for name in ("seconds", "energy_wh", "reused")]
    table("Trials", ["", *(f"{trial.number}: {trial.name}" for trial in trials)], rows)


def _told(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def print_notebook(notes: list[dict[str, Any]]) -> None:
    cycle = None
    for note in notes:
        if note["cycle"] != cycle:
            cycle = note["cycle"]
            print(f"\nCycle {cycle}")
        print(f"  {note['phase']}: {note['text']}")


def print_speeds(speeds: dict[str, Speed]) -> None:
    from tsotsallm.machine import human_bytes

    table("Speed in llama.cpp", ["file", "new tokens a second", "prompt tokens a second", "memory taken", "threads"],
          [[name, f"{one.decode_tokens_per_s:.1f}", f"{one.prefill_tokens_per_s:.1f}", human_bytes(one.grown_bytes),
            str(one.threads)] for name, one in speeds.items()])


def print_perplexity(found: Perplexity) -> None:
    def plus_minus(error: float | None) -> str:
        return "" if error is None else f" ± {error:.4f}"

    rows = [["perplexity", f"{found.perplexity:.4f}",
             "" if found.reference_perplexity is None else f"{found.reference_perplexity:.4f}"],
            ["nats per token", f"{found.loss:.4f}{plus_minus(found.loss_standard_error)}", ""]]
    if found.bits_per_byte is not None:
        rows.append(["bits per byte", f"{found.bits_per_byte:.4f}", ""])
    if found.kl is not None:
        rows.append(["KL from original", f"{found.kl:.4f}{plus_minus(found.kl_standard_error)}", ""])
        rows.append(["same top token", f"{found.same_top_token:.1%}", ""])
    protocol = found.protocol
    table(f"{found.model} on {protocol.text}", ["", "model", "original"], rows)
    print(f"protocol: {protocol.kind} of {protocol.context} tokens{', one BOS each' if protocol.bos else ''}, "
          f"{protocol.predicted_tokens} predicted tokens, float32; ± is one standard error")
    print(f"fits: {', '.join(name for name, holds in found.fits.items() if holds) or 'none of the target devices'}")


def print_anatomy(name: str, found: Anatomy) -> None:
    from tsotsallm.machine import human_bytes

    rows = [[part, f"{found.parameters_by_part[part]:,}", human_bytes(size), f"{size / found.bytes:.1%}"]
            for part, size in found.bytes_by_part.items()]
    rows.append(["all", f"{found.parameters:,}", human_bytes(found.bytes), "100%"])
    table(name, ["part", "parameters", "bytes", "share"], rows)
    stored = "" if found.stored_layers == found.layers else f" ({found.stored_layers} stored)"
    print(f"{found.family}: {found.layers} layers{stored}, hidden {found.hidden}, feed-forward {found.feed_forward}, "
          f"{found.heads} heads of {found.head_dim}, {found.kv_heads} KV heads, vocabulary {found.vocabulary}, context "
          f"{found.context}, {'tied' if found.tied_embeddings else 'untied'} embeddings")
    print(f"stored as {found.storage}, {found.bits_per_linear_weight:.2f} bits per linear weight; KV cache "
          f"{human_bytes(found.kv_cache_bytes_per_token)} a token (16 bit); {found.macs_per_token / 1e6:.1f} million "
          "multiply-accumulates a token")


def print_examination(found: Examination, *, groups: bool) -> None:
    """One row a measure: scores with their standard errors, differences to the first model with their intervals."""
    shown = [one for one in found.comparisons if groups or not one.group]
    several = len(found.models) > 1
    header = ["task", "measure", "items", *(f"{number}" for number, _ in enumerate(found.models, 1))]
    header += [f"{number} - 1" for number, _ in enumerate(found.models, 1) if number > 1]
    rows = [[one.task + (f" ({one.group})" if one.group else ""), one.measure.replace("of which", "·"), str(one.items),
             *_scores(one), *_differences(one)] for one in shown]
    table("Scores", header, rows)
    for number, model in enumerate(found.models, 1):
        print(f"{number}  {model}")
    print("± is one standard error" + ("; differences with their paired 95% interval, ≈ where they are within noise, "
                                       "p of McNemar's test for right-or-wrong items" if several else ""))
    for row in found.results:
        for result in row:
            for note in result.notes:
                print(f"note  {result.task}, {result.model}: {note}")
    print_costs(found.costs)


def print_stages(found: Examination) -> None:
    """One row a stage, the original first: what it scores, and its bytes."""
    from pathlib import Path

    from tsotsallm.machine import human_bytes

    shown = [one for one in found.comparisons if not one.group and not one.measure.startswith("of which")]
    rows = []
    for number, (model, cost) in enumerate(zip(found.models, found.costs, strict=True)):
        marks = ["≈ " if one.differences[number] is not None and one.differences[number].within_noise  # type: ignore[union-attr]
                 else "" for one in shown]
        rows.append([Path(model).name, *(mark + _scores(one)[number] for mark, one in zip(marks, shown, strict=True)),
                     human_bytes(cost.disk_bytes)])
    table("After every stage", ["", *(f"{one.task}: {one.measure}" for one in shown), "bytes"], rows)
    print("± is one standard error; ≈ the difference to the first row is within noise (paired, 95%)")


def _number(value: float, share: bool, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return f"{100 * value:{plus}.1f}" if share else f"{value:{plus}.4g}"


def _scores(one: Comparison) -> list[str]:
    unit = " %" if one.share else ""
    return [_number(score.value, one.share) + unit if score.standard_error is None else
            f"{_number(score.value, one.share)} ± {_number(score.standard_error, one.share)}{unit}" for score in one.scores]


def _differences(one: Comparison) -> list[str]:
    found = []
    for difference in one.differences:
        if difference is not None:
            mark = "≈ " if difference.within_noise else ""
            p = "" if difference.p is None else f" p {difference.p:.2g}"
            found.append(f"{mark}{_number(difference.value, one.share, sign=True)} "
                         f"[{_number(difference.low, one.share)}, {_number(difference.high, one.share)}]{p}")
    return found


def print_costs(costs: tuple[Cost, ...]) -> None:
    """One column a model: bytes, work, and what was measured of speed and energy."""
    from tsotsallm.machine import human_bytes

    parts = [part for part in costs[0].disk_bytes_by_part if any(cost.disk_bytes_by_part[part] for cost in costs)]
    rows = [["parameters", *(f"{cost.parameters:,}" for cost in costs)],
            ["of which not zero", *(f"{cost.nonzero_parameters:,}" for cost in costs)],
            ["bytes on disk", *(human_bytes(cost.disk_bytes) for cost in costs)],
            *([f"  {part}", *(human_bytes(cost.disk_bytes_by_part[part]) for cost in costs)] for part in parts),
            ["in memory as float32", *(human_bytes(cost.float32_bytes) for cost in costs)],
            *([f"  {part}", *(human_bytes(cost.float32_bytes_by_part[part]) for cost in costs)] for part in parts),
            ["KV cache a token, 16 bit", *(human_bytes(cost.kv_cache_bytes_per_token) for cost in costs)],
            ["MACs, prompt of 512", *(f"{cost.prefill_512_macs:.4g}" for cost in costs)],
            ["MACs, a token after 512", *(f"{cost.decode_after_512_macs:.4g}" for cost in costs)]]
    if all(cost.speed for cost in costs):
        speeds = [cost.speed for cost in costs if cost.speed]
        rows += [["prompt tokens a second", *(f"{speed.prefill_tokens_per_s:.1f}" for speed in speeds)],
                 ["new tokens a second", *(f"{speed.decode_tokens_per_s:.1f}" for speed in speeds)],
                 ["time to first token", *(f"{speed.first_token_s:.3f} s of {speed.prompt_tokens}" for speed in speeds)],
                 ["peak memory", *(human_bytes(speed.peak_rss_bytes) for speed in speeds)]]
        energies = [speed.energy for speed in speeds if speed.energy]
        if energies:
            rows += [["power", *(f"{one.power_w:.1f} W" for one in energies)],
                     ["Wh, 1000 prompt tokens", *(f"{one.prefill_wh_per_1000_tokens:.3g}" for one in energies)],
                     ["Wh, 1000 new tokens", *(f"{one.decode_wh_per_1000_tokens:.3g}" for one in energies)]]
            for query in energies[0].query_wh:
                rows.append([f"query of {query}", *(f"{one.query_wh[query]:.3g} Wh, {one.query_co2_g[query]:.3g} g CO₂, "
                                                    f"{one.query_water_ml[query]:.3g} ml water" for one in energies)])
    fits = [", ".join(name for name, holds in cost.fits.items() if holds) or "none" for cost in costs]
    rows.append(["fits", *fits])
    table("Cost", ["", *(str(number) for number, _ in enumerate(costs, 1))], rows)
    for energy in [cost.speed.energy for cost in costs if cost.speed and cost.speed.energy][:1]:
        print(f"energy {energy.label}; {energy.country}: {energy.carbon_g_per_kwh:.0f} g CO₂ a kWh; water "
              f"{energy.water_litres_per_kwh} litres a kWh")


def print_forecasts(found: list[TaskForecast]) -> None:
    from tsotsallm.machine import human_seconds

    table("Evaluation", ["task", "model", "items", "how", "tokens", "passes over the weights", "floor of time"],
          [[one.task, one.model, str(one.items), one.how, f"{one.tokens:,}", str(one.passes), human_seconds(one.floor_s)]
           for one in found])
    slow = [one for one in found if one.how == "sweeps"]
    if slow:
        print(f"{slow[0].model} does not fit memory: it generates by sweeps, one pass over its weights a token, "
              f"{human_seconds(slow[0].pass_s)} or more each")


def print_harness(scored: dict[str, dict[str, Any]]) -> None:
    """One row a task and metric, as lm-evaluation-harness names them."""
    names = [(task, metric) for found in list(scored.values())[:1] for task, values in found["results"].items()
             for metric, value in values.items() if isinstance(value, float) and "_stderr" not in metric]

    def cell(found: dict[str, Any], task: str, metric: str) -> str:
        values = found["results"].get(task, {})
        error = values.get(metric.replace(",", "_stderr,"))
        return f"{values[metric]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "") if metric in values else ""

    table("lm-evaluation-harness", ["task", "metric", *scored],
          [[task, metric.partition(",")[0], *(cell(found, task, metric) for found in scored.values())]
           for task, metric in names])
    for model, found in scored.items():
        print(f"{model} fits: {', '.join(name for name, holds in found['fits'].items() if holds) or 'no target device'}")


def print_orders(found: list[OrderResult]) -> None:
    """One row an order; the published accuracy (of another model, on 50 questions) beside ours."""
    from tsotsallm.machine import human_bytes

    rows = []
    for one in found:
        accuracy = "" if one.accuracy is None else f"{100 * one.accuracy:.1f} ± {100 * (one.accuracy_error or 0):.1f}"
        rows.append([one.name, _runs(one.order), f"{one.perplexity:.4g}", f"{one.kl:.3f}", accuracy,
                     "" if one.published_hellaswag is None else f"{100 * one.published_hellaswag:.0f}",
                     "" if one.decode_tokens_per_s is None else f"{one.decode_tokens_per_s:.1f}",
                     f"{one.macs_per_token / 1e6:.3g}", human_bytes(one.bytes)])
    table("Layer orders", ["order", "layers", "perplexity", "KL", "accuracy %", "published %", "tokens/s", "M MACs",
                           "bytes"], rows)


def _runs(order: list[int]) -> str:
    """0-3, 5, 5, 6: an order of layers in short."""
    parts: list[list[int]] = []
    for layer in order:
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def print_export(found: dict[str, Any]) -> None:
    """What was written, what it weighs, what its reader should know."""
    from tsotsallm.machine import human_bytes

    for name in ("gguf", "adapter", "modelfile", "hf"):
        if found.get(name):
            size = f" ({human_bytes(found['bytes'])})" if name == "gguf" else ""
            print(f"{found[name]}{size}")
    if found.get("bytes_by_type"):
        print("weights: " + ", ".join(f"{human_bytes(size)} {kind}" for kind, size in found["bytes_by_type"].items()))
    if verified := found.get("verified"):
        print(f"llama.cpp agrees: log-probabilities of {verified['tokens']} tokens differ by {verified['mean']:.2g} nats on "
              f"average, {verified['largest']:.2g} at most")
    for note in found["notes"]:
        print(f"note: {note}")


def print_push(found: dict[str, Any]) -> None:
    """What was, or would be, uploaded."""
    from tsotsallm.machine import human_bytes

    for name, size in found["files"].items():
        print(f"{human_bytes(size):>10}  {name}")
    where = f"{found['repository']} ({'public' if found['public'] else 'private'})"
    print(f"uploaded to {where}" if found["uploaded"] else f"nothing was sent; with --upload this goes to {where}")


def print_caches(found: list[CachePerplexity]) -> None:
    """One row a type of cache."""
    rows = [[one.kv, f"{one.perplexity:.4f}", f"{one.late:.4f}", f"{one.bytes_per_token:,.0f} B",
             f"{one.bytes_per_token * one.context / 2**20:.1f} MiB"] for one in found]
    table(f"key-value caches on {found[0].source}, windows of {found[0].context} tokens",
          ["cache", "perplexity", "second half", "a token", "a window"], rows)


def print_annotations(found: Annotations) -> None:
    """What was annotated, what was noted, what failed."""
    from tsotsallm.machine import human_bytes, human_seconds, peak_rss_bytes

    names = {"cea": "cells", "cta": "columns", "cpa": "pairs of columns"}
    print(f"{found.tables} tables: " + ", ".join(f"{count:,} {names[task]}" for task, count in found.answers.items())
          + f"; {human_seconds(found.seconds)}, peak memory {human_bytes(peak_rss_bytes())}")
    print("decided by " + ", ".join(f"{'the graph alone' if model == 'none' else model} ({count} tables)"
                                    for model, count in found.models.items()))
    for note in found.graph_notes:
        print(f"note   graph: {note}")
    counted: dict[str, list[str]] = {}
    for name, notes in found.notes.items():
        for note in notes:
            counted.setdefault(note.partition(" (")[0] if "lines are" in note else note, []).append(name)
    for note, tables in counted.items():
        print(f"note   {tables[0] if len(tables) == 1 else f'{len(tables)} tables, such as {tables[0]}'}: {note}")
    for name, error in found.failed.items():
        print(f"failed {name}: {error}")
    print(f"result {found.folder}")


def print_table_scores(folders: list[str], scores: list[Score]) -> None:
    """One row a task, measure and domain; differences to the first submission with their paired intervals."""
    rows = []
    for one in scores:
        cells = [f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
                 for value, error in zip(one.values, one.errors, strict=True)]
        cells += [f"{'≈ ' if other.within_noise else ''}{100 * other.value:+.1f} [{100 * other.low:+.1f}, "
                  f"{100 * other.high:+.1f}]" for other in one.differences if other is not None]
        rows.append([one.task.upper() + (f" ({one.domain})" if one.domain else ""), one.measure, str(one.targets), *cells])
    table("Scores, %", ["task", "measure", "targets", *map(str, range(1, len(folders) + 1)),
                        *(f"{number} - 1" for number in range(2, len(folders) + 1))], rows)
    for number, folder in enumerate(folders, 1):
        print(f"{number}  {folder}")
    print("CTA is the approximate score (types above and below the right one count in part); ± is one standard error, "
          "intervals are 95%, over whole tables")
