"""The picture of average ranks and critical differences (Demsar 2006, figure 1), in the style of `plots`."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .labels import SIZE
from .rankings import indistinct_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GREY, _LINE, _BAR = "0.35", 0.9, 0.32


def critical_differences(ranks: Mapping[str, float], difference: float, title: str) -> "Figure":
    """Methods on a line of average ranks, 1 (best) on the left; a bar joins those that do not differ significantly.

    Args:
        ranks: average rank of each of at least two methods.
        difference: the critical difference of two ranks.
        title: name of the ranking.
    """
    from matplotlib.figure import Figure

    ordered = sorted(ranks, key=ranks.__getitem__)
    values = [ranks[name] for name in ordered]
    groups = indistinct_groups(values, difference)
    left = ordered[: math.ceil(len(ordered) / 2)]
    depth = 0.5 + _BAR * len(groups)
    height = depth + _LINE * len(left)
    figure = Figure(figsize=(10, 1.2 + 0.3 * (height + 1.6)), layout="constrained")
    ax = figure.add_subplot()
    low, high = 1.0, float(max(len(ordered), math.ceil(1 + difference)))
    margin = 0.32 * (high - low)
    ax.set(xlim=(low - margin, high + margin), ylim=(height + 0.2, -2.0))
    ax.set_axis_off()
    ax.set_title(title, fontsize=SIZE + 1, loc="left")
    ax.plot([low, high], [0, 0], color="black", linewidth=1.2)
    step = max(1, round((high - low) / 12))
    for tick in range(1, int(high) + 1, step):
        ax.plot([tick, tick], [0, -0.2], color="black", linewidth=1.2)
        ax.text(tick, -0.3, str(tick), ha="center", va="bottom", fontsize=SIZE - 1)
    ax.plot([low, low + difference], [-1.3, -1.3], color=_GREY, linewidth=1.6)
    for end in (low, low + difference):
        ax.plot([end, end], [-1.15, -1.45], color=_GREY, linewidth=1.6)
    ax.text(low + difference + 0.01 * (high - low), -1.3, f"critical difference {difference:.2f}", va="center",
            fontsize=SIZE - 1, color=_GREY)  # fmt: skip
    for place, name in enumerate(ordered):
        on_left = place < len(left)
        y = depth + _LINE * ((place if on_left else len(ordered) - 1 - place) + 0.5)
        edge = low - 0.02 * (high - low) if on_left else high + 0.02 * (high - low)
        ax.plot([ranks[name], ranks[name], edge], [0, y, y], color=_GREY, linewidth=0.9)
        words = f"{name}  {ranks[name]:.2f}" if on_left else f"{ranks[name]:.2f}  {name}"
        shift = -0.01 * (high - low) if on_left else 0.01 * (high - low)
        ax.text(edge + shift, y, words, ha="right" if on_left else "left", va="center", fontsize=SIZE - 1)
    for i, (first, last) in enumerate(groups):
        y = 0.4 + _BAR * i
        ax.plot([values[first] - 0.004 * (high - low), values[last] + 0.004 * (high - low)], [y, y], color="#0072B2",
                linewidth=3.5, solid_capstyle="butt")  # fmt: skip
    return figure
