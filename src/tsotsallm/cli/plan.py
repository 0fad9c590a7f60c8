"""tsotsallm plan: what a compression would take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsotsallm.cli.common import (
    AsJson,
    CacheBytes,
    Calibration,
    Device,
    Model,
    RecipeText,
    Threads,
    Window,
    Windows,
    answers,
    bytes_or_none,
    print_json,
)

if TYPE_CHECKING:
    from tsotsallm.planning import Forecast


def plan(model: Model, recipe: RecipeText,
         out: Annotated[Path, typer.Option("-o", "--out", help="Directory that the result would be written to.")] =
         Path("result"),
         calibration: Calibration = None, windows: Windows = 32, window: Window = None, device: Device = "cpu",
         keep_stages: Annotated[bool, typer.Option(help="Forecast a compression that keeps the model after every "
                                                        "stage.")] = False,
         cache_bytes: CacheBytes = None, threads: Threads = None, as_json: AsJson = False) -> None:
    """Forecast memory, disk, time and size of a compression.

    No tensor is read.
    """
    with answers(as_json):
        from tsotsallm.compression import plan

        forecast = plan(model, recipe, out, calibration=calibration, windows=windows, window=window, device=device,
                        keep_stages=keep_stages, cache_bytes=bytes_or_none(cache_bytes, "--cache-bytes"))
        print_json(forecast.plain()) if as_json else print_plan(forecast)


def print_plan(forecast: Forecast) -> None:
    """Print one row per sweep, and what the whole takes."""
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_bytes, human_seconds

    rows = []
    for number, sweep in enumerate(forecast.sweeps, 1):
        name = f"{number}. {' + '.join(sweep.stages) or 'copy'}" + (f", {sweep.engine}" if sweep.engine else "")
        rows.append([name, str(sweep.layers), human_bytes(sweep.ram_bytes), human_bytes(sweep.scratch_bytes),
                     f"{sweep.flops:.3g}", f"about {human_seconds(sweep.expected_s)}"])
    table("Plan", ["sweep", "layers", "RAM", "scratch", "operations", "time"], rows)
    print(f"recipe      {forecast.recipe}")
    print(f"calibration {forecast.windows} windows of {forecast.window} tokens")
    print(f"parameters  {forecast.parameters:,} -> {forecast.result_parameters:,}")
    print(f"weights     {human_bytes(forecast.bytes)} -> {human_bytes(forecast.result_bytes)} at most")
    print(f"memory      {human_bytes(forecast.ram_bytes)} needed, {human_bytes(forecast.free_ram_bytes)} free")
    print(f"disk        {human_bytes(forecast.disk_bytes)} needed, {human_bytes(forecast.free_disk_bytes)} free")
    for place, line in enumerate(forecast.download.lines() if forecast.download is not None else ()):
        print(f"{'' if place else 'download':12}{line}")
    print(f"time        about {human_seconds(forecast.expected_s)}, {_known_by(forecast.runs)}")
    print(f"            at least {human_seconds(forecast.floor_s)}, at {forecast.flops_per_second / 1e9:.0f} GFLOP/s "
          "(float32, measured now)")
    for warning in forecast.warnings:
        print(f"note        {warning}")


def _known_by(runs: int) -> str:
    if not runs:
        return "as such passes took on another computer; the first run here will tell more exactly"
    return f"as the last {'pass' if runs == 1 else f'{runs} passes'} of this kind took here"
