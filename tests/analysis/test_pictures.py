"""Pictures: grids by their own bits, bars only on axes with a zero, the original as a line."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tsotsallm.analysis import pictures

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
