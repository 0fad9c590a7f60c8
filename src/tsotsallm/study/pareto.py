"""Which results are worth having: dominance, the front, the volume that a front dominates. All measures are minimised."""

from __future__ import annotations

from collections.abc import Sequence

Point = Sequence[float]


def dominates(one: Point, other: Point) -> bool:
    """Whether `one` is nowhere worse than `other`, and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and any(a < b for a, b in zip(one, other, strict=True))


def front(points: Sequence[Point]) -> list[int]:
    """The places of the points that no other dominates, in their order; of equal points all are kept."""
    return [place for place, point in enumerate(points) if not any(dominates(other, point) for other in points)]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """The volume between the points' front and `reference`, which is worse than they are; points beyond it add nothing.

    Exact, by slices along the last measure (Zitzler's recursion): fine for some hundred points of two or three measures.
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
            volume += (above - point[-1]) * hypervolume([one[:-1] for one in inside[:place + 1]], reference[:-1])
    return volume


def _area(points: Sequence[Point], reference: Point) -> float:
    """The area between a staircase of points, by their first measure, and the reference."""
    area, lowest = 0.0, reference[1]
    for first, second in points:
        if second < lowest:
            area += (reference[0] - first) * (lowest - second)
            lowest = second
    return area
