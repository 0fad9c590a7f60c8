"""Commands: compress, plan, inspect, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tsotsallm.cli.common import AsJson, Device, Model, RecipeText, Restart, Threads, Window, Windows, answers, print_json

app = typer.Typer(rich_markup_mode=None)
Scratch = Annotated[Path | None, typer.Option(help="Directory for hidden states (default: beside the result).")]
Calibration = Annotated[str | None, typer.Option(help="Text file, directory of texts, or hub data set.")]


@app.command()
def compress(model: Model, recipe: RecipeText,
             out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")],
             calibration: Calibration = None, windows: Windows = 32, window: Window = 1024,
             seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0,
             device: Device = "cpu", scratch: Scratch = None,
             keep_stages: Annotated[bool, typer.Option(help="Keep the model after every stage, in OUT-stages.")] = False,
             force: Annotated[bool, typer.Option(help="Start although memory or disk seem too small.")] = False,
             restart: Restart = False,
             task: Annotated[str | None, typer.Option(help="Tasks to ask the original and every stage's model, with commas "
                                                           "between.")] = None,
             data: Annotated[Path | None, typer.Option(help="Data of a task, or a folder with those of several.")] = None,
             limit: Annotated[int | None, typer.Option(help="So many items of every task.")] = None,
             threads: Threads = None, as_json: AsJson = False) -> None:
    """Make a model smaller by a recipe, one layer at a time."""
    with answers(as_json):
        from tsotsallm.api import measuring, reducing
        from tsotsallm.console.lines import progress_bar, step_bar
        from tsotsallm.console.measuring import print_stages
        from tsotsallm.console.reducing import print_result
        from tsotsallm.errors import TsotsallmError
        from tsotsallm.evaluation.examination import check_tasks

        tasks = task.split(",") if task else []
        if tasks:
            check_tasks(tasks, data=data, limit=limit)
        elif data is not None or limit is not None:
            raise TsotsallmError("--data and --limit belong to --task, which is not given")
        bar, show = progress_bar(as_json)
        with bar:
            result = reducing.compress(model, recipe, out, calibration=calibration, windows=windows, window=window,
                                       seed=seed, device=device, scratch=scratch,
                                       keep_stages=keep_stages or bool(tasks), force=force, restart=restart, progress=show)
        if not as_json:
            print_result(result)
        found = None
        if tasks:
            asking, tick = step_bar(as_json)
            with asking:
                found = measuring.examine_stages(model, result, tasks, data=data, limit=limit, device=device, tick=tick)
            if not as_json:
                print_stages(found)
        if as_json:
            print_json(result.plain() | ({"examination": found.plain()} if found is not None else {}))


@app.command()
def plan(model: Model, recipe: RecipeText,
         out: Annotated[Path, typer.Option("-o", "--out", help="Where the result would go.")] = Path("result"),
         calibration: Calibration = None, windows: Windows = 32, window: Window = 1024, device: Device = "cpu",
         keep_stages: Annotated[bool, typer.Option(help="Forecast a run that keeps every stage.")] = False,
         threads: Threads = None, as_json: AsJson = False) -> None:
    """Forecast memory, disk, time and resulting bytes of a recipe.

    No tensor is read.
    """
    with answers(as_json):
        from tsotsallm.compression import plan
        from tsotsallm.console.reducing import print_plan

        forecast = plan(model, recipe, out, calibration=calibration, windows=windows, window=window, device=device,
                        keep_stages=keep_stages)
        print_json(forecast.plain()) if as_json else print_plan(forecast)


@app.command()
def inspect(model: Annotated[str, typer.Argument(help="Checkpoint directory, hub id, GGUF file, or 'embedded' for the model "
                                                      "that comes along.")], as_json: AsJson = False) -> None:
    """Show what a checkpoint or a GGUF file is made of.

    Widths, parameters, bytes by part, cache and work per token.
    """
    with answers(as_json):
        from tsotsallm.api import reducing
        from tsotsallm.console.reducing import print_anatomy

        found = reducing.inspect(model)
        print_json(found.plain()) if as_json else print_anatomy(str(model), found)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the packaged recipes."""
    with answers(as_json):
        from tsotsallm.recipe import packaged_recipes

        texts = {name: file.read_text("utf-8") for name, file in packaged_recipes().items()}
        if as_json:
            print_json(texts)
            return
        for name, text in texts.items():
            print(f"{name}\n" + "".join(f"    {line}\n" for line in text.splitlines()))
