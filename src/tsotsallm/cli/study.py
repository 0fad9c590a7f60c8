"""tsotsallm study: many recipes tried and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsotsallm.cli.common import (
    AsJson,
    Data,
    Device,
    Items,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    Verbs,
    Workers,
    answers,
    computers_from,
    print_json,
    to_stderr,
)
from tsotsallm.files import JsonObject

if TYPE_CHECKING:
    from tsotsallm.study.forecast import StudyForecast
    from tsotsallm.study.ledger import Trial
    from tsotsallm.study.study import Found


class _Studies(Verbs):
    """`tsotsallm study SPEC` runs a study; show, compare and export present one."""

    default = "run"


app = typer.Typer(name="study", cls=_Studies, rich_markup_mode=None,
                  help="Try many recipes and compare the results. `tsotsallm study SPEC -o FOLDER` runs them; the other "
                       "commands show the results.")
Folder = Annotated[Path, typer.Argument(help="Folder of a study.")]


@app.command("run")
def run(spec: Annotated[str, typer.Argument(help="Study to run: a YAML file, or a packaged one: quick, approaches, franken, "
                                                 "reference-pruning, reference-pipeline, reference-order.")],
        out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the study; an unfinished one is resumed.")],
        model: Annotated[str, typer.Option(help="Model to compress: a checkpoint directory, a hub id (NAME/MODEL), or "
                                                "'embedded'.")] = "embedded",
        values: Annotated[list[str] | None, typer.Option("--set", help="Value that the study needs, as NAME=VALUE; may be "
                                                                       "given several times.")] = None,
        text: Annotated[Path | None, typer.Option(help="Text file to evaluate on.")] = None,
        calibration: Annotated[str | None, typer.Option(help="Text to calibrate on.")] = None,
        task: Annotated[str | None, typer.Option(help="Tasks to evaluate on besides the text, separated by commas, in place "
                                                      "of the study's own.")] = None,
        data: Data = None,
        limit: Items = None,
        trials: Annotated[int | None, typer.Option(help="Run at most this number of trials.")] = None,
        hours: Annotated[float | None, typer.Option(help="Hours after which no further trial is begun.")] = None,
        device: Device = "cpu",
        plan_only: Annotated[bool, typer.Option("--plan", help="Only forecast time, memory and disk.")] = False,
        workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
        threads: Threads = None, as_json: AsJson = False) -> None:
    """Run a study, or resume it."""
    with answers(as_json):
        from tsotsallm.api.study import StudyOptions, plan_study, run_study

        options = StudyOptions(text, calibration, [] if task is None else task.split(","), data, limit, trials, hours,
                               device)
        if plan_only:
            found = plan_study(spec, out, model=model, given=_values(values or []), options=options)
            print_json(found.plain()) if as_json else print_forecast(found)
            return
        result = run_study(spec, out, model=model, given=_values(values or []), options=options,
                           workers=computers_from(workers, tls_ca, tls_cert, tls_key), say=to_stderr if as_json else print)
        print_json(result.plain()) if as_json else print_study(result)


@app.command("show")
def show(folder: Folder,
         notebook: Annotated[bool, typer.Option(help="Show the lab notebook instead: plan, implement, revise.")] = False,
         as_json: AsJson = False) -> None:
    """Show the trials of a study, the front, and the verdict."""
    with answers(as_json):
        from tsotsallm.api import study
        from tsotsallm.study.study import open_study

        if notebook:
            notes = study.notebook(folder)
            print_json(notes) if as_json else print_notebook(notes)
            return
        result = open_study(folder)
        print_json(result.plain()) if as_json else print_study(result)


@app.command("compare")
def compare(folder: Folder, trials: Annotated[list[int], typer.Argument(help="Numbers of the trials to compare.")],
            as_json: AsJson = False) -> None:
    """Put trials side by side: recipes, measures, time and energy."""
    with answers(as_json):
        from tsotsallm.api.study import trials_of

        chosen = trials_of(folder, trials)
        print_json([one.plain() for one in chosen]) if as_json else print_trials(chosen)


@app.command("export")
def export(folder: Folder, csv: Annotated[Path, typer.Option(help="CSV file to write, a line for every trial.")]) -> None:
    """Write the trials as a table."""
    with answers():
        from tsotsallm.api.study import export_study

        print(f"{export_study(folder, csv)} trials in {csv}")


def _values(pairs: list[str]) -> dict[str, str]:
    from tsotsallm.errors import StudyError

    for pair in pairs:
        if "=" not in pair:
            raise StudyError(f"--set takes NAME=VALUE, not {pair!r}")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def print_forecast(found: StudyForecast) -> None:
    """Print how long a study is likely to take, and for what, then memory and disk."""
    from tsotsallm.units import human_bytes, human_seconds

    shared = "" if found.apart_s < 1.01 * found.made_s else (
        f" ({human_seconds(found.apart_s)} without what recipes have in common)")
    tasks = f", and {human_seconds(found.tasks_s)} or more for the tasks" if found.tasks_s else ""
    name, seconds = found.longest
    print(f"recipes   {found.recipes}\n"
          f"time      {human_seconds(found.seconds)}: {human_seconds(found.made_s)} to make the models{shared}, "
          f"{human_seconds(found.evaluated_s)} for the text{tasks}\n"
          f"longest   {name}, {human_seconds(seconds)} to make\n"
          f"memory    {human_bytes(found.ram_bytes)} ({human_bytes(found.free_ram_bytes)} are free)\n"
          f"disk      {human_bytes(found.disk_bytes)}, and at most {human_bytes(found.store_bytes)} for what recipes have "
          f"in common ({human_bytes(found.free_disk_bytes)} are free)")
    if not found.runs:
        print("note      some passes never ran on this computer; their time is by passes elsewhere")
    if found.finished:
        print(f"note      {found.finished} more recipes are finished already")
    if found.hours is not None:
        print(f"note      no recipe begins after {found.hours:g} hours")
    for note in found.notes:
        print(f"note      {note}")
    for name, why in found.impossible.items():
        print(f"note      {name} cannot be applied: {why}")


def print_study(result: Found) -> None:
    """Print one row per trial, then the verdict, and where ledger and report are."""
    from tsotsallm.cli.lines import table
    from tsotsallm.study.verdict import size_of, verdict_lines
    from tsotsallm.units import human_bytes, plus_minus

    best = {trial.number for trial in result.front}
    rows = []
    for trial in result.trials:
        measured = trial.measures.get(trial.level, {})
        rows.append([f"{trial.number:3} {trial.name}{' *' if trial.number in best else ''}", trial.status,
                     plus_minus(measured["kl"], measured["kl_error"]) if measured else trial.error,
                     f"{measured['perplexity']:.4g}" if measured else "",
                     human_bytes(trial.measures["model"]["bytes"]) if "model" in trial.measures else "", trial.level])
    table("Trials (* on the front)", ["trial", "status", "KL", "perplexity", "bytes", "evaluation"], rows)
    if found := verdict_lines(result.trials, size_of(result.objectives)):
        print("\nThe best recipe at each size", *found, "", sep="\n")
    print(f"ledger  {result.folder}")
    if (report := result.folder / "report.html").exists():
        print(f"report  {report}")


def print_trials(trials: list[Trial]) -> None:
    """Print one column per trial: recipe, reason, status, measures, time and energy."""
    import json

    from tsotsallm.cli.lines import table

    rows = [["recipe", *("\n".join(json.dumps(stage) for stage in trial.recipe) for trial in trials)],
            ["reason", *(trial.reason for trial in trials)], ["status", *(trial.error or trial.status for trial in trials)]]
    for level in ("model", "cheap", "full"):
        names = sorted({name for trial in trials for name in trial.measures.get(level, {})})
        rows += [[f"{level} {name}", *(_cell(trial.measures.get(level, {}).get(name)) for trial in trials)]
                 for name in names]
    rows += [[name, *(_cell(trial.facts.get(name)) for trial in trials)] for name in ("seconds", "energy_wh", "reused")]
    table("Trials", ["", *(f"{trial.number}: {trial.name}" for trial in trials)], rows)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def print_notebook(notes: list[JsonObject]) -> None:
    """Print the lab notebook, cycle by cycle."""
    cycle = None
    for note in notes:
        if note["cycle"] != cycle:
            cycle = note["cycle"]
            print(f"\nCycle {cycle}")
        print(f"  {note['phase']}: {note['text']}")
