"""The pictures of a report, drawn from its numbers; touching a point shows what it stands for."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from tsotsallm.analysis.pictures import (
    COLOURS,
    DARK,
    ORIGINAL,
    STYLE,
    classes_of_bits,
    colour_of_bits,
    legend_of_bits,
    plain_ticks,
    pyplot,
    values_by_place,
)
from tsotsallm.files import JsonObject
from tsotsallm.inspection import LayerMap
from tsotsallm.report.document import Figure
from tsotsallm.units import human_bytes

Plot = Any
"""matplotlib.pyplot, which has no types here."""
Drawn = tuple[Any, dict[str, str]]
"""A matplotlib figure, and what its elements with a gid stand for."""
PART_COLOURS = {"embeddings": "#8e6c8a", "attention": "#1b6ca8", "feed-forward": "#c8553d", "norms": "#999999",
                "head": "#2f4858", "adapter": "#d9a441"}
LEAST_SCALE = 0.95
"""Pixels a point of a picture on a page, at least: its letters, of 10 points, have 9.5 pixels where it must be scrolled."""
MOST_SCALE = 1.45


def the_line(drawn: bool) -> str:
    """What a caption says of the line that is drawn, if it is."""
    return "; the dashed line is the model with all layers" if drawn else ""


@dataclass(frozen=True)
class Point:
    """A point of a plane: its coordinates, a description, and whether it is on the front."""

    x: float
    y: float
    description: str
    front: bool = False
    error: float = 0.0
    kind: str = ""


def _figure(name: str, caption: str, description: str, draw: Callable[[Plot], Drawn]) -> Figure:
    """Draw a figure once, and save it as SVG for the page and as PNG."""
    plot = pyplot()
    page = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 10}
    with plot.rc_context(STYLE | page):
        figure, tips = draw(plot)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", bbox_inches="tight", dpi=150)
        plot.close(figure)
    return Figure(name, caption, description, _for_page(svg.getvalue(), name, description, tips), png.getvalue())


def _for_page(svg: str, name: str, description: str, tips: Mapping[str, str]) -> str:
    """Make an SVG ready for a page with others: ids of its own, a description, tips for pointer and keyboard."""
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
    if wide is not None:        # the text of all pictures has one size, unless the page is narrower; it stays legible
        head += f' style="--least: {LEAST_SCALE * float(wide[1]):.0f}px; max-width: {MOST_SCALE * float(wide[1]):.0f}px"'
    return (f'{head} role="group" aria-labelledby="{name}-description"><title id="{name}-description">{escape(description)}'
            f'</title>{rest}')


def layers(name: str, plan: LayerMap, caption: str) -> Figure:
    """Draw what became of every layer: the bits of its linears, and whether it was removed or runs several times."""
    linears = list(dict.fromkeys(key for bits in plan.bits for key in bits))
    times = {layer: plan.runs.count(layer) for layer in range(plan.layers)}
    removed = [layer for layer, count in times.items() if not count]
    repeated = {layer: count for layer, count in times.items() if count > 1}
    in_order = list(plan.runs) == sorted(plan.runs)
    description = (f"{len(plan.runs)} layers run, of {plan.layers}. " + (
        f"Removed: {', '.join(map(str, removed))}. " if removed else "No layer is removed. ") + (
        "Run several times: " + ", ".join(f"{layer} ({count} times)" for layer, count in repeated.items()) + ". "
        if repeated else "") + ("" if in_order else f"They run in the order {', '.join(map(str, plan.runs))}. ") + (
        "Bits per weight: " + ", ".join(f"{part} {bits:.3g}" for part, bits in _mean_bits(plan).items()) + "."))

    def draw(plot: Plot) -> Drawn:
        from matplotlib.patches import Rectangle

        cell = 0.36 if plan.layers <= 24 else 0.28      # inches; of many layers every other one has its number
        figure, axis = plot.subplots(figsize=(max(5.2, cell * plan.layers + 2.6), 0.34 * (len(linears) + 1) + 1.1))
        tips = {}
        for layer in range(plan.layers):
            places = [place for place, run in enumerate(plan.runs) if run == layer]
            for row, linear in enumerate(linears):
                key = f"cell-{layer}-{row}"
                if not places:
                    patch = Rectangle((layer - 0.45, row - 0.45), 0.9, 0.9, facecolor="white", edgecolor="#c4c4c4",
                                      linewidth=0.6, hatch="////")
                    tips[key] = f"layer {layer} is removed"
                else:
                    bits = plan.bits[places[0]][linear]
                    patch = Rectangle((layer - 0.45, row - 0.45), 0.9, 0.9, facecolor=colour_of_bits(bits),
                                      edgecolor="none")
                    tips[key] = f"layer {layer}, {linear}: {bits:.3g} bits per weight"
                patch.set_gid(key)
                axis.add_patch(patch)
            if not places or len(places) > 1:
                axis.text(layer, -0.95, "×" if not places else f"{len(places)}×", ha="center", va="center",
                          color=DARK, fontweight="bold")
        axis.set(xlim=(-0.6, plan.layers - 0.4), ylim=(len(linears) - 0.4, -1.5 if removed or repeated else -0.6),
                 xlabel="layer of the original")
        axis.set_xticks(range(0, plan.layers, 1 if plan.layers <= 20 else 2))
        axis.set_yticks(range(len(linears)), [linear.rpartition(".")[2] for linear in linears])
        axis.tick_params(length=0)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
        legend_of_bits(axis, classes_of_bits(plan.bits[place][linear] for place in range(len(plan.runs))
                                             for linear in linears))
        return figure, tips

    return _figure(name, caption, description, draw)


def _mean_bits(plan: LayerMap) -> dict[str, float]:
    linears = [bits for layer in plan.bits for bits in layer.values()]
    return {"linears on average": sum(linears) / len(linears), **plan.ends}


def bytes_by_part(name: str, sizes: Mapping[str, Mapping[str, int]], caption: str) -> Figure:
    """Draw one bar per model, its parts by colour; `sizes` in bytes."""
    description = "; ".join(f"{model}: {human_bytes(sum(parts.values()))} ("
                            + ", ".join(f"{part} {human_bytes(size)}" for part, size in parts.items() if size) + ")"
                            for model, parts in sizes.items())

    def draw(plot: Plot) -> Drawn:
        figure, axis = plot.subplots(figsize=(7.2, 0.5 * len(sizes) + 1.3))
        tips, used = {}, JsonObject()
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

    return _figure(name, caption, description, draw)


def plane(name: str, points: Sequence[Point], x: str, y: str, caption: str, *, log_y: bool = True,
          log_x: bool = False) -> Figure:
    """Draw points with their errors, those of the front joined by a line; colours stand for kinds."""
    best = sorted((point for point in points if point.front), key=lambda point: point.x)
    description = f"{len(points)} points, {x} to the right, {y} upwards. " + (
        "On the front: " + "; ".join(point.description for point in best) + "." if best else "")
    kinds = list(dict.fromkeys(point.kind for point in points))

    def draw(plot: Plot) -> Drawn:
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
            tips[key] = point.description
        axis.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear")
        if log_y and all(point.y > 0 for point in points):
            axis.set_yscale("log")
        plain_ticks(axis)
        if len(kinds) > 1 or kinds[0]:
            marks = [plot.Line2D([], [], marker="os^D"[place % 4], linestyle="", markerfacecolor="white",
                                 markeredgecolor=COLOURS[place % len(COLOURS)]) for place in range(len(kinds))]
            axis.legend(marks, kinds, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(kinds)))
        return figure, tips

    return _figure(name, caption, description, draw)


def by_place(name: str, values: Mapping[str, float], x: str, y: str, caption: str, *, marked: Sequence[str] = (),
             baseline: float | None = None, named: str = ORIGINAL) -> Figure:
    """Draw one value per key, marked ones in another colour: bars from zero, or points where the axis has none.

    `baseline` is the value of the original, or of what `named` says; it is drawn as a line.
    """
    description = f"{y} by {x}: " + ", ".join(f"{key}: {value:.4g}" for key, value in values.items()) + (
        f". Marked: {', '.join(marked)}" if marked else "") + (
        "." if baseline is None else f". The dashed line, {named}: {baseline:.4g}.")

    def draw(plot: Plot) -> Drawn:
        figure, axis = plot.subplots(figsize=(max(4.8, 0.36 * len(values) + 1.6), 3.0))
        marks = values_by_place(axis, list(values.values()), [COLOURS[1] if key in marked else COLOURS[0] for key in values],
                                baseline, named=named)
        tips = {}
        for place, (mark, (key, value)) in enumerate(zip(marks, values.items(), strict=True)):
            mark.set_gid(f"bar-{place}")
            tips[f"bar-{place}"] = f"{x} {key}: {value:.4g}"
        axis.set_xticks(range(len(values)), list(values))
        axis.set(xlabel=x, ylabel=y)
        return figure, tips

    return _figure(name, caption, description, draw)


def predictions(name: str, rounds: Sequence[Mapping[str, Any]], caption: str) -> Figure:
    """Draw the predicted loss of every candidate beside the measured one."""
    description = "; ".join(f"round {candidate['number']} ({candidate['structure']}): predicted "
                            f"{candidate['predicted']:.4g}, measured {candidate['measured']:.4g}" for candidate in rounds)

    def draw(plot: Plot) -> Drawn:
        figure, axis = plot.subplots(figsize=(max(4.8, 0.9 * len(rounds) + 1.6), 3.2))
        tips = {}
        for place, candidate in enumerate(rounds):
            axis.plot([place, place], [candidate["predicted"], candidate["measured"]], color="#bbbbbb", linewidth=1.0,
                      zorder=1)
            for kind, colour, marker in (("predicted", "white", "o"), ("measured", COLOURS[0], "o")):
                [mark] = axis.plot(place, candidate[kind], marker=marker, markersize=8, markerfacecolor=colour,
                                   markeredgecolor=COLOURS[0], linestyle="", label=kind if not place else None, zorder=2)
                mark.set_gid(f"{kind}-{place}")
                tips[f"{kind}-{place}"] = (f"round {candidate['number']}, {candidate['structure']}: {kind} "
                                           f"{candidate[kind]:.4g}")
            axis.errorbar(place, candidate["measured"], yerr=candidate["error"], color=COLOURS[0], linewidth=0.8, zorder=1)
        axis.set_xticks(range(len(rounds)), [f"{candidate['number']}" for candidate in rounds])
        axis.set(xlabel="round", ylabel="KL divergence, nats per token", ylim=(0, None))
        axis.margins(x=0.2)
        axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return figure, tips

    return _figure(name, caption, description, draw)


def curve(name: str, values: Sequence[tuple[float, float]], x: str, y: str, caption: str) -> Figure:
    """Draw (x, y) values joined by a line."""
    description = f"{y} by {x}: " + ", ".join(f"{at:g}: {value:.4g}" for at, value in values) + "."

    def draw(plot: Plot) -> Drawn:
        figure, axis = plot.subplots(figsize=(4.8, 3.0))
        axis.plot(*zip(*values, strict=True), color=COLOURS[0], linewidth=1.2)
        tips = {}
        for place, (at, value) in enumerate(values):
            [mark] = axis.plot(at, value, marker="o", color=COLOURS[0], linestyle="")
            mark.set_gid(f"point-{place}")
            tips[f"point-{place}"] = f"{x} {at:g}: {value:.4g}"
        axis.set(xlabel=x, ylabel=y, ylim=(0, None))
        return figure, tips

    return _figure(name, caption, description, draw)
