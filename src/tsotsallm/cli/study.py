"""tsotsallm study: many recipes tried and compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsotsallm.cli.common import (
    AsJson,
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
        trials: Annotated[int | None, typer.Option(help="Run at most this number of trials.")] = None,
        hours: Annotated[float | None, typer.Option(help="Hours after which no further trial is begun.")] = None,
        workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
        threads: Threads = None, as_json: AsJson = False) -> None:
    """Run a study, or resume it."""
    with answers(as_json):
        from tsotsallm.api.study import run_study

        result = run_study(spec, out, model=model, given=_values(values or []), text=text, calibration=calibration,
                           trials=trials, hours=hours, workers=computers_from(workers, tls_ca, tls_cert, tls_key),
                           say=to_stderr if as_json else print)
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


def print_study(result: Found) -> None:
    """Print one row per trial, then the hypervolume, the verdict, and where ledger and report are."""
    from tsotsallm.cli.lines import table
    from tsotsallm.study.verdict import size_of, verdict_markdown
    from tsotsallm.units import human_bytes

    best = {trial.number for trial in result.front}
    rows = []
    for trial in result.trials:
        measured = trial.measures.get(trial.level, {})
        rows.append([f"{trial.number:3} {trial.name}{' *' if trial.number in best else ''}", trial.status,
                     f"{measured['kl']:.4f} ± {measured['kl_error']:.4f}" if measured else trial.error,
                     f"{measured['perplexity']:.3f}" if measured else "",
                     human_bytes(trial.measures["model"]["bytes"]) if "model" in trial.measures else "", trial.level])
    table("Trials (* on the front)", ["trial", "status", "KL", "perplexity", "bytes", "evaluation"], rows)
    print(f"hypervolume {result.hypervolume:.6g} up to {', '.join(f'{one:.4g}' for one in result.reference)}")
    print(verdict_markdown(result.trials, size_of(result.objectives)))
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
