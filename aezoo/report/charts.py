"""Curves as SVG inside a page; colours are those of the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from aezoo.report.explain import number
from aezoo.report.markup import text

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
_MAX_POINTS = 400
_MAX = 1e300
# the first epochs, in which a loss falls most, do not set the axis of a long curve if that would flatten the rest
_LONG, _FIRST, _FLAT = 10, 0.05, 3
_TICKS = 5


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        x: epochs.
        y: values; it has a gap where one is not finite, unless that is so every few epochs.
        style: classes of the style sheet.
        title: shown where the pointer rests.
        marked: the index of a point to mark.
        label: written at its end.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: str
    title: str
    marked: int | None = None
    label: str = ""


def chart(lines: Sequence[Line], title: str) -> tuple[str, bool]:
    """Curves over epochs in one picture; empty if no value is finite.

    Args:
        lines: the curves.
        title: what it shows, for screen readers.

    Returns:
        The SVG, and whether the first epochs lie above or below it.
    """
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if _is_drawn(y)]
    if not points:
        return "", False
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    late = [y for line in lines for y in _late(line.y)]
    if cut := high - low > _FLAT * (max(late) - min(late)) > 0:
        low, high = min(late), max(late)
    y_ticks = _ticks(low, high)
    low, high = min(y_ticks[0], low), max(y_ticks[-1], high)
    pad = 0.04 * (high - low)
    low, high = low - pad, high + pad
    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def at_x(x: float) -> float:
        return _LEFT + width * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def at_y(y: float) -> float:
        # far outside, browsers lose precision
        return _TOP + height * min(max((high - y) / (high - low), -5), 5)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">']
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{_LEFT} {at_y(y):.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at_y(y) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    below = f'y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle"'
    epochs = [x for x in dict.fromkeys(map(round, _ticks(x_low, x_high))) if x_low <= x <= x_high]
    parts += [f'<text x="{at_x(x):.1f}" {below}>{x}</text>' for x in epochs]
    parts.append(f'<text x="{_LEFT + width / 2:.1f}" y="{HEIGHT - 4}" text-anchor="middle">epoch</text>')
    # a separate box hides what is outside
    parts.append(
        f'<svg x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" viewBox="{_LEFT} {_TOP} {width} {height}">'
    )
    marks = ""
    for line in lines:
        path = _path([at_x(x) for x in line.x], [at_y(y) if _is_drawn(y) else math.nan for y in line.y])
        parts.append(f'<g class="{text(line.style)}"><title>{text(line.title)}</title>{path}</g>')
        found = ""
        if line.marked is not None and low <= line.y[line.marked] <= high:
            spot = f'cx="{at_x(line.x[line.marked]):.1f}" cy="{at_y(line.y[line.marked]):.1f}"'
            found = f'<circle {spot} r="3.5"/>'
        ends = [(x, y) for x, y in zip(line.x, line.y, strict=True) if _is_drawn(y)]
        if line.label and ends and low <= ends[-1][1] <= high:
            spot = f'x="{at_x(ends[-1][0]) - 2:.1f}" y="{at_y(ends[-1][1]) - 5:.1f}"'
            found += f'<text {spot} text-anchor="end">{text(line.label)}</text>'
        marks += f'<g class="{text(line.style)}">{found}</g>' if found else ""
    return "".join([*parts, "</svg>", marks, "</svg>"]), cut


def _is_drawn(value: float) -> bool:
    """Whether it is a number that is small enough for differences to be finite."""
    return abs(value) < _MAX


def _late(y: Sequence[float]) -> list[float]:
    """The finite values of a curve, without the first of them if it is long."""
    known = [value for value in y if _is_drawn(value)]
    return known[math.ceil(_FIRST * len(known)) :] if len(known) >= _LONG else known


def _path(x: Sequence[float], y: Sequence[float]) -> str:
    """A line through points, in pieces where a value is missing; a lone point is a dot."""
    known = [i for i in range(len(x)) if _is_drawn(y[i])]
    # values of a validation every few epochs are missing all the time
    gaps = sum(after - before > 1 for before, after in pairwise(known))
    if 2 * len(known) < len(y) + 1 or (gaps > 1 and 2 * gaps >= len(known) - 2):
        x, y = [x[i] for i in known], [y[i] for i in known]
    # the last point is always kept
    kept = sorted({*range(0, len(x), -(-len(x) // _MAX_POINTS) or 1), *range(len(x))[-1:]})
    pieces: list[list[str]] = [[]]
    for i in kept:
        if _is_drawn(y[i]):
            pieces[-1].append(f"{x[i]:.1f} {y[i]:.1f}")
        elif pieces[-1]:
            pieces.append([])
    found = [f"M{piece[0]}L{' '.join(piece[1:] or piece)}" for piece in pieces if piece]
    return f'<path d="{"".join(found)}"/>' if found else ""


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from about `low` to about `high`."""
    if not high > low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = max((high - low) / _TICKS, 5e-324)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((factor * power for factor in (1, 2, 5, 10) if factor * power >= raw), raw)
    if not 0 < step < math.inf or step < abs(high) * 1e-12:
        return [low, high]
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)] or [low, high]
