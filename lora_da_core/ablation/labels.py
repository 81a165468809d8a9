"""Names next to the points of a picture: written where nothing else is, left out where there is no room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKER: Final = 6.0
"""Size of the points' markers, in points."""

Point = tuple[float, float]

_PLACES: Final = tuple(
    (distance * across, distance * up)
    for distance in (6.0, 15.0, 26.0)
    for across, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
)
"""Where a name's nearest edge or corner is, from its point and in points, in the order they are tried."""
_NEAR: Final = 10.0
"""Points; a name farther off is joined to its point by a line."""
_LINE_PARTS: Final = 24
_GAP: Final = 3.0
"""Points between a name's end and what follows."""


@dataclass(frozen=True)
class Named:
    """A point that has a name: where it is in data coordinates, and the name's colour."""

    name: str
    point: Point
    colour: str = "black"


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Whether they have more than an edge in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.bottom < other.top and other.bottom < self.top

    def within(self, other: Box) -> bool:
        """Whether it lies inside the other."""
        across = self.left >= other.left and self.right <= other.right
        return across and self.bottom >= other.bottom and self.top <= other.top


def place_labels(
    axes: Axes, points: Sequence[Named], others: Sequence[Point] = (), lines: Sequence[Sequence[Point]] = ()
) -> list[str]:
    """Writes names next to points, such that none covers another name, a point or a line, or leaves the axes.

    Args:
        axes: The axes with everything else drawn; where they are in the figure is settled here.
        points: The most important first.
        others: Points without a name, in data coordinates.
        lines: Corners of each line that is drawn in the axes, likewise.

    Returns:
        The names that found a place.
    """
    figure = axes.figure.get_figure(root=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    unit = figure.dpi / 72
    frame = Box(*axes.get_window_extent().extents)
    pixels = [(float(x), float(y)) for x, y in axes.transData.transform([*(named.point for named in points), *others])]
    corners = [axes.transData.transform(line) for line in lines if line]
    marks = [_around(pixel, 0.5 * MARKER * unit) for pixel in pixels]
    taken = [*marks, *(box for line in corners for start, end in pairwise(line) for box in _along(start, end))]
    written = []
    for named, pixel in zip(points, pixels, strict=False):
        note = axes.annotate(
            named.name, named.point, xytext=(0, 0), textcoords="offset points", va="bottom", fontsize=7.5,
            color=named.colour, in_layout=False,
        )  # fmt: skip
        size = note.get_window_extent()
        for across, up in _PLACES:
            end = (pixel[0] + across * unit, pixel[1] + up * unit)
            box = _beside(end, (size.width + _GAP * unit, size.height + unit), (across, up))
            far = math.hypot(across, up) > _NEAR
            leader = _along(pixel, end)[_LINE_PARTS // 3 :] if far else []
            free = not any(part.meets(other) for part in (box, *leader) for other in taken)
            if free and box.within(frame):
                note.set_position(((box.left - pixel[0]) / unit, (box.bottom - pixel[1]) / unit))
                if far:
                    _draw_leader(axes, named.point, (across, up))
                taken += [box, *leader]
                written.append(named.name)
                break
        else:
            note.remove()
    return written


def _around(pixel: Point, half: float) -> Box:
    return Box(pixel[0] - half, pixel[1] - half, pixel[0] + half, pixel[1] + half)


def _along(start: Point, end: Point) -> list[Box]:
    """Boxes that cover a straight line, end to end."""
    (x, y), (across, up) = start, ((end[0] - start[0]) / _LINE_PARTS, (end[1] - start[1]) / _LINE_PARTS)
    ends = [(x + part * across, y + part * up) for part in range(_LINE_PARTS + 1)]
    return [
        Box(min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, max(a[0], b[0]) + 1, max(a[1], b[1]) + 1)
        for a, b in pairwise(ends)
    ]


def _beside(end: Point, size: tuple[float, float], to: Point) -> Box:
    """The box of a name whose edge or corner that is nearest to its point is at `end`."""
    left = end[0] - size[0] * (0.5 if to[0] == 0 else float(to[0] < 0))
    bottom = end[1] - size[1] * (0.5 if to[1] == 0 else float(to[1] < 0))
    return Box(left, bottom, left + size[0], bottom + size[1])


def _draw_leader(axes: Axes, point: Point, to: Point) -> None:
    axes.annotate(
        "", point, xytext=to, textcoords="offset points", in_layout=False,
        arrowprops={"arrowstyle": "-", "lw": 0.6, "color": "0.5", "shrinkA": 0, "shrinkB": 0.5 * MARKER},
    )  # fmt: skip
