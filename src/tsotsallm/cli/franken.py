"""tsotsallm franken: the layer-order study of FRANKEN-LLAMA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsotsallm.cli.common import AsJson, Device, ItemsSeed, Model, Scratch, Threads, answers, print_json, to_stderr

if TYPE_CHECKING:
    from tsotsallm.evaluation.franken import OrderResult


def franken(model: Model,
            text: Annotated[Path | None, typer.Option(help="UTF-8 text file for perplexity and KL divergence.")] = None,
            task: Annotated[str | None, typer.Option(help="Task for the accuracy, such as hellaswag.")] = None,
            data: Annotated[Path | None, typer.Option(help="File with the data of the task.")] = None,
            limit: Annotated[int | None, typer.Option(help="Evaluate at most this number of windows and of items.")] = None,
            seed: ItemsSeed = 0, device: Device = "cpu", scratch: Scratch = None, threads: Threads = None,
            as_json: AsJson = False) -> None:
    """Run the 25 layer orders of FRANKEN-LLAMA on a model.

    Skipped, repeated and reordered layers, side by side.
    """
    with answers(as_json):
        from tsotsallm.api.franken import franken
        from tsotsallm.cli.lines import step_bar

        bar, show = step_bar(as_json)
        with bar:
            results = []
            for result in franken(model, text, task=task, data=data, limit=limit, seed=seed, device=device,
                                  scratch=scratch, tick=show):
                results.append(result)
                if not as_json:
                    to_stderr(f"{result.name}: {result.completion!r}")
        print_json([one.plain() for one in results]) if as_json else print_orders(results)


def print_orders(results: list[OrderResult]) -> None:
    """Print one row per order; the published accuracy (of another model, on 50 questions) beside ours."""
    from tsotsallm.cli.lines import table
    from tsotsallm.units import human_bytes

    rows = []
    for one in results:
        accuracy = "" if one.accuracy is None else f"{100 * one.accuracy:.1f} ± {100 * (one.accuracy_error or 0):.1f}"
        rows.append([one.name, _runs(one.order), f"{one.perplexity:.4g}", f"{one.kl:.3g}", accuracy,
                     "" if one.published_hellaswag is None else f"{100 * one.published_hellaswag:.0f}",
                     "" if one.decode_tokens_per_s is None else f"{one.decode_tokens_per_s:.1f}",
                     f"{one.macs_per_token / 1e6:.3g}", human_bytes(one.bytes)])
    table("Layer orders", ["order", "layers", "perplexity", "KL", "accuracy %", "published %", "tokens/s", "M MACs",
                           "bytes"], rows)


def _runs(order: list[int]) -> str:
    """An order of layers in short: 0-3, 5, 5, 6."""
    runs: list[list[int]] = []
    for layer in order:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
