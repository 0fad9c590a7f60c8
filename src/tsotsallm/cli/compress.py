"""tsotsallm compress: a model made smaller by a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsotsallm.cli.common import (
    AsJson,
    CacheBytes,
    Calibration,
    Data,
    Device,
    Items,
    Model,
    RecipeText,
    Restart,
    Threads,
    Window,
    Windows,
    WindowsSeed,
    answers,
    bytes_or_none,
    names_in,
    print_json,
)

if TYPE_CHECKING:
    from tsotsallm.evaluation.examination import Examination
    from tsotsallm.run.run import Result


def compress(model: Model, recipe: RecipeText,
             out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write the result to; must not exist.")],
             calibration: Calibration = None, windows: Windows = 32, window: Window = None, seed: WindowsSeed = 0,
             device: Device = "cpu",
             scratch: Annotated[Path | None, typer.Option(help="Directory for hidden states (default: beside the "
                                                               "result).")] = None,
             keep_stages: Annotated[bool, typer.Option(help="Keep the model after every stage, in OUT-stages.")] = False,
             force: Annotated[bool, typer.Option(help="Start although memory or disk seem too small.")] = False,
             restart: Restart = False, cache_bytes: CacheBytes = None,
             timings: Annotated[bool, typer.Option(help="Print how many seconds each part of the work took.")] = False,
             task: Annotated[str | None, typer.Option(help="Tasks to evaluate the original and every stage's model on, "
                                                           "separated by commas.")] = None,
             data: Data = None, limit: Items = None, threads: Threads = None, as_json: AsJson = False) -> None:
    """Make a model smaller by a recipe, one layer at a time."""
    with answers(as_json):
        from tsotsallm.api.compress import compress
        from tsotsallm.api.evaluate import examine_stages
        from tsotsallm.cli.lines import print_notes, progress_bar, step_bar
        from tsotsallm.errors import TsotsallmError
        from tsotsallm.evaluation.examination import check_tasks

        tasks = names_in(task)
        if tasks:
            check_tasks(tasks, data=data, limit=limit)
        elif data is not None or limit is not None:
            raise TsotsallmError("--data and --limit belong to --task, which is not given")
        bar, show = progress_bar(as_json)
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            print_notes([line])

        with bar:
            result = compress(model, recipe, out, calibration=calibration, windows=windows, window=window, seed=seed,
                              device=device, scratch=scratch, keep_stages=keep_stages or bool(tasks), force=force,
                              restart=restart, cache_bytes=bytes_or_none(cache_bytes, "--cache-bytes"),
                              progress=show, say=said.append if as_json else say)
        if not as_json:
            print_result(result, said)
            if timings:
                print_timings(result)
        scores = None
        if tasks:
            bar, tick = step_bar(as_json)
            with bar:
                scores = examine_stages(model, result, tasks, data=data, limit=limit, device=device, tick=tick)
            if not as_json:
                print_stages(scores)
        if as_json:
            print_json(result.plain() | ({"examination": scores.plain()} if scores is not None else {}))


def print_result(result: Result, said: Sequence[str] = ()) -> None:
    """Print what became smaller, what trainings learned, how long it took, and where the result is.

    Notes that were `said` before are not repeated.
    """
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_bytes, human_seconds

    table("Result", ["", "before", "after", "ratio"], [
        ["parameters", f"{result.parameters:,}", f"{result.result_parameters:,}",
         f"{result.result_parameters / result.parameters:.3f}"],
        ["weights on disk", human_bytes(result.bytes), human_bytes(result.result_bytes),
         f"{result.result_bytes / result.bytes:.3f}"]])
    for training in result.training:
        for one in training.samples:
            where = one.source if one.layer is None else f"layer {one.layer}"
            print(f"{training.stage:8}{where}: held-out loss {one.held_out_loss_before:.4f} -> {one.held_out_loss:.4f} in "
                  f"{one.steps} steps, {human_seconds(one.elapsed_s or 0)} ({training.engine}{'; ' * bool(one.stopped)}"
                  f"{one.stopped})")
    print(f"took {human_seconds(result.elapsed_s)} (forecast {human_seconds(result.expected_s)}, floor "
          f"{human_seconds(result.floor_s)}), "
          f"peak memory {human_bytes(result.peak_rss_bytes)}")
    for note in result.notes:
        if note not in said:
            print(f"note    {note}")
    for stage in result.stages:
        print(f"stage   {stage}")
    print(f"model   {result.path}")


def print_timings(result: Result) -> None:
    """Print the seconds and the share of each part of the work."""
    from tsotsallm.cli.lines import table

    whole = sum(result.timings.values())
    table("Time", ["part", "seconds", "share"], [[name, f"{seconds:.1f}", f"{seconds / whole:.0%}"]
                                                 for name, seconds in result.timings.items()])


def print_stages(scores: Examination) -> None:
    """Print one row per stage, the original first: its scores, and its bytes."""
    from tsotsallm.cli.evaluate import score_cells
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_bytes

    shown = [one for one in scores.comparisons if not one.group and not one.measure.startswith("of which")]
    rows = []
    for number, (model, cost) in enumerate(zip(scores.models, scores.costs, strict=True)):
        differences = [one.differences[number] for one in shown]
        marks = ["≈ " if one is not None and one.within_noise else "" for one in differences]
        rows.append([Path(model).name, *(mark + score_cells(one)[number] for mark, one in zip(marks, shown, strict=True)),
                     human_bytes(cost.disk_bytes)])
    table("After every stage", ["", *(f"{one.task}: {one.measure}" for one in shown), "bytes"], rows)
    print("± is one standard error; ≈ the difference to the first row is within noise (paired, 95%)")
