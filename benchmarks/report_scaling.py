"""How time and memory grow along each axis: all values of an axis in one row, with fitted exponents."""

import math
import statistics
from collections.abc import Sequence

from .common import number
from .report_columns import GPU, Column, Row, format_number, words

# values, from the largest down, that an exponent is fitted to
_FITTED = 3
COLUMNS: tuple[Column, ...] = (
    *(words("axis", "axis"), words("model", "model"), words("time of", "unit"), words("values", "values")),
    *(words("milliseconds", "times"), words("exponent of time", "time_exponent")),
    *(words("memory, MB", "memories"), words("exponent of memory", "memory_exponent"), GPU),
    *(words("processor", "processor"), words("errors", "errors")),
)


def merge_values(rows: Sequence[Row]) -> list[Row]:
    """One row for each axis and model, with its values in order; failed rows give only their errors."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["axis"], row["model"]), []).append(row)
    merged = []
    for group in groups.values():
        good = sorted((row for row in group if not row.get("error")), key=lambda row: float(row["value"]))
        points = [tuple(number(row, name) for name in ("value", "milliseconds", "memory_mb")) for row in good]
        found = {name: group[0][name] for name in ("axis", "model", "unit")}
        found["processor"] = "; ".join(dict.fromkeys(row["processor"] for row in group if row.get("processor")))
        for name, i in (("values", 0), ("times", 1), ("memories", 2)):
            found[name] = " / ".join("" if point[i] is None else format_number(point[i] or 0.0) for point in points)
        for name, i in (("time_exponent", 1), ("memory_exponent", 2)):
            fitted = exponent([(point[0], point[i]) for point in points[-_FITTED:]])
            found[name] = "" if fitted is None else f"{fitted:.2f}"
        failed = [f"{row['value']}: {row['error']}" for row in group if row.get("error")]
        merged.append(found | {"errors": "; ".join(failed)})
    return merged


def exponent(points: Sequence[tuple[float | None, float | None]]) -> float | None:
    """The a of c n^a by least squares in logarithms; None with fewer than three positive points."""
    logs = [(math.log(n), math.log(y)) for n, y in points if n and y and n > 0 and y > 0]
    return statistics.linear_regression(*zip(*logs, strict=True)).slope if len(logs) >= _FITTED else None
