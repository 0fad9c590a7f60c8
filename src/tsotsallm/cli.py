"""The command line: parse, print, exit code. The only place with handlers, progress bars and exits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tsotsallm.plan import Forecast
    from tsotsallm.run import Progress, Result

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Make LLaMA-family models small enough for the computer you have.")

Model = Annotated[str, typer.Argument(help="Checkpoint directory, hub id, or 'embedded' for the model that comes along.")]
RecipeText = Annotated[str, typer.Argument(help="YAML file, packaged name, inline YAML, or one line such as "
                                                "'depth:2, wanda:2:4, gptq:4'.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda where there is a GPU.")]
Windows = Annotated[int, typer.Option(help="Calibration windows.")]
Window = Annotated[int, typer.Option(help="Tokens of a calibration window (at most what the model knows).")]
Scratch = Annotated[Path | None, typer.Option(help="Directory for hidden states (default: beside the result).")]


@contextmanager
def _answers(as_json: bool = False) -> Iterator[None]:
    """Turn errors into one line on stderr and an exit code: 1 for a user's error, 130 for Ctrl-C."""
    from tsotsallm.errors import TsotsallmError

    _quiet_libraries()
    try:
        yield
    except TsotsallmError as error:
        _fail(str(error), type(error).__name__, as_json)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue after the last finished layer", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except OSError as error:
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the free "
              "space", type(error).__name__, as_json)


def _fail(message: str, kind: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"error": kind, "message": message}))
    else:
        print(f"tsotsallm: {message}", file=sys.stderr)
    raise typer.Exit(1)


def _quiet_libraries() -> None:
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))


def _table(title: str, header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _progress(quiet: bool) -> tuple[Any, Callable[[Progress], None]]:
    """A progress bar with layer, stage, ETA, current and peak memory."""
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
        whole_model = now.layer == 0 and now.step in ("leaving one out", "forward", "backward", "measuring")
        done = now.share if whole_model else (now.layer + 0.9 * now.share) / now.layers
        where = "" if whole_model else f" {min(now.layer + 1, now.layers)}/{now.layers}"
        bar.update(tasks[now.sweep], completed=min(done, 1.0), description=f"{now.stages}{where} {now.step}",
                   memory=f"{human_bytes(rss_bytes())}, peak {human_bytes(peak_rss_bytes())}")
    return bar, show


def _print_plan(forecast: Forecast) -> None:
    from tsotsallm.machine import human_bytes, human_seconds

    rows = [[f"{number}. {' + '.join(sweep.stages) or 'copy'}", str(sweep.layers), human_bytes(sweep.ram_bytes),
             human_bytes(sweep.scratch_bytes), f"{sweep.flops:.3g}", human_seconds(sweep.floor_s)]
            for number, sweep in enumerate(forecast.sweeps, 1)]
    _table("Plan", ["sweep", "layers", "RAM", "scratch", "operations", "floor of time"], rows)
    print(f"calibration {forecast.windows} windows of {forecast.window} tokens")
    print(f"parameters  {forecast.parameters:,} -> {forecast.result_parameters:,}")
    print(f"weights     {human_bytes(forecast.bytes)} -> {human_bytes(forecast.result_bytes)} at most")
    print(f"memory      {human_bytes(forecast.ram_bytes)} needed, {human_bytes(forecast.free_ram_bytes)} free")
    print(f"disk        {human_bytes(forecast.disk_bytes)} needed, {human_bytes(forecast.free_disk_bytes)} free")
    print(f"time        at least {human_seconds(forecast.floor_s)}, at {forecast.flops_per_second / 1e9:.0f} GFLOP/s "
          "(float32, measured now)")
    for warning in forecast.warnings:
        print(f"note        {warning}")


def _print_result(result: Result) -> None:
    from tsotsallm.machine import human_bytes, human_seconds

    _table("Result", ["", "before", "after", "ratio"], [
        ["parameters", f"{result.parameters:,}", f"{result.result_parameters:,}",
         f"{result.result_parameters / result.parameters:.3f}"],
        ["weights on disk", human_bytes(result.bytes), human_bytes(result.result_bytes),
         f"{result.result_bytes / result.bytes:.3f}"]])
    print(f"took {human_seconds(result.elapsed_s)} (floor {human_seconds(result.floor_s)}), "
          f"peak memory {human_bytes(result.peak_rss_bytes)}")
    for stage in result.stages:
        print(f"stage   {stage}")
    print(f"model   {result.path}")


@app.command()
def compress(model: Model, recipe: RecipeText,
             out: Annotated[Path, typer.Option("-o", "--out", help="Directory to write; must not exist.")],
             calibration: Annotated[str | None, typer.Option(help="Text file, directory of texts, or hub data set.")] = None,
             windows: Windows = 32, window: Window = 1024,
             seed: Annotated[int, typer.Option(help="Seed of the choice of windows.")] = 0,
             device: Device = "cpu", scratch: Scratch = None,
             keep_stages: Annotated[bool, typer.Option(help="Keep the model after every stage, in OUT-stages.")] = False,
             force: Annotated[bool, typer.Option(help="Start although memory or disk seem too small.")] = False,
             as_json: AsJson = False) -> None:
    """Apply a recipe to a checkpoint, one layer at a time, and write a smaller one."""
    with _answers(as_json):
        from tsotsallm import api

        bar, show = _progress(as_json)
        with bar:
            result = api.compress(model, recipe, out, calibration=calibration, windows=windows, window=window, seed=seed,
                                  device=device, scratch=scratch, keep_stages=keep_stages, force=force, progress=show)
        _print_json(result.plain()) if as_json else _print_result(result)


@app.command()
def plan(model: Model, recipe: RecipeText,
         out: Annotated[Path, typer.Option("-o", "--out", help="Where the result would go.")] = Path("result"),
         windows: Windows = 32, window: Window = 1024, device: Device = "cpu",
         keep_stages: Annotated[bool, typer.Option(help="Forecast a run that keeps every stage.")] = False,
         as_json: AsJson = False) -> None:
    """Forecast memory, disk, time and resulting bytes without reading a tensor."""
    with _answers(as_json):
        from tsotsallm import api

        forecast = api.plan(model, recipe, out, windows=windows, window=window, device=device, keep_stages=keep_stages)
        _print_json(forecast.plain()) if as_json else _print_plan(forecast)


@app.command()
def evaluate(model: Model,
             text: Annotated[Path | None, typer.Option(help="UTF-8 text to score.")] = None,
             context: Annotated[int, typer.Option(help="Tokens of a window, BOS included.")] = 512,
             protocol: Annotated[str, typer.Option(help="windows, or rows (each line by itself).")] = "windows",
             reference: Annotated[str | None, typer.Option(help="The original, for KL divergence.")] = None,
             limit: Annotated[int | None, typer.Option(help="Score the first so many windows only.")] = None,
             device: Device = "cpu", scratch: Scratch = None, as_json: AsJson = False) -> None:
    """Perplexity, bits per byte and KL divergence from the original, one layer in memory."""
    with _answers(as_json):
        from tsotsallm import api
        from tsotsallm.errors import TsotsallmError, nearest

        if protocol not in ("windows", "rows"):
            raise TsotsallmError(f"there is no protocol {protocol!r}{nearest(protocol, ('windows', 'rows'))}")
        found = api.evaluate(model, text, context=context, protocol=protocol,  # type: ignore[arg-type]
                             reference=reference, device=device, scratch=scratch, limit=limit)
        if as_json:
            _print_json(found.plain())
            return
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
        _table(f"{found.model} on {found.protocol.text}", ["", "model", "original"], rows)
        print(f"protocol: {found.protocol.kind} of {context} tokens{', one BOS each' if found.protocol.bos else ''}, "
              f"{found.protocol.predicted_tokens} predicted tokens, float32; ± is one standard error")


@app.command()
def inspect(model: Model, as_json: AsJson = False) -> None:
    """Show what a checkpoint is made of: widths, parameters, bytes by part, cache and work per token."""
    with _answers(as_json):
        from tsotsallm import api
        from tsotsallm.machine import human_bytes

        found = api.inspect(model)
        if as_json:
            _print_json(found.plain())
            return
        rows = [[part, f"{found.parameters_by_part[part]:,}", human_bytes(size), f"{size / found.bytes:.1%}"]
                for part, size in found.bytes_by_part.items()]
        rows.append(["all", f"{found.parameters:,}", human_bytes(found.bytes), "100%"])
        _table(str(model), ["part", "parameters", "bytes", "share"], rows)
        stored = "" if found.stored_layers == found.layers else f" ({found.stored_layers} stored)"
        print(f"{found.family}: {found.layers} layers{stored}, hidden {found.hidden}, feed-forward {found.feed_forward}, "
              f"{found.heads} heads of {found.head_dim}, {found.kv_heads} KV heads, vocabulary {found.vocabulary}, context "
              f"{found.context}, {'tied' if found.tied_embeddings else 'untied'} embeddings")
        print(f"stored as {found.storage}, {found.bits_per_linear_weight:.2f} bits per linear weight; KV cache "
              f"{human_bytes(found.kv_cache_bytes_per_token)} a token (16 bit); {found.macs_per_token / 1e6:.1f} million "
              "multiply-accumulates a token")


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the packaged recipes."""
    with _answers(as_json):
        from tsotsallm.recipe import packaged_recipes

        texts = {name: file.read_text("utf-8") for name, file in packaged_recipes().items()}
        if as_json:
            _print_json(texts)
            return
        for name, text in texts.items():
            print(f"{name}\n" + "".join(f"    {line}\n" for line in text.splitlines()))


def main() -> None:
    app()


if __name__ == "__main__":
    main()
