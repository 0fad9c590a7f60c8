"""Plans, results and anatomies on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsotsallm.console.lines import table

if TYPE_CHECKING:
    from tsotsallm.inspection import Anatomy
    from tsotsallm.planning import Forecast
    from tsotsallm.run.run import Result


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
