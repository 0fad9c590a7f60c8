"""Commands: evaluate, analyze, franken, tasks, devices."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tsotsallm.cli.common import (
    AsJson,
    Device,
    Model,
    Threads,
    TlsCa,
    TlsCert,
    TlsKey,
    Workers,
    answers,
    computers_from,
    print_json,
    to_stderr,
)

app = typer.Typer(rich_markup_mode=None)
Scratch = Annotated[Path | None, typer.Option(help="Directory for hidden states (default: the system's temporary one).")]


@app.command()
def evaluate(models: Annotated[list[str], typer.Argument(help="Checkpoints, or GGUF files; differences are to the first.")],
             text: Annotated[Path | None, typer.Option(help="UTF-8 text to take the perplexity of.")] = None,
             task: Annotated[str | None, typer.Option(help="Tasks by name, YAML or BIG-bench JSON file, with commas "
                                                           "between; `tsotsallm tasks` lists them.")] = None,
             harness: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness.")] = None,
             data: Annotated[Path | None, typer.Option(help="Data of a task, or a folder with those of several.")] = None,
             limit: Annotated[int | None, typer.Option(help="So many items, drawn by the seed; the first windows.")] = None,
             seed: Annotated[int, typer.Option(help="Seed of the draw of items.")] = 0,
             context: Annotated[int, typer.Option(help="Tokens of a window of --text, BOS included.")] = 512,
             protocol: Annotated[str, typer.Option(help="Of --text: windows, or rows (each line by itself).")] = "windows",
             reference: Annotated[str | None, typer.Option(help="The original, for KL divergence.")] = None,
             kv: Annotated[str, typer.Option(help="Of a GGUF file: types of its key-value cache (f32, f16, q8_0, q4_0), "
                                                  "with commas between.")] = "f16",
             speed: Annotated[bool, typer.Option(help="Measure speed and memory as well.")] = False,
             country: Annotated[str | None, typer.Option(help="ISO code (CMR, KEN, ...): energy and CO₂ as well.")] = None,
             by_sweeps: Annotated[bool, typer.Option(help="Generate by sweeps although the model fits memory.")] = False,
             plan_only: Annotated[bool, typer.Option("--plan", help="Only tell how tasks would run, and how long.")] = False,
             groups: Annotated[bool, typer.Option(help="Show every group of items (subjects, languages).")] = False,
             workers: Workers = None, tls_ca: TlsCa = None, tls_cert: TlsCert = None, tls_key: TlsKey = None,
             device: Device = "cpu", scratch: Scratch = None, threads: Threads = None, as_json: AsJson = False) -> None:
    """Score models on a text or on tasks; one layer is in memory.

    With standard errors, paired differences and cost.
    """
    with answers(as_json):
        from tsotsallm.api import measuring
        from tsotsallm.console.lines import step_bar
        from tsotsallm.console.measuring import (
            print_caches,
            print_examination,
            print_forecasts,
            print_harness,
            print_perplexity,
            print_speeds,
        )
        from tsotsallm.errors import TsotsallmError, nearest
        from tsotsallm.evaluation.examination import examine, plan_examination, text_task

        _refuse_what_would_be_ignored(text=text, task=task, harness=harness, data=data, plan_only=plan_only,
                                      context=context, protocol=protocol, reference=reference)
        if protocol not in ("windows", "rows"):
            raise TsotsallmError(f"there is no protocol {protocol!r}{nearest(protocol, ('windows', 'rows'))}")
        if harness is not None:
            scored = {model: measuring.harness(model, harness.split(","), limit=limit, include=data, device=device,
                                               scratch=scratch) for model in models}
            print_json(scored) if as_json else print_harness(scored)
            return
        computers = computers_from(workers, tls_ca, tls_cert, tls_key)
        if computers is not None:
            if task is None or speed or country or plan_only or by_sweeps or device != "cpu":
                raise TsotsallmError("--workers asks tasks on a cluster; give --task, and leave --speed, --country, --plan, "
                                     "--by-sweeps and --device out")
            found = measuring.examine_on_cluster(models, task.split(","), computers, data=data, limit=limit, seed=seed,
                                                 reference=reference, say=to_stderr)
            print_json(found.plain()) if as_json else print_examination(found, groups=groups)
            return
        bar, show = step_bar(as_json)
        if any(model.endswith(".gguf") for model in models) or kv != "f16":
            if country or plan_only or by_sweeps or protocol != "windows":
                raise TsotsallmError("--country, --plan, --by-sweeps and --protocol do not reach GGUF files, which are "
                                     "scored in windows; leave them out, or give the checkpoint")
            if speed:
                speeds = measuring.gguf_speeds(models, text=text, task=task, kv=kv, reference=reference)
                print_json({model: asdict(one) for model, one in speeds.items()}) if as_json else (
                    print_speeds(speeds))
                return
            with bar:
                caches = measuring.evaluate_gguf(models, text, kv=kv.split(","), context=context, reference=reference,
                                                 limit=limit, task=task, tick=show)
            print_json([one.plain() for one in caches]) if as_json else print_caches(caches)
            return
        if task is None and len(models) == 1 and not (speed or country or plan_only):
            with bar:
                one = measuring.evaluate(models[0], text, context=context, protocol=protocol,  # type: ignore[arg-type]
                                         reference=reference, device=device, scratch=scratch, limit=limit, tick=show)
            print_json(one.plain()) if as_json else print_perplexity(one)
            return
        if task is None and text is None and "embedded" not in (*models, reference):
            raise TsotsallmError("give the text to evaluate on with --text FILE, or a task with --task; only the embedded "
                                 "model brings its own text")
        asked: list[Any] = task.split(",") if task is not None else [
            text_task(context, protocol, world=text is None)]   # type: ignore[arg-type]
        data = data if task is not None else text
        if plan_only:
            forecasts = plan_examination(models, asked, data=data, limit=limit, seed=seed, device=device,
                                         by_sweeps=by_sweeps or None)
            print_json([one.plain() for one in forecasts]) if as_json else print_forecasts(forecasts)
            return
        with bar:
            found = examine(models, asked, data=data, limit=limit, seed=seed, reference=reference, device=device,
                            speed=speed, country=country, by_sweeps=by_sweeps or None, scratch=scratch, tick=show)
        print_json(found.plain()) if as_json else print_examination(found, groups=groups)


def _refuse_what_would_be_ignored(*, text: Path | None, task: str | None, harness: str | None, data: Path | None,
                                  plan_only: bool, context: int, protocol: str, reference: str | None) -> None:
    """Raise where options do not belong together."""
    from tsotsallm.errors import TsotsallmError

    if sum(one is not None for one in (text, task, harness)) > 1:
        raise TsotsallmError("--text, --task and --harness are three kinds of evaluation; choose one at a time")
    if data is not None and task is None and harness is None:
        raise TsotsallmError("--data belongs to --task or --harness; a text to score is given with --text")
    if (task or harness) and (context != 512 or protocol != "windows"):
        raise TsotsallmError("--context and --protocol are of --text; a task's own file says its context and protocol")
    if harness and (plan_only or reference):
        raise TsotsallmError("--plan and --reference do not reach tasks of lm-evaluation-harness; leave them out")


@app.command()
def analyze(model: Model,
            out: Annotated[Path, typer.Option("-o", "--out", help="Directory for the pictures and analysis.json.")],
            text: Annotated[Path | None, typer.Option(help="UTF-8 text to look at the model with.")] = None,
            reference: Annotated[str | None, typer.Option(help="The original, to draw beside it.")] = None,
            layers: Annotated[str | None, typer.Option(help="Layers, such as 0,7,-1 (default: first and last).")] = None,
            heads: Annotated[str | None, typer.Option(help="Heads, such as 0,1,2 (default: the first eight).")] = None,
            tokens: Annotated[int, typer.Option(help="Tokens of the text that are looked at.")] = 256,
            picture: Annotated[str, typer.Option(help="png or svg.")] = "png",
            device: Device = "cpu", scratch: Scratch = None, threads: Threads = None, as_json: AsJson = False) -> None:
    """Look inside: attention, importance of layers, outliers.

    Writes pictures and a JSON file.
    """
    with answers(as_json):
        from tsotsallm.api import measuring
        from tsotsallm.console.lines import step_bar
        from tsotsallm.errors import TsotsallmError

        if picture not in ("png", "svg"):
            raise TsotsallmError(f"--picture is {picture!r}; it takes png or svg")
        bar, show = step_bar(as_json)
        with bar:
            found = measuring.analyze(model, text, out, reference=reference, layers=_numbers(layers), heads=_numbers(heads),
                                      tokens=tokens, picture=picture,  # type: ignore[arg-type]
                                      device=device, scratch=scratch, tick=show)
        if as_json:
            print_json(found.plain())
            return
        for path in found.files:
            print(path)


def _numbers(text: str | None) -> list[int] | None:
    from tsotsallm.errors import TsotsallmError

    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise TsotsallmError(f"{text!r} is not a list of numbers, such as 0,7,-1") from None


@app.command()
def franken(model: Model,
            text: Annotated[Path | None, typer.Option(help="UTF-8 text for perplexity and KL divergence.")] = None,
            task: Annotated[str | None, typer.Option(help="A task for the accuracy, such as hellaswag.")] = None,
            data: Annotated[Path | None, typer.Option(help="Data of the task.")] = None,
            limit: Annotated[int | None, typer.Option(help="So many windows and items.")] = None,
            seed: Annotated[int, typer.Option(help="Seed of the draw of items.")] = 0,
            device: Device = "cpu", scratch: Scratch = None, threads: Threads = None, as_json: AsJson = False) -> None:
    """Run the 25 layer orders of FRANKEN-LLAMA on a model.

    Skipped, repeated, reordered layers, side by side.
    """
    with answers(as_json):
        from tsotsallm.api import measuring
        from tsotsallm.console.lines import step_bar
        from tsotsallm.console.measuring import print_orders

        bar, show = step_bar(as_json)
        with bar:
            found = []
            for one in measuring.franken(model, text, task=task, data=data, limit=limit, seed=seed, device=device,
                                         scratch=scratch, tick=show):
                found.append(one)
                if not as_json:
                    bar.console.print(f"{one.name}: {one.completion!r}", markup=False, highlight=False)
        print_json([one.plain() for one in found]) if as_json else print_orders(found)


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """List the packaged evaluation tasks."""
    with answers(as_json):
        from tsotsallm.console.lines import table
        from tsotsallm.evaluation.tasks import packaged_tasks, read_task

        found = [read_task(name) for name in packaged_tasks()]
        if as_json:
            print_json({task.name: task.plain() | {"about": task.about, "hub": dict(task.hub)} for task in found})
            return
        table("Tasks", ["task", "kind", "about"], [[task.name, task.kind, task.about] for task in found])


@app.command()
def devices(as_json: AsJson = False) -> None:
    """List the target devices, with what each has for a model."""
    with answers(as_json):
        from tsotsallm.console.lines import table
        from tsotsallm.evaluation import cost
        from tsotsallm.units import human_bytes

        found = cost.devices()
        if as_json:
            print_json(found)
            return
        table("Devices", ["device", "for weights and cache", "about", "source"],
              [[name, human_bytes(facts["weight_bytes"]), facts["about"], facts["source"]]
                       for name, facts in found.items()])
