"""Labels next to points and at the ends of curves that avoid the drawing; they are easier to read than a legend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# font size in points
SIZE = 11
# allowed offsets of a label from its point, nearest first: right and up, in points
_SHIFTS = ((7, 0), (-7, 0), (0, 9), (0, -9), (6, 8), (6, -8), (-6, 8), (-6, -8), (0, 20), (0, -20), (16, 14), (-16, 14))


def label_points(ax: "Axes", points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the text, if any, next to each point (x, y, text, colour), avoiding points and other labels if possible."""
    from matplotlib.transforms import Bbox

    figure: Any = ax.figure
    figure.draw_without_rendering()  # the layout determines the positions of the points
    scale = figure.dpi / 72
    frame = ax.get_window_extent()
    centres = [ax.transData.transform((x, y)) for x, y, *_ in points]
    occupied = [Bbox.from_extents(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in centres]
    for x, y, words, colour in sorted((point for point in points if point[2]), key=lambda point: -point[1]):
        best: tuple[float, Any, Any] | None = None
        for right, up in _SHIFTS:
            note = ax.annotate(
                words,
                (x, y),
                (right, up),
                textcoords="offset points",
                ha="left" if right > 0 else "right" if right < 0 else "center",
                va="center" if abs(up) < 5 else "bottom" if up > 0 else "top",
                fontsize=SIZE - 1.5,
                color=colour,
            )
            box = note.get_window_extent()
            outside = sum(
                max(0.0, d) for d in (frame.x0 - box.x0, box.x1 - frame.x1, frame.y0 - box.y0, box.y1 - frame.y1)
            )
            cost = outside * box.height + sum(_overlap_area(box, other) for other in occupied)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, note, box)
            else:
                note.remove()
            if cost == 0:
                break
        if best is not None:
            occupied.append(best[2])


def label_curve_ends(ax: "Axes", ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write the labels of curves (x, y, text, colour) in a column right of the panel, tied to the curve's end."""
    figure: Any = ax.figure
    figure.draw_without_rendering()
    axes_of = ax.transAxes.inverted().transform
    ends = sorted(ends, key=lambda end: end[1])
    step = 1.35 * SIZE * figure.dpi / 72 / ax.get_window_extent().height
    heights = [float(axes_of(ax.transData.transform((x, y)))[1]) for x, y, *_ in ends]
    placed = _spread_out(heights, step)
    for (x, y, words, colour), place in zip(ends, placed, strict=True):
        ax.annotate(
            words,
            (x, y),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            fontsize=SIZE - 1,
            color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4},
        )


def _spread_out(heights: Sequence[float], step: float) -> list[float]:
    """Ascending heights at least a step apart, as close to the original ones as possible (least squares)."""
    blocks: list[list[float]] = []  # groups of touching labels; each group moves as one
    for i, height in enumerate(heights):
        blocks.append([height - i * step])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [place + i * step for i, place in enumerate(_mean(block) for block in blocks for _ in block)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _overlap_area(a: Any, b: Any) -> float:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(width * height) if width > 0 and height > 0 else 0.0
