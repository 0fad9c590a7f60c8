"""The pictures of a report, drawn from its numbers; what a point stands for is told when it is touched."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from xml.sax.saxutils import escape

from tsotsallm.analysis.pictures import COLOURS, STYLE, pyplot
from tsotsallm.inspection import LayerMap
from tsotsallm.report.document import Figure
from tsotsallm.units import human_bytes

BITS = (1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 8.6, 12.0, 16.1, 32.1)
"""Bounds of the classes of bits a weight that colours stand for."""
BIT_NAMES = ("2", "3", "4", "5", "6", "8", "9-12", "16", "32")
PART_COLOURS = {"embeddings": "#8e6c8a", "attention": "#1b6ca8", "feed-forward": "#c8553d", "norms": "#999999",
                "head": "#588157", "adapter": "#d9a441"}


@dataclass(frozen=True)
class Point:
    """A point of a plane: where, what it is, and whether it is on the front."""

    x: float
    y: float
    told: str
    front: bool = False
    error: float = 0.0
    kind: str = ""


def _figure(name: str, caption: str, told: str, draw: Callable[[Any], tuple[Any, dict[str, str]]]) -> Figure:
    """Draw once; `draw` gives the matplotlib figure and what the elements with a gid stand for."""
    plot = pyplot()
    page = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 10}
    with plot.rc_context(STYLE | page):
        figure, tips = draw(plot)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", bbox_inches="tight", dpi=150)
        plot.close(figure)
    return Figure(name, caption, told, _for_page(svg.getvalue(), name, told, tips), png.getvalue())


def _for_page(svg: str, name: str, told: str, tips: Mapping[str, str]) -> str:
    """An SVG that can stand in a page with others: its own ids, a description, tips that a pointer or a key reaches."""
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for key, tip in tips.items():
        svg = svg.replace(f'<g id="{key}">', f'<g id="{key}" class="tip" tabindex="0" role="img" '
                          f'aria-label="{escape(tip, {chr(34): "&quot;"})}"><title>{escape(tip)}</title>')
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    head, rest = svg.split(">", 1)
    wide = re.search(r'\bwidth="([\d.]+)pt"', head)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    if wide is not None:        # text of all pictures in one size, unless the page is narrower
        head += f' style="max-width: {1.45 * float(wide[1]):.0f}px"'
    return (f'{head} role="group" aria-labelledby="{name}-told"><title id="{name}-told">{escape(told)}</title>{rest}')


def layers(name: str, found: LayerMap, caption: str) -> Figure:
    """What became of every layer: its linears by bits, layers that were removed or run several times."""
    linears = list(dict.fromkeys(key for one in found.bits for key in one))
    times = {layer: found.runs.count(layer) for layer in range(found.layers)}
    removed = [layer for layer, count in times.items() if not count]
    repeated = {layer: count for layer, count in times.items() if count > 1}
    in_order = list(found.runs) == sorted(found.runs)
    told = (f"{len(found.runs)} layers run, of {found.layers}. " + (
        f"Removed: {', '.join(map(str, removed))}. " if removed else "No layer is removed. ") + (
        "Run several times: " + ", ".join(f"{layer} ({count} times)" for layer, count in repeated.items()) + ". "
        if repeated else "") + ("" if in_order else f"They run in the order {', '.join(map(str, found.runs))}. ") + (
        "Bits a weight: " + ", ".join(f"{part} {bits:.3g}" for part, bits in _mean_bits(found).items()) + "."))

    def draw(plot: Any) -> tuple[Any, dict[str, str]]:
        from matplotlib.colors import BoundaryNorm
        from matplotlib.patches import Rectangle

        shades = plot.get_cmap("viridis", len(BITS) - 1)
        norm = BoundaryNorm(BITS, shades.N)
        figure, axis = plot.subplots(figsize=(max(5.2, 0.36 * found.layers + 2.6), 0.34 * (len(linears) + 1) + 1.1))
        tips = {}
        for layer in range(found.layers):
            places = [place for place, run in enumerate(found.runs) if run == layer]
            for row, linear in enumerate(linears):
                key = f"cell-{layer}-{row}"
                if not places:
                    patch = Rectangle((layer - 0.45, row - 0.45), 0.9, 0.9, facecolor="white", edgecolor="#c4c4c4",
                                      linewidth=0.6, hatch="////")
                    tips[key] = f"layer {layer} is removed"
                else:
                    bits = found.bits[places[0]][linear]
                    patch = Rectangle((layer - 0.45, row - 0.45), 0.9, 0.9, facecolor=shades(norm(min(bits, 32))),
                                      edgecolor="none")
                    tips[key] = f"layer {layer}, {linear}: {bits:.3g} bits a weight"
                patch.set_gid(key)
                axis.add_patch(patch)
            if not places or len(places) > 1:
                axis.text(layer, -0.95, "×" if not places else f"{len(places)}×", ha="center", va="center",
                          color="#a03020" if not places else "#1b4f80", fontweight="bold")
        axis.set(xlim=(-0.6, found.layers - 0.4), ylim=(len(linears) - 0.4, -1.5 if removed or repeated else -0.6),
                 xlabel="layer of the original")
        axis.set_xticks(range(0, found.layers, 1 if found.layers <= 20 else 2))
        axis.set_yticks(range(len(linears)), [linear.rpartition(".")[2] for linear in linears])
        axis.tick_params(length=0)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
        bar = figure.colorbar(plot.cm.ScalarMappable(norm, shades), ax=axis, label="bits a weight", pad=0.02,
                              spacing="uniform")
        bar.set_ticks([(low + high) / 2 for low, high in pairwise(BITS)], labels=BIT_NAMES)
        bar.ax.tick_params(length=0)
        return figure, tips

    return _figure(name, caption, told, draw)


def _mean_bits(found: LayerMap) -> dict[str, float]:
    linears = [bits for one in found.bits for bits in one.values()]
    return {"linears on average": sum(linears) / len(linears), **found.ends}


def bytes_by_part(name: str, sizes: Mapping[str, Mapping[str, int]], caption: str) -> Figure:
    """One bar a model, its parts by colour."""
    told = "; ".join(f"{model}: {human_bytes(sum(parts.values()))} ("
                     + ", ".join(f"{part} {human_bytes(size)}" for part, size in parts.items() if size) + ")"
                     for model, parts in sizes.items())

    def draw(plot: Any) -> tuple[Any, dict[str, str]]:
        figure, axis = plot.subplots(figsize=(7.2, 0.5 * len(sizes) + 1.3))
        tips, used = {}, dict[str, Any]()
        for row, (model, parts) in enumerate(sizes.items()):
            left = 0.0
            for part, size in parts.items():
                if not size:
                    continue
                [bar] = axis.barh(row, size / 1e6, left=left, color=PART_COLOURS[part], height=0.66, edgecolor="white",
                                  linewidth=0.5)
                key = f"bar-{row}-{part}"
                bar.set_gid(key)
                tips[key] = f"{model}, {part}: {human_bytes(size)}"
                used.setdefault(part, bar)
                left += size / 1e6
            axis.text(left, row, f" {human_bytes(sum(parts.values()))}", va="center")
        axis.set_yticks(range(len(sizes)), list(sizes))
        axis.invert_yaxis()
        axis.set_xlabel("megabytes")
        axis.margins(x=0.14)
        axis.legend(list(used.values()), list(used), frameon=False, loc="lower center", ncols=len(used),
                    bbox_to_anchor=(0.4, 1.0), handlelength=1.0, columnspacing=1.2)
        return figure, tips

    return _figure(name, caption, told, draw)


def plane(name: str, points: Sequence[Point], x: str, y: str, caption: str, *, log_y: bool = True,
          log_x: bool = False) -> Figure:
    """Points with their errors, those of the front joined by a line; kinds by colour."""
    best = sorted((point for point in points if point.front), key=lambda point: point.x)
    told = f"{len(points)} points, {x} to the right, {y} upwards. " + (
        "On the front: " + "; ".join(point.told for point in best) + "." if best else "")
    kinds = list(dict.fromkeys(point.kind for point in points))

    def draw(plot: Any) -> tuple[Any, dict[str, str]]:
        figure, axis = plot.subplots(figsize=(7.2, 4.4))
        tips = {}
        if best:
            axis.step([point.x for point in best], [point.y for point in best], where="post", color="#555555", linewidth=1.0,
                      zorder=1)
        for number, point in enumerate(points):
            colour = COLOURS[kinds.index(point.kind) % len(COLOURS)]
            if point.error:
                axis.errorbar(point.x, point.y, yerr=point.error, color=colour, linewidth=0.8, zorder=2)
            [mark] = axis.plot(point.x, point.y, marker="os^D"[kinds.index(point.kind) % 4],
                               markersize=8 if point.front else 6, linestyle="", markeredgecolor=colour,
                               markerfacecolor=colour if point.front else "white", zorder=3)
            key = f"point-{number}"
            mark.set_gid(key)
            tips[key] = point.told
        axis.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear")
        if log_y and all(point.y > 0 for point in points):
            axis.set_yscale("log")
        _plain_ticks(axis)
        if len(kinds) > 1 or kinds[0]:
            marks = [plot.Line2D([], [], marker="os^D"[place % 4], linestyle="", markerfacecolor="white",
                                 markeredgecolor=COLOURS[place % len(COLOURS)]) for place in range(len(kinds))]
            axis.legend(marks, kinds, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(kinds)))
        return figure, tips

    return _figure(name, caption, told, draw)


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    if axis.get_yscale() == "log":
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _place: f"{value:g}" if f"{value:.0e}"[0] in "125" else ""))


def bars(name: str, values: Mapping[str, float], x: str, y: str, caption: str, *, marked: Sequence[str] = ()) -> Figure:
    """A bar for each of some things, those that are marked in another colour; points where all are about as much."""
    told = f"{y} by {x}: " + ", ".join(f"{key}: {value:.4g}" for key, value in values.items()) + (
        f". Marked: {', '.join(marked)}" if marked else "") + "."

    def draw(plot: Any) -> tuple[Any, dict[str, str]]:
        figure, axis = plot.subplots(figsize=(max(4.8, 0.36 * len(values) + 1.6), 3.0))
        tips = {}
        alike = 0 < max(values.values()) < 2 * min(values.values())
        for place, (key, value) in enumerate(values.items()):
            colour = COLOURS[1] if key in marked else COLOURS[0]
            [bar] = axis.plot(place, value, marker="o", color=colour, linestyle="") if alike else axis.bar(place, value,
                                                                                                           color=colour)
            bar.set_gid(f"bar-{place}")
            tips[f"bar-{place}"] = f"{x} {key}: {value:.4g}"
        axis.set_xticks(range(len(values)), list(values))
        axis.set(xlabel=x, ylabel=y)
        some = [value for value in values.values() if value > 0]
        if len(some) == len(values) and max(some) > 30 * min(some):
            axis.set_yscale("log")
            _plain_ticks(axis)
        return figure, tips

    return _figure(name, caption, told, draw)


def predictions(name: str, rounds: Sequence[Mapping[str, Any]], caption: str) -> Figure:
    """What was expected of every candidate, beside what it is."""
    told = "; ".join(f"round {one['number']} ({one['structure']}): predicted {one['predicted']:.4g}, measured "
                     f"{one['measured']:.4g}" for one in rounds)

    def draw(plot: Any) -> tuple[Any, dict[str, str]]:
        figure, axis = plot.subplots(figsize=(max(4.8, 0.9 * len(rounds) + 1.6), 3.2))
        tips = {}
        for place, one in enumerate(rounds):
            axis.plot([place, place], [one["predicted"], one["measured"]], color="#bbbbbb", linewidth=1.0, zorder=1)
            for kind, colour, marker in (("predicted", "white", "o"), ("measured", COLOURS[0], "o")):
                [mark] = axis.plot(place, one[kind], marker=marker, markersize=8, markerfacecolor=colour,
                                   markeredgecolor=COLOURS[0], linestyle="", label=kind if not place else None, zorder=2)
                mark.set_gid(f"{kind}-{place}")
                tips[f"{kind}-{place}"] = f"round {one['number']}, {one['structure']}: {kind} {one[kind]:.4g}"
            axis.errorbar(place, one["measured"], yerr=one["error"], color=COLOURS[0], linewidth=0.8, zorder=1)
        axis.set_xticks(range(len(rounds)), [f"{one['number']}" for one in rounds])
        axis.set(xlabel="round", ylabel="KL divergence, nats a token", ylim=(0, None))
        axis.margins(x=0.2)
        axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return figure, tips

    return _figure(name, caption, told, draw)


def curve(name: str, values: Sequence[tuple[float, float]], x: str, y: str, caption: str) -> Figure:
    """Values joined by a line."""
    told = f"{y} by {x}: " + ", ".join(f"{one:g}: {value:.4g}" for one, value in values) + "."

    def draw(plot: Any) -> tuple[Any, dict[str, str]]:
        figure, axis = plot.subplots(figsize=(4.8, 3.0))
        axis.plot(*zip(*values, strict=True), color=COLOURS[0], linewidth=1.2)
        tips = {}
        for place, (one, value) in enumerate(values):
            [mark] = axis.plot(one, value, marker="o", color=COLOURS[0], linestyle="")
            mark.set_gid(f"point-{place}")
            tips[f"point-{place}"] = f"{x} {one:g}: {value:.4g}"
        axis.set(xlabel=x, ylabel=y, ylim=(0, None))
        return figure, tips

    return _figure(name, caption, told, draw)
