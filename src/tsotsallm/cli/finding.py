"""Commands: fit, study, report, worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tsotsallm.cli.common import (
    AsJson,
    Model,
    Restart,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    Windows,
    Workers,
    answers,
    computers_from,
    print_json,
    to_stderr,
)
from tsotsallm.machine import THREADS

app = typer.Typer(rich_markup_mode=None)


@app.command()
def fit(model: Model,
        out: Annotated[Path, typer.Option("-o", "--out", help="Directory for the model, its GGUF file and what was found.")],
        device: Annotated[str | None, typer.Option(help="A device by name; `tsotsallm devices` lists them.")] = None,
        size: Annotated[str | None, typer.Option("--bytes", help="Bytes of the GGUF file, such as 700MB.")] = None,
        faster_than: Annotated[float | None, typer.Option(help="Tokens a second, measured on this machine.")] = None,
        keep_text: Annotated[list[Path] | None, typer.Option(help="Texts in the languages to keep.")] = None,
        calibration: Annotated[str | None, typer.Option(help="Text file, directory of texts, or hub data set.")] = None,
        windows: Windows = 32, window: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 512,
        minutes: Annotated[float, typer.Option(help="No candidate is begun later.")] = 60.0,
        recover: Annotated[bool, typer.Option(help="Let layers learn from the original's after a cut.")] = False,
        quick: Annotated[bool, typer.Option(help="Round candidates in a third of the time, at some loss.")] = False,
        task: Annotated[str | None, typer.Option(help="Tasks to ask the original and the result, with commas "
                                                      "between.")] = None,
        data: Annotated[Path | None, typer.Option(help="Data of a task, or a folder with those of several.")] = None,
        limit: Annotated[int | None, typer.Option(help="So many items of every task.")] = None,
        seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0, restart: Restart = False,
        threads: Threads = None, as_json: AsJson = False) -> None:
    """Find the best model for a device or a size, and write it.

    Its GGUF file is written beside it.
    """
    with answers(as_json):
        from tsotsallm.api import finding
        from tsotsallm.console.finding import print_fit
        from tsotsallm.console.lines import progress_bar

        bar, show = progress_bar(as_json)
        with bar:
            found = finding.fit(model, out, device=device, size=size, faster_than=faster_than, keep_text=keep_text or (),
                                calibration=calibration, windows=windows, window=window, minutes=minutes, recover=recover,
                                quick=quick, tasks=task.split(",") if task else (), data=data, limit=limit, seed=seed,
                                restart=restart, say=to_stderr if as_json else print, progress=show)
        print_json(found[0].plain() | ({"examination": found[1].plain()} if found[1] else {})) if as_json else (
            print_fit(*found))


class _Studies(TyperGroup):
    """`tsotsallm study SPEC` runs a study; show, compare and export look at one."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args and (args[0] in self.commands or args[0].startswith("-"))
        return super().resolve_command(ctx, args if known else ["run", *args])


studies = typer.Typer(cls=_Studies, rich_markup_mode=None,
                      help="Try many recipes. `tsotsallm study SPEC -o FOLDER` runs; the others look at what was found.")


app.add_typer(studies, name="study")


Folder = Annotated[Path, typer.Argument(help="The folder of a study.")]


@studies.command("run")
def study_run(spec: Annotated[str, typer.Argument(help="YAML file or packaged name: quick, approaches, franken, "
                                                       "reference-pruning, reference-pipeline, reference-order.")],
              out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the study; an unfinished one goes on.")],
              model: Annotated[str, typer.Option(help="Checkpoint directory, hub id, or 'embedded'.")] = "embedded",
              values: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE that the study needs.")] = None,
              text: Annotated[Path | None, typer.Option(help="Text to evaluate on.")] = None,
              calibration: Annotated[str | None, typer.Option(help="Text to calibrate on.")] = None,
              trials: Annotated[int | None, typer.Option(help="At most so many trials.")] = None,
              hours: Annotated[float | None, typer.Option(help="No trial begins later.")] = None,
              workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
              threads: Threads = None, as_json: AsJson = False) -> None:
    """Run a study, or go on with it."""
    with answers(as_json):
        from tsotsallm.api import finding
        from tsotsallm.console.finding import print_study

        found = finding.run_study(spec, out, model=model, given=_pairs(values or []), text=text, calibration=calibration,
                                  trials=trials, hours=hours, workers=computers_from(workers, tls_ca, tls_cert, tls_key),
                                  say=to_stderr if as_json else print)
        print_json(found.plain()) if as_json else print_study(found)


@studies.command("show")
def study_show(folder: Folder,
               notebook: Annotated[bool, typer.Option(help="Show the lab notebook: plan, implement, revise.")] = False,
               as_json: AsJson = False) -> None:
    """Show the trials of a study, the front, and the verdict."""
    with answers(as_json):
        from tsotsallm.api import finding
        from tsotsallm.console.finding import print_notebook, print_study
        from tsotsallm.study.study import open_study

        if notebook:
            notes = finding.notebook(folder)
            print_json(notes) if as_json else print_notebook(notes)
            return
        found = open_study(folder)
        print_json(found.plain()) if as_json else print_study(found)


@studies.command("compare")
def study_compare(folder: Folder, trials: Annotated[list[int], typer.Argument(help="Numbers of trials.")],
                  as_json: AsJson = False) -> None:
    """Put trials side by side: recipes, measures, what they took."""
    with answers(as_json):
        from tsotsallm.api import finding
        from tsotsallm.console.finding import print_trials

        found = finding.trials_of(folder, trials)
        print_json([one.plain() for one in found]) if as_json else print_trials(found)


@studies.command("export")
def study_export(folder: Folder, csv: Annotated[Path, typer.Option(help="File to write, a line for every trial.")]) -> None:
    """Write the ledger as a table."""
    with answers():
        from tsotsallm.api import finding

        print(f"{finding.export_study(folder, csv)} trials in {csv}")


def _pairs(values: list[str]) -> dict[str, str]:
    from tsotsallm.errors import StudyError

    for value in values:
        if "=" not in value:
            raise StudyError(f"--set takes NAME=VALUE, but here is {value!r}")
    return {name: value for name, _, value in (one.partition("=") for one in values)}


@app.command()
def report(paths: Annotated[list[str], typer.Argument(help="A result, several results, a fit's folder, or a study's.")],
           out: Annotated[Path, typer.Option("-o", "--out", help="The page to write, such as report.html.")],
           reference: Annotated[str | None, typer.Option(help="The original, to compare results with.")] = None,
           text: Annotated[Path | None, typer.Option(help="UTF-8 text to evaluate on.")] = None,
           task: Annotated[str | None, typer.Option(help="Tasks to ask, with commas between.")] = None,
           data: Annotated[Path | None, typer.Option(help="Data of a task, or a folder with those of several.")] = None,
           limit: Annotated[int | None, typer.Option(help="So many items of every task.")] = None,
           seed: Annotated[int, typer.Option(help="Seed of the draw of items.")] = 0,
           prompts: Annotated[Path | None, typer.Option(help="Prompts to continue, one a line.")] = None,
           tokens: Annotated[int, typer.Option(help="Tokens of each continuation.")] = 40,
           speed: Annotated[bool, typer.Option(help="Measure speed and memory as well.")] = False,
           country: Annotated[str | None, typer.Option(help="ISO code (CMR, KEN, ...): energy and CO₂ as well.")] = None,
           threads: Threads = None, as_json: AsJson = False) -> None:
    """Write a page: what was done, what was lost, what it costs.

    It has pictures and works offline.
    """
    with answers(as_json):
        from tsotsallm.api import reporting
        from tsotsallm.console.lines import step_bar

        bar, show = step_bar(as_json)
        with bar:
            written = reporting.write_report(paths, out, reference=reference, text=text,
                                             tasks=task.split(",") if task else (), data=data, limit=limit, seed=seed,
                                             prompts=prompts, tokens=tokens, speed=speed, country=country, tick=show)
        if as_json:
            print_json([str(path) for path in written])
            return
        print(written[0])
        print(f"{len(written) - 1} pictures beside it, in {out.stem}-pictures" if len(written) > 1 else "no pictures")


@app.command()
def worker(scheduler: Annotated[str, typer.Argument(help="Address of the scheduler, such as tcp://192.168.1.5:8786.")],
           memory: Annotated[str | None, typer.Option(help="What jobs may take, such as 4GB (default: most of what is "
                                                           "free).")] = None,
           threads: Annotated[int | None, typer.Option(help="Threads of a job (default: all).", envvar=THREADS)] = None,
           work: Annotated[Path | None, typer.Option(help="Folder for models and results (default: in the cache).")] = None,
           name: Annotated[str | None, typer.Option(help="Name in the list of workers.")] = None,
           host: Annotated[str | None, typer.Option(help="Own address, where there are several.")] = None,
           tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None) -> None:
    """Let this computer do jobs of a cluster.

    Studies, evaluations, generation, tables.
    """
    with answers():
        from tsotsallm.cluster.worker import parse_tls, run_worker
        from tsotsallm.errors import ClusterError
        from tsotsallm.units import bytes_from_text

        most_bytes = None if memory is None else bytes_from_text(memory, "--memory", ClusterError)
        run_worker(scheduler, work=work, memory=most_bytes,
                   threads=threads, name=name, host=host, tls=parse_tls(tls_ca, tls_cert, tls_key))
