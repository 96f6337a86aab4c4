"""The page of error against training speed, with a picture for each data set that names a model under the pointer."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.pareto import Panel, Point
from benchmarks.plots import COLOURS
from benchmarks.report_columns import format_number

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT, _TOP = 760, 460, 70, 50, 20, 20
# black would vanish on a dark page
_COLOURS = (*COLOURS[:-1], "#8c8c8c")
_FACTORS = (1, 2, 5)
# width of a letter and height of a line, in pixels
_LETTER, _LINE = 6.5, 13

INTRODUCTION = """# Error and training speed

Each point is a model: its mean squared error on the test split against the samples a second that it trains on. The line
joins the models that no other one beats in both, and the dashes are PCA with a code of the same size. The models on the
line and five textbook models are named; move the pointer over another point for its name and figures, and click for its
page. Hollow points were measured on another processor, and are not on the line. All figures stand in
[the results](index.md), with budgets, seeds and processors.
"""


class _Axis(NamedTuple):
    """A logarithmic axis from the pixel `start` to the pixel `end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
        return [f * 10.0**d for d in decades for f in _FACTORS if self.low <= f * 10.0**d <= self.high]


def page(panels: Sequence[Panel]) -> str:
    """The page in Markdown."""
    families = sorted({point.row.get("family", "") for panel in panels for point in panel.points})
    colours = {family: _COLOURS[i % len(_COLOURS)] for i, family in enumerate(families)}
    return INTRODUCTION + "".join(
        f"\n## {panel.dataset}, code of {panel.code_size} numbers\n\n{_picture(panel, colours)}\n" for panel in panels
    )


def _picture(panel: Panel, colours: Mapping[str, str]) -> str:
    speeds = [point.speed for point in panel.points]
    errors = [point.error for point in panel.points] + ([] if panel.pca is None else [panel.pca])
    x = _Axis(min(speeds) / 1.3, max(speeds) * 1.6, _LEFT, _WIDTH - _RIGHT)
    y = _Axis(min(errors) / 1.2, max(errors) * 1.2, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        *_grid(x, y),
        f'<polyline class="front" points="{" ".join(f"{x.place(s):.1f},{y.place(e):.1f}" for s, e in panel.front)}"/>',
    ]
    if panel.pca is not None:
        at = f"{y.place(panel.pca):.1f}"
        parts.append(f'<line class="pca" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT + 4}" y="{at}" dy="-4">PCA</text>')
    spots = [(point, x.place(point.speed), y.place(point.error)) for point in panel.points]
    parts += [_circle(*spot, colours[spot[0].row.get("family", "")]) for spot in spots]
    parts += _labels([spot for spot in spots if spot[0].label])
    families = dict.fromkeys(point.row.get("family", "") for point in panel.points)
    legend = "".join(
        f'<span><i style="background:{colours[family]}"></i>{html.escape(family)}</span>' for family in families
    )
    label = html.escape(f"mean squared error against training speed on {panel.dataset}")
    return (
        f'<figure class="pareto"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg><figcaption>{legend}</figcaption></figure>"
    )


def _grid(x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for tick in x.ticks():
        at = f"{x.place(tick):.1f}"
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:,.10g}</text>')
    for tick in y.ticks():
        at = f"{y.place(tick):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy="4" text-anchor="end">{tick:,.4g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">training, samples a second</text>')
    parts.append(f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">mse</text>')
    return parts


def _circle(point: Point, x: float, y: float, colour: str) -> str:
    row = point.row
    title = html.escape(
        f"{row['model']}: mse {format_number(point.error)}, {format_number(point.speed)} samples a second, "
        f"code of {row.get('code_size', '?')}"
    )
    fill = f'fill="{colour}"' if point.compared else f'fill="none" stroke="{colour}" stroke-width="2"'
    circle = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" {fill} pointer-events="all"><title>{title}</title></circle>'
    return f'<a href="../models/{html.escape(row["model"])}.html">{circle}</a>'


def _labels(spots: Sequence[tuple[Point, float, float]]) -> list[str]:
    """Names beside their points, from the top; one that would cover another moves down, with a line to its point."""
    placed: list[tuple[float, float, float]] = []
    parts = []
    for point, x, y in sorted(spots, key=lambda spot: spot[2]):
        width = _LETTER * len(point.label)
        left = x + 9 if x + 9 + width < _WIDTH else x - 9 - width
        at = y + 4
        for other_left, other_width, other in placed:
            if left < other_left + other_width and other_left < left + width and abs(at - other) < _LINE:
                at = other + _LINE
        placed.append((left, width, at))
        if at > y + 4:
            parts.append(f'<line class="lead" x1="{x:.1f}" y1="{y:.1f}" x2="{left:.1f}" y2="{at - 4:.1f}"/>')
        parts.append(f'<text class="name" x="{left:.1f}" y="{at:.1f}">{html.escape(point.label)}</text>')
    return parts
