"""The pictures of an analysis, drawn from its numbers alone."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tsotsallm.errors import MissingExtraError
from tsotsallm.files import Json
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.stages.allocation import DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from tsotsallm.analysis.layers import Outliers

COLOURS = ("#1b6ca8", "#c8553d", "#d9a441", "#8e6c8a")
"""No green: some people see it as the red."""
DISTINCT = ("#0072b2", "#e69f00", "#56b4e9", "#cc79a7", "#000000", "#d55e00", "#999999")
"""Colours that people who see red and green alike tell apart (Okabe and Ito, without green)."""
DARK = "#2b3038"
ORIGINAL, ALL_LAYERS = "original", "all layers"
"""What the line of a baseline is called: the model's original, or the model that layers are left out of."""
MARKERS = "os^Dv<>"
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


def plain_ticks(axis: Axes) -> None:
    """Label a logarithmic axis with numbers such as 0.3 instead of 3·10⁻¹."""
    from matplotlib.ticker import FuncFormatter

    if axis.get_yscale() != "log":
        return
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _place: f"{value:g}" if f"{value:.0e}"[0] in "125" else ""))


def values_by_place(axis: Axes, values: Sequence[float], colours: Sequence[str], baseline: float | None = None, *,
                    named: str = ORIGINAL, places: Sequence[int] | None = None,
                    markers: Sequence[str] | None = None) -> list[Any]:
    """Draw one value per place, and return the marks: bars from zero; points where the axis has no zero.

    It has none where it is logarithmic (positive values that span more than a factor of 30), where all values are of
    similar size, and where there is a `baseline`, which is drawn as a line and `named` at its end. With `markers` there are
    open points in any case, of which several may have one of the `places`.
    """
    places = range(len(values)) if places is None else places
    least, most = min(values), max(values)
    wide = least > 0 and most > 30 * least
    if not wide and baseline is None and markers is None and not 0 < most < 2 * least:
        return list(axis.bar(places, values, color=list(colours)))
    if wide:
        axis.set_yscale("log")
        plain_ticks(axis)
    marks = [axis.plot(place, value, marker=marker, markersize=5, color=colour, linestyle="",
                       markerfacecolor=colour if markers is None else "none")[0]
             for place, value, colour, marker in zip(places, values, colours, markers or "o" * len(values), strict=True)]
    if baseline is not None:
        axis.axhline(baseline, color="#777777", linewidth=0.9, linestyle="--", zorder=0)
        axis.annotate(named, (1.0, baseline), xycoords=("axes fraction", "data"), xytext=(3, 0),
                      textcoords="offset points", va="center", color="#555555")
    return marks


BITS = (1.5, 2.625, 3.4375, 4.25, 4.5, 5.5, 6.5625, 8.5, 16.0, 32.0)
"""Bits per weight of the grids in use, whose colours are equally far apart."""
ALIKE = 1.03
"""Grids whose bits differ by a smaller factor share a colour and a name: integer grids have scales beside their codes."""


def classes_of_bits(values: Iterable[float]) -> list[tuple[float, str]]:
    """(bits per weight, name) of every grid among the values, from the smallest: 4.5, 5.5, 6.56, or a range of two."""
    found: list[list[float]] = []
    for value in sorted(set(values)):
        if found and value <= ALIKE * found[-1][0]:
            found[-1].append(value)
        else:
            found.append([value])
    names = [(f"{some[0]:.3g}", f"{some[-1]:.3g}") for some in found]
    return [(some[0], low if low == high else f"{low} to {high}") for some, (low, high) in zip(found, names, strict=True)]


def colour_of_bits(bits: float) -> Any:
    """The colour that stands for bits per weight in every picture."""
    place = sum(bits >= known for known in BITS) - 1
    if not 0 <= place < len(BITS) - 1:
        return pyplot().get_cmap("viridis")(0.0 if place < 0 else 1.0)
    low, high = BITS[place:place + 2]
    return pyplot().get_cmap("viridis")((place + (bits - low) / (high - low)) / (len(BITS) - 1))


def legend_of_bits(axis: Axes, classes: Sequence[tuple[float, str]], title: str = "bits per weight") -> None:
    """Name every colour beside the picture."""
    from matplotlib.patches import Patch

    axis.legend([Patch(facecolor=colour_of_bits(bits), label=name) for bits, name in classes],
                [name for _, name in classes], title=title, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5),
                handlelength=1.0, handleheight=1.0, alignment="left")


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
    plain_ticks(axis)
    figure.legend(loc="outside right center", frameon=False)
    return _save(figure, path)


IMPORTANCE = {"perplexity": "perplexity without the layer", "taylor": "Σ|w·∂loss/∂w|, nats per token",
              "magnitude": "Σ|w|", "cosine": "1 − cosine of input and output"}
"""Metric of a layer's importance -> what it is, with its unit."""


@styled
def importance(models: Mapping[str, Mapping[str, Sequence[float]]], path: Path, *, baseline: float | None = None,
               named: str = ORIGINAL, places: Mapping[str, Sequence[int]] | None = None) -> Path:
    """Draw one panel for each metric, with a value for each layer of each model.

    models    metric -> importance of every layer, for each model; they have their metrics in common
    baseline  a perplexity that those without a layer compare with; `named` says whose it is
    places    the original's layer behind each layer of each model; None: they are numbered as they are
    """
    plot = pyplot()
    several = len(models) > 1
    figure, axes = plot.subplots(2, 2, figsize=(8.6 + 1.2 * several, 5.4), layout="constrained")
    for axis, metric in zip(axes.flat, next(iter(models.values())), strict=True):
        values: list[float] = []
        at: list[int] = []
        colours: list[str] = []
        markers: list[str] = []
        for number, (name, metrics) in enumerate(models.items()):
            count = len(metrics[metric])
            values += metrics[metric]
            at += range(count) if places is None else places[name]
            colours += [COLOURS[number % len(COLOURS)]] * count
            markers += [MARKERS[number % len(MARKERS)]] * count
        values_by_place(axis, values, colours, baseline if metric == "perplexity" else None, named=named, places=at,
                        markers=markers if several else None)
        axis.set(title=metric, xlabel="layer" if places is None else "layer of the original", ylabel=IMPORTANCE[metric])
        axis.xaxis.get_major_locator().set_params(integer=True)
    if several:
        marks = [plot.Line2D([], [], marker=MARKERS[number % len(MARKERS)], color=COLOURS[number % len(COLOURS)],
                             markersize=5, markerfacecolor="none", linestyle="") for number in range(len(models))]
        figure.legend(marks, list(models), loc="outside right center", frameon=False)
    return _save(figure, path)


@styled
def outliers(items: Sequence[Outliers], path: Path) -> Path:
    """Draw the weight and input peaks of every linear, layer by layer; each item has the fields of `Outliers`."""
    plot = pyplot()
    figure, axes = plot.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    names = list(dict.fromkeys(item.linear for item in items))
    for number, name in enumerate(names):
        mine = [item for item in items if item.linear == name]
        layers = [item.layer for item in mine]
        label = name.rpartition(".")[2]
        look: dict[str, object] = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4,
                                   "color": DISTINCT[number % len(DISTINCT)]}
        axes[0].plot(layers, [item.weight_peak for item in mine], label=label, **look)
        if label not in ("k_proj", "v_proj", "up_proj"):       # their inputs are those of q_proj and gate_proj
            axes[1].plot(layers, [item.input_peak for item in mine], **look)
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(xlabel="layer", ylabel="max |w| / root mean square", title="weights")
    axes[1].set(xlabel="layer", ylabel="largest channel / median channel", title="inputs", yscale="log")
    plain_ticks(axes[1])
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
        axis.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside right center", frameon=False)
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
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False)
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
    names: dict[float, set[str]] = {}
    found: dict[str, float] = {}
    for key, kind in decision["grids"].items():
        found[key] = 16.0 if kind == DENSE else GgmlGrid(kind).bits_per_weight
        names.setdefault(found[key], set()).add(kind)
    linears = {key: bits for key, bits in found.items() if key[0].isdigit()}
    ends = ", ".join(f"{key.rpartition('.')[2]} {decision['grids'][key]}" for key in found if key not in linears)
    classes = [(bits, f"{', '.join(sorted(names[bits]))} ({bits:.3g})") for bits in sorted(set(linears.values()))]
    return _by_place(linears, "grid (bits per weight)", ends, path, classes)


def _by_place(values: Mapping[str, float], label: str, title: str, path: Path,
              classes: Sequence[tuple[float, str]] = ()) -> Path:
    """Draw a value for every linear, layers to the right: in the colours of bits where `classes` names them."""
    plot = pyplot()
    places = {(int(key.partition(".")[0]), key.partition(".")[2]): value for key, value in values.items()}
    layers = sorted({layer for layer, _ in places})
    names = list(dict.fromkeys(name for _, name in places))
    figure, axis = plot.subplots(figsize=(0.36 * len(layers) + 2.4, 0.32 * len(names) + 1.0), layout="constrained")
    table = [[places.get((layer, name), float("nan")) for layer in layers] for name in names]
    axis.set_xticks(range(len(layers)), layers)
    axis.set_yticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    axis.set_xlabel("layer")
    axis.set_title(title, fontsize=8)
    if classes:
        axis.imshow([[(1.0, 1.0, 1.0, 1.0) if math.isnan(value) else colour_of_bits(value) for value in row]
                     for row in table], aspect="auto")
        legend_of_bits(axis, classes, label)
    else:
        figure.colorbar(axis.imshow(table, cmap="viridis", aspect="auto"), label=label)
    return _save(figure, path)
