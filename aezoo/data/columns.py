"""Columns of tables: the names and units that scaled samples had in the file or DataFrame."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.metrics.similarity import ValueErrors

Row = dict[str, Any]
Values = npt.NDArray[np.float64]
# the file next to compressed samples that stores their columns
COLUMNS = "columns.json"


def column_names(x: Any) -> tuple[str, ...]:
    """A DataFrame's column names, () unless all are strings, as in scikit-learn."""
    names = tuple(getattr(x, "columns", ()))
    return names if all(isinstance(name, str) for name in names) else ()


class Columns:
    """The columns of a table, and the scaling that was applied to its samples (N, D).

    Args:
        names: one per column; () numbers them, as pandas does.
        scaling: `offset` and `factor` of the samples, as in `aezoo.data.in_memory.Scale`; {} if they are not scaled.
        width: number of columns.
    """

    def __init__(self, names: Sequence[str], scaling: Mapping[str, Tensor], width: int) -> None:
        self.names = tuple(names) or tuple(map(str, range(width)))
        self.scaling = dict(scaling)
        self._offset, self._factor = (
            np.broadcast_to(np.asarray(scaling[key].cpu(), np.float64) if scaling else default, width)
            for key, default in (("offset", np.float64(0)), ("factor", np.float64(1)))
        )

    @classmethod
    def of_model(cls, model: Autoencoder) -> "Columns | None":
        """The columns of the table that a model was trained on; None for other data."""
        units = model.data_units
        if units is None or not units.is_table or len(model.input_shape) != 1:
            return None
        return cls(units.columns, units.scaling, model.input_shape[0])

    @classmethod
    def from_bytes(cls, content: bytes, width: int, what: str) -> "Columns":
        """Read what `to_bytes` wrote, for `width` columns.

        Raises:
            AezooError: the content is something else.
        """
        try:
            stored = json.loads(content)
            names = stored["names"]
            scaling = {key: torch.tensor(stored[key], dtype=torch.float64) for key in ("offset", "factor")}
            if not (isinstance(names, list) and len(names) == width and all(isinstance(name, str) for name in names)):
                raise ValueError("its names are not those of the columns")
            if not all(part.shape == (width,) and part.isfinite().all() for part in scaling.values()):
                raise ValueError("its numbers do not fit the columns")
        except (ValueError, TypeError, KeyError, RuntimeError, RecursionError, OverflowError) as error:
            reason = " ".join(str(error).split())[:100]
            raise AezooError(f"{what} was not written by compress ({reason}): remove it, or give kind npy") from None
        return cls(names, scaling, width)

    def to_bytes(self) -> bytes:
        """Names and scaling as JSON."""
        content = {"names": self.names, "offset": self._offset.tolist(), "factor": self._factor.tolist()}
        return json.dumps(content, indent=1).encode()

    def values(self, x: Any) -> Values:
        """Samples (..., D) in the units of the table, without digits beyond the precision of float32."""
        found = np.asarray(x, np.float64) * self._factor + self._offset
        return self._rounded(found)

    def errors(self, difference: Any) -> Values:
        """Differences of samples (..., D) in the units of the table."""
        return np.asarray(difference, np.float64) * self._factor

    def rows(self, x: Any) -> Iterator[Row]:
        """A row for each sample (N, D), or for each step of walks (N, steps, D)."""
        for i, one in enumerate(x):
            for j, values in enumerate(self.values(np.atleast_2d(one)).tolist()):
                place = {} if np.ndim(one) == 1 else {"walk": i + 1, "step": j + 1}
                yield place | dict(zip(self.names, values, strict=True))

    def error_row(self, difference: Any) -> Row:
        """The errors (D,) of one sample, by column, and the column with the largest error in the scale of the model."""
        size = np.abs(np.asarray(difference, np.float64))
        largest = "" if np.isnan(size).all() else self.names[int(np.nanargmax(size))]
        errors = self.errors(difference).tolist()
        return {"largest_error": largest} | {f"error_{name}": e for name, e in zip(self.names, errors, strict=True)}

    def summary(self, by_value: ValueErrors) -> list[Row]:
        """For each column: mean absolute and root mean square error, standard deviation, r2 (the explained share)."""
        mae, square, variance = (part.numpy() for part in by_value.compute())
        r2 = 1 - square / np.where(variance > 0, variance, np.nan)
        size = np.abs(self._factor)
        found = {"mae": mae * size, "rmse": square**0.5 * size, "deviation": variance**0.5 * size, "r2": r2}
        rows = zip(self.names, *(part.tolist() for part in found.values()), strict=True)
        return [dict(zip(("column", *found), row, strict=True)) for row in rows]

    def _rounded(self, values: Values) -> Values:
        # samples are float32, which has 24 bits: about seven decimals for a range of 1, the last one uncertain
        decimals = np.maximum(0, 6 - np.floor(np.log10(np.abs(self._factor))))
        step = 10.0**decimals
        return np.where(self._factor == 1, values, np.round(values * step) / step)
