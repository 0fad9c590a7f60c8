"""Pictures: grids by their own bits, bars only on axes with a zero, the original as a line, legends outside."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tsotsallm.analysis import pictures
from tsotsallm.analysis.layers import Outliers
from tsotsallm.inspection import LayerMap
from tsotsallm.report import drawings

pytest.importorskip("matplotlib", reason="matplotlib is in the extra [report]")


def test_grids_are_named_by_their_own_bits() -> None:
    found = pictures.classes_of_bits([16.0, 4.5, 5.5, 6.5625, 4.5, 4.25, 8.5])
    assert [name for _, name in found] == ["4.25", "4.5", "5.5", "6.56", "8.5", "16"]
    # integer grids have scales of their own width
    assert [name for _, name in pictures.classes_of_bits([4.125, 4.167, 8.1])] == ["4.12 to 4.17", "8.1"]


def test_the_colour_of_bits_is_the_same_in_every_picture() -> None:
    assert pictures.colour_of_bits(4.5) == pictures.colour_of_bits(4.5) != pictures.colour_of_bits(5.5)


@pytest.mark.parametrize(("values", "bars"), [([0.01, 3.0, 0.5], False), ([1.0, 4.0, 9.0], True), ([2.6, 2.7, 2.8], False),
                                              ([0.0, 5.0, 200.0], True)])
def test_bars_stand_on_axes_with_a_zero_only(values: list[float], bars: bool) -> None:
    plot = pictures.pyplot()
    figure, axis = plot.subplots()
    marks = pictures.values_by_place(axis, values, ["black"] * len(values))
    assert len(marks) == len(values)
    assert bool(axis.patches) == bars
    assert not (axis.patches and axis.get_yscale() == "log")
    plot.close(figure)


def test_the_original_is_a_line_that_values_compare_with() -> None:
    plot = pictures.pyplot()
    figure, axis = plot.subplots()
    pictures.values_by_place(axis, [3.0, 8.0, 20.0], ["black"] * 3, baseline=2.65)
    assert not axis.patches
    assert any(list(line.get_ydata()) == [2.65, 2.65] for line in axis.lines)
    plot.close(figure)


def test_the_colours_of_neighbouring_grids_can_be_told_apart() -> None:
    colours = [pictures.colour_of_bits(bits)[:3] for bits in pictures.BITS]
    steps = [sum(abs(a - b) for a, b in zip(one, two, strict=True)) for one, two in pairwise(colours)]
    assert min(steps) > 0.1


# -- every picture of analyses and reports ----------------------------------------------------------------------------

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
           "mlp.down_proj")
METRICS = {metric: [1.0, 8.0, 3.0] for metric in pictures.IMPORTANCE}
CURVE = {"loss": [[step, 3.0 - 0.1 * step] for step in range(1, 9)], "held_out": [[0, 3.1], [8, 2.4]], "best_step": 8}
BITS_OF_LAYER = dict(zip(LINEARS, (4.25, 4.5, 5.5, 6.5625, 8.5, 16.0, 2.625), strict=True))
PICTURES: dict[str, Callable[[Path], object]] = {
    "attention_maps": lambda path: pictures.attention_maps({"model": {0: torch.rand(2, 6, 6).tril()}}, [0, 1], path),
    "spectra": lambda path: pictures.spectra({f"model, layer {layer}": ([0.1, 0.2], [1.0, 90.0 + layer])
                                              for layer in range(6)}, "spectra", path),
    "importance": lambda path: pictures.importance({"model": METRICS, "original": METRICS}, path, baseline=2.5),
    "outliers": lambda path: pictures.outliers([Outliers(layer, linear, 3.0 + layer, 4.0, 30.0)
                                                for layer in range(3) for linear in LINEARS], path),
    "training_curve": lambda path: pictures.training_curve({"samples": [
        {"source": "one.txt", "curve": CURVE}, {"source": "two.txt", "curve": CURVE}]}, path),
    "training_curve by layer": lambda path: pictures.training_curve({"samples": [
        {"source": "one.txt", "layer": layer, "curve": CURVE} for layer in range(3)]}, path),
    "selection": lambda path: pictures.selection({"scores": [[layer, linear, 0.1 * layer - 0.1] for layer in range(3)
                                                             for linear in LINEARS], "chosen": [[1, LINEARS[0]]]}, path),
    "ranks": lambda path: pictures.ranks({"ranks": {f"{layer}.{linear}": 8 * layer for layer in range(3)
                                                    for linear in LINEARS}}, path),
    "grids": lambda path: pictures.grids({"grids": {f"{layer}.{linear}": grid for layer in range(3) for linear, grid in zip(
        LINEARS, ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl"), strict=True)}}, path)}
DRAWINGS: dict[str, Callable[[], drawings.Figure]] = {
    "layers": lambda: drawings.layers("layers", LayerMap(30, (*range(24), 23, *range(26, 30)), (BITS_OF_LAYER,) * 29,
                                                         {"embeddings": 8.5}), "a map"),
    "bytes_by_part": lambda: drawings.bytes_by_part("bytes", {name: dict.fromkeys(drawings.PART_COLOURS, 10 ** 6)
                                                              for name in ("one", "two")}, "bytes"),
    "plane": lambda: drawings.plane("plane", [drawings.Point(1.0 + place, 0.1 + place, f"{place}", place < 2, 0.05,
                                                             f"kind {place}") for place in range(5)], "x", "y", "a plane"),
    "by_place": lambda: drawings.by_place("bars", {"0": 3.0, "1": 8.0, "2": 5.0}, "layer", "perplexity", "bars",
                                          marked=["1"], baseline=2.5),
    "predictions": lambda: drawings.predictions("rounds", [
        {"number": place, "structure": "s", "predicted": 0.1, "measured": 0.12, "error": 0.01} for place in range(3)], "p"),
    "curve": lambda: drawings.curve("curve", [(0, 0.1), (1, 0.2)], "x", "y", "a curve")}


def test_every_picture_is_among_those_that_are_checked() -> None:
    styled = {name for name, draw in vars(pictures).items() if hasattr(draw, "__wrapped__") and name != "pyplot"}
    assert styled == {name.partition(" ")[0] for name in PICTURES}
    made = {name for name, draw in vars(drawings).items() if not name.startswith("_") and callable(draw)
            and getattr(draw, "__annotations__", {}).get("return") == "Figure"}
    assert made == set(DRAWINGS)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The matplotlib figures that are saved."""
    from matplotlib.figure import Figure

    kept: list[Any] = []
    save = Figure.savefig

    def keep(figure: Any, *args: Any, **settings: Any) -> None:
        save(figure, *args, **settings)
        kept.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return kept


def as_svg(name: str, folder: Path) -> str:
    """A picture by its name, as SVG."""
    if name in DRAWINGS:
        return DRAWINGS[name]().svg
    PICTURES[name](folder / "picture.svg")
    return (folder / "picture.svg").read_text("utf-8")


@pytest.mark.parametrize("name", [*PICTURES, *DRAWINGS])
def test_legends_are_outside_the_axes(name: str, drawn: list[Any], tmp_path: Path) -> None:
    as_svg(name, tmp_path)
    for figure in drawn:
        figure.draw_without_rendering()
        legends = [*figure.legends, *(legend for axis in figure.axes if (legend := axis.get_legend()) is not None)]
        for legend in legends:
            assert not any(legend.get_window_extent().fully_overlaps(axis.get_window_extent()) for axis in figure.axes)
    if name in ("importance", "outliers", "spectra", "training_curve", "training_curve by layer", "layers", "plane"):
        assert legends


def shades(colours: list[tuple[float, float, float]]) -> set[str]:
    """Whether there are strong reds and greens among colours of red, green and blue in 0 to 1."""
    found = set()
    for colour in colours:
        hue, light, strength = colorsys.rgb_to_hls(*colour)
        if strength > 0.3 and 0.15 < light < 0.85:
            found.add("red" if hue < 1 / 18 or hue > 17 / 18 else "green" if 0.22 < hue < 0.46 else "another")
    return found & {"red", "green"}


@pytest.mark.parametrize("name", [*PICTURES, *DRAWINGS])
def test_no_picture_has_red_against_green(name: str, drawn: list[Any], tmp_path: Path) -> None:
    svg = as_svg(name, tmp_path)
    colours = [tuple(int(code[place:place + 2], 16) / 255 for place in (0, 2, 4))
               for code in set(re.findall(r"#([0-9a-f]{6})\b", svg))]
    for image in (image for axis in drawn[0].axes for image in axis.images if image.get_array().ndim == 2):
        colours += [image.get_cmap()(step / 15)[:3] for step in range(16)]
    assert shades(colours) != {"red", "green"}


def test_red_against_green_is_found() -> None:
    assert shades([(0.8, 0.2, 0.2), (0.2, 0.6, 0.2), (0.1, 0.4, 0.7)]) == {"red", "green"}


def test_every_model_has_its_own_marks_and_the_line_is_named(drawn: list[Any], tmp_path: Path) -> None:
    pictures.importance({"model": METRICS, "original": {metric: [2.0, 7.0, 4.0, 1.0] for metric in METRICS}},
                        tmp_path / "importance.png", baseline=2.5, places={"model": (0, 2, 3), "original": range(4)})
    [figure] = drawn
    for axis, metric in zip(figure.axes, METRICS, strict=True):
        points = [line for line in axis.lines if line.get_linestyle() == "None"]
        by_marker = {marker: [int(line.get_xdata()[0]) for line in points if line.get_marker() == marker]
                     for marker in "os"}
        assert by_marker == {"o": [0, 2, 3], "s": [0, 1, 2, 3]}
        assert len({line.get_color() for line in points}) == 2
        assert [text.get_text() for text in axis.texts] == (["original"] if metric == "perplexity" else [])
        assert not axis.patches
        assert axis.get_xlabel() == "layer of the original"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["model", "original"]
