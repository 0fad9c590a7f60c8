"""Losses, answers and costs on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsotsallm.console.lines import print_notes, table

if TYPE_CHECKING:
    from tsotsallm.evaluation.cost import Cost, Speed
    from tsotsallm.evaluation.engines import CachePerplexity
    from tsotsallm.evaluation.examination import Examination
    from tsotsallm.evaluation.examine import Comparison
    from tsotsallm.evaluation.forecast import TaskForecast
    from tsotsallm.evaluation.franken import OrderResult
    from tsotsallm.evaluation.perplexity import Perplexity


def print_speeds(speeds: dict[str, Speed]) -> None:
    from tsotsallm.units import human_bytes

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
    print_notes(found.notes)


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

    from tsotsallm.units import human_bytes

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
    from tsotsallm.units import human_bytes

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
    from tsotsallm.units import human_seconds

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
    from tsotsallm.units import human_bytes

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


def print_caches(found: list[CachePerplexity]) -> None:
    """One row a type of cache."""
    rows = [[one.kv, f"{one.perplexity:.4f}", f"{one.late:.4f}", f"{one.bytes_per_token:,.0f} B",
             f"{one.bytes_per_token * one.context / 2**20:.1f} MiB"] for one in found]
    table(f"key-value caches on {found[0].source}, windows of {found[0].context} tokens",
          ["cache", "perplexity", "second half", "a token", "a window"], rows)
