"""The pictures of an analysis, drawn from its numbers alone."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from tsotsallm.errors import MissingExtraError
from tsotsallm.files import Json
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.stages.allocation import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from tsotsallm.analysis.layers import Outliers

COLOURS = ("#1b6ca8", "#c8553d", "#588157", "#8e6c8a")
MOST_HEADS = 8
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130}
Given = ParamSpec("Given")
Drawn = TypeVar("Drawn")


def pyplot() -> ModuleType:
    """Matplotlib's pyplot, which draws to files unless it is loaded already; raises MissingExtraError without it."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "drawing pictures") from None
    if "matplotlib.pyplot" not in sys.modules:      # a notebook keeps its own backend
        matplotlib.use("Agg")
    found: ModuleType = importlib.import_module("matplotlib.pyplot")
    return found


def styled(draw: Callable[Given, Drawn]) -> Callable[Given, Drawn]:
    """Decorate a function to draw in this project's style, without changing that of the caller."""
    @functools.wraps(draw)
    def drawn(*args: Given.args, **settings: Given.kwargs) -> Drawn:
        with pyplot().rc_context(STYLE):
            return draw(*args, **settings)
    return drawn


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, bbox_inches="tight")
    pyplot().close(figure)
    return path


def _plain_ticks(axis: Axes) -> None:
    """Label a logarithmic axis with numbers such as 0.3 instead of 3·10⁻¹."""
    from matplotlib.ticker import FuncFormatter

    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _place: f"{value:g}" if f"{value:.0e}"[0] in "1235" else ""))


@styled
def attention_maps(maps: dict[str, dict[int, Tensor]], heads: Sequence[int], path: Path) -> Path:
    """Draw a row for each model and layer, a column for each head: queries down, keys to the right, logarithmic shade."""
    from matplotlib.colors import LogNorm

    rows = [(model, layer, attention) for model, layers in maps.items() for layer, attention in layers.items()]
    plot = pyplot()
    shades = plot.get_cmap("viridis").copy()
    shades.set_bad("#e8e8e8")       # what a query cannot attend to
    figure, axes = plot.subplots(len(rows), len(heads), figsize=(1.7 * len(heads) + 1.6, 1.8 * len(rows)), squeeze=False,
                                 layout="constrained")
    for line, (model, layer, attention) in zip(axes, rows, strict=True):
        for axis, head in zip(line, heads, strict=True):
            seen = attention[head].clamp(min=1e-4).tril()
            image = axis.imshow(seen.where(seen > 0, float("nan")).numpy(), cmap=shades, norm=LogNorm(1e-4, 1),
                                interpolation="nearest")
            axis.set_xticks([0, attention.shape[-1] - 1])
            axis.set_yticks([0, attention.shape[-1] - 1])
            axis.set_title(f"head {head}", fontsize=8)
        line[0].set_ylabel(f"{model}\nlayer {layer}\nquery", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("key", fontsize=8)
    figure.colorbar(image, ax=axes, label="attention", shrink=0.8)
    return _save(figure, path)


@styled
def spectra(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str, path: Path) -> Path:
    """Draw magnitude against frequency, one curve for each model and layer."""
    plot = pyplot()
    figure, axis = plot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for number, (name, (frequencies, magnitudes)) in enumerate(curves.items()):
        axis.plot(frequencies, magnitudes, label=name, linewidth=1.4, color=COLOURS[number % len(COLOURS)],
                  linestyle="-" if number < len(COLOURS) else "--")
    axis.set(xlabel="frequency along the sequence, cycles per token", ylabel="magnitude", title=title, yscale="log")
    _plain_ticks(axis)
    axis.legend(frameon=False)
    return _save(figure, path)


@styled
def importance(metrics: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Draw one panel for each metric, with a bar for each layer."""
    plot = pyplot()
    figure, axes = plot.subplots(2, 2, figsize=(8, 5), layout="constrained")
    for axis, (metric, values), colour in zip(axes.flat, metrics.items(), COLOURS, strict=True):
        axis.bar(range(len(values)), values, color=colour)
        axis.set(title=metric, xlabel="layer", ylabel="importance")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if min(values) > 0 and max(values) > 20 * min(values):
            axis.set_yscale("log")
            _plain_ticks(axis)
    return _save(figure, path)


@styled
def outliers(items: Sequence[Outliers], path: Path) -> Path:
    """Draw the weight and input peaks of every linear, layer by layer; each item has the fields of `Outliers`."""
    plot = pyplot()
    figure, axes = plot.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    names = list(dict.fromkeys(item.linear for item in items))
    colours = plot.get_cmap("tab10")
    for number, name in enumerate(names):
        mine = [item for item in items if item.linear == name]
        layers = [item.layer for item in mine]
        label = name.rpartition(".")[2]
        look: dict[str, object] = {"marker": "o", "markersize": 3, "color": colours(number)}
        axes[0].plot(layers, [item.weight_peak for item in mine], label=label, **look)
        if label not in ("k_proj", "v_proj", "up_proj"):       # their inputs are those of q_proj and gate_proj
            axes[1].plot(layers, [item.input_peak for item in mine], **look)
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(xlabel="layer", ylabel="max |w| / root mean square", title="weights")
    axes[1].set(xlabel="layer", ylabel="largest channel / median channel", title="inputs", yscale="log")
    _plain_ticks(axes[1])
    figure.legend(loc="outside right center", frameon=False)
    return _save(figure, path)


@styled
def training_curve(trained: Mapping[str, Json], path: Path) -> Path:
    """Draw the loss of every step, smoothed over a twentieth of them, and every validation.

    There is one panel for each source of samples; layers that were trained one after another share a panel.
    """
    plot = pyplot()
    samples = trained["samples"]
    if "layer" in samples[0]:
        figure, axis = plot.subplots(figsize=(5.2, 3.2), layout="constrained")
        layers = [sample["layer"] for sample in samples]
        first = [sample["curve"]["held_out"][0][1] for sample in samples]
        best = [min(loss for _, loss in sample["curve"]["held_out"]) for sample in samples]
        axis.plot(layers, first, color=COLOURS[1], marker="o", markersize=3, label="before")
        axis.plot(layers, best, color=COLOURS[0], marker="o", markersize=3, label="after")
        axis.set(xlabel="layer", ylabel="relative squared error, held out", ylim=(0, None))
        axis.legend(frameon=False)
        return _save(figure, path)
    figure, axes = plot.subplots(1, len(samples), figsize=(5.2 * len(samples), 3.2), squeeze=False, layout="constrained")
    for axis, sample in zip(axes[0], samples, strict=True):
        curve = sample["curve"]
        steps, losses = zip(*curve["loss"], strict=True)
        width = max(1, len(losses) // 20)
        smooth = [sum(losses[max(0, place - width + 1):place + 1]) / len(losses[max(0, place - width + 1):place + 1])
                  for place in range(len(losses))]
        axis.plot(steps, losses, color=COLOURS[0], alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth, color=COLOURS[0], label="training")
        axis.plot(*zip(*curve["held_out"], strict=True), color=COLOURS[1], marker="o", markersize=3, label="held out")
        axis.axvline(curve["best_step"], color="#999999", linewidth=0.8, linestyle=":")
        axis.set(xlabel="step", ylabel="loss, nats per token", title=Path(sample["source"]).name)
        axis.legend(frameon=False)
    return _save(figure, path)


@styled
def selection(decision: Mapping[str, Json], path: Path) -> Path:
    """Draw the score of every linear, layers to the right, with a frame around those that were chosen."""
    plot = pyplot()
    layers = sorted({layer for layer, _, _ in decision["scores"]})
    names = list(dict.fromkeys(name for _, name, _ in decision["scores"]))
    scores = {(layer, name): score for layer, name, score in decision["scores"]}
    table = [[scores.get((layer, name), float("nan")) for layer in layers] for name in names]
    figure, axis = plot.subplots(figsize=(0.32 * len(layers) + 2.4, 0.32 * len(names) + 1.0), layout="constrained")
    most = max(abs(score) for score in scores.values())
    image = axis.imshow(table, cmap="PuOr_r", vmin=-most, vmax=most, aspect="auto")
    for layer, name in decision["chosen"]:
        axis.add_patch(plot.Rectangle((layers.index(layer) - 0.5, names.index(name) - 0.5), 1, 1, fill=False,
                                      edgecolor="black", linewidth=1.4))
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    axis.set_xlabel("layer")
    figure.colorbar(image, label="importance for the domain, relative")
    return _save(figure, path)


@styled
def ranks(decision: Mapping[str, Json], path: Path) -> Path:
    """Draw the rank of every linear's correction, layers to the right."""
    return _by_place(decision["ranks"], "rank", "", path)


@styled
def grids(decision: Mapping[str, Json], path: Path) -> Path:
    """Draw the bits per weight of every linear, layers to the right; those of embeddings and head are in the title."""
    found = {key: 16.0 if kind == DENSE else GgmlGrid(kind).bits_per_weight for key, kind in decision["grids"].items()}
    linears = {key: bits for key, bits in found.items() if key[0].isdigit()}
    ends = ", ".join(f"{key.rpartition('.')[2]} {bits:.4g}" for key, bits in found.items() if key not in linears)
    return _by_place(linears, "bits per weight", ends, path)


def _by_place(values: Mapping[str, float], label: str, title: str, path: Path) -> Path:
    plot = pyplot()
    places = {(int(key.partition(".")[0]), key.partition(".")[2]): value for key, value in values.items()}
    layers = sorted({layer for layer, _ in places})
    names = list(dict.fromkeys(name for _, name in places))
    figure, axis = plot.subplots(figsize=(0.36 * len(layers) + 2.4, 0.32 * len(names) + 1.0), layout="constrained")
    table = [[places.get((layer, name), float("nan")) for layer in layers] for name in names]
    image = axis.imshow(table, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    axis.set_xlabel("layer")
    axis.set_title(title, fontsize=8)
    figure.colorbar(image, label=label)
    return _save(figure, path)
