"""The results worth keeping: dominance, the Pareto front, and the volume that it dominates. All measures are minimised."""

from __future__ import annotations

from collections.abc import Sequence

Point = Sequence[float]


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is nowhere worse than `other`, and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, in their order; equal points are all kept."""
    return [place for place, point in enumerate(points) if not any(dominates(other, point) for other in points)]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume between the points' front and `reference`, a point that is worse; points beyond it add nothing.

    Exact, by slices along the last measure (Zitzler's recursion); fast enough for a few hundred points of two or three
    measures.
    """
    inside = [tuple(point) for point in points if all(a < b for a, b in zip(point, reference, strict=True))]
    if len(reference) == 2:
        return _area(sorted(set(inside)), reference)
    inside = sorted({inside[place] for place in front(inside)}, key=lambda point: point[-1])
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - inside[0][0]
    volume = 0.0
    for place, point in enumerate(inside):
        above = inside[place + 1][-1] if place + 1 < len(inside) else reference[-1]
        if above > point[-1]:
            volume += (above - point[-1]) * hypervolume([lower[:-1] for lower in inside[:place + 1]], reference[:-1])
    return volume


def _area(points: Sequence[Point], reference: Point) -> float:
    """Area between the reference and a staircase of points, which are sorted by their first measure."""
    area, lowest = 0.0, reference[1]
    for first, second in points:
        if second < lowest:
            area += (reference[0] - first) * (lowest - second)
            lowest = second
    return area
