"""The units of the data that a model was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.errors import AezooError

# suffixes of files of tables
TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class DataUnits:
    """The scaling of samples from the units of the data: (x - offset) / factor.

    Attributes:
        scaling: `offset` and `factor`, as in `aezoo.data.in_memory.Scale`; {} if nothing was scaled by statistics of
            the training data.
        white: see `aezoo.data.source.Source`.
        columns: names of a table's columns; () if they have none.
        is_table: whether the data are a table.
        levels: divisor of bytes: 255, or 1 for data that keep their values.
    """

    scaling: Mapping[str, Tensor] = field(default_factory=dict)
    white: int | None = None
    columns: tuple[str, ...] = ()
    is_table: bool = False
    levels: int = 255

    @property
    def offset_and_factor(self) -> tuple[Tensor, Tensor]:
        """Both in float64 on the CPU, 0 and 1 without scaling."""
        scaling = self.scaling or {"offset": torch.zeros(()), "factor": torch.ones(())}
        return scaling["offset"].cpu().double(), scaling["factor"].cpu().double()

    def has_scaling(self, scaling: Mapping[str, Tensor]) -> bool:
        """Whether samples are scaled in exactly this way."""
        own = self.scaling
        return own.keys() == scaling.keys() and all(torch.equal(own[key].cpu(), scaling[key].cpu()) for key in own)

    def values(self, x: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Samples in the units of the data; bytes are those of a lossless file, 255 for 1."""
        offset, factor = (part.numpy() for part in self.offset_and_factor)
        return (x / 255 if x.dtype == np.uint8 else np.asarray(x, np.float64)) * factor + offset

    def shares_of_white(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Pictures divided by the white of the data; unchanged if white is unknown."""
        if self.white is not None and (self.scaling or self.levels == 1):
            return self.values(x) / self.white
        return x / 255 if x.dtype == np.uint8 else x

    def to_plain(self) -> dict[str, Any]:
        """The units as values that JSON represents exactly."""
        scaling: dict[str, Any] = {key: self.scaling[key].tolist() for key in self.scaling}
        if scaling:
            scaling["dtype"] = "float32" if self.scaling["offset"].dtype == torch.float32 else "float64"
        columns = list(self.columns)
        return {**scaling, "white": self.white, "columns": columns, "is_table": self.is_table, "levels": self.levels}

    @classmethod
    def from_plain(cls, plain: Any, shape: tuple[int, ...], what: str) -> "DataUnits":
        """Read the result of `to_plain`, for samples of a shape.

        Raises:
            AezooError: it is something else.
        """
        try:
            scaling, columns = {}, plain["columns"]
            if "dtype" in plain:
                dtype = {"float32": torch.float32, "float64": torch.float64}[plain["dtype"]]
                scaling = {key: torch.tensor(plain[key], dtype=dtype) for key in ("offset", "factor")}
            if not all(part.isfinite().all() and part.broadcast_to(shape).shape == shape for part in scaling.values()):
                raise ValueError("its scaling does not fit the samples")
            if not (isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
                raise ValueError("its columns are not names")
            if columns and shape != (len(columns),):
                raise ValueError("its columns do not fit the samples")
            if plain["white"] not in (None, 1, 255) or plain["levels"] not in (1, 255):
                raise ValueError("its value of white or of bytes is invalid")
            return cls(scaling, plain["white"], tuple(columns), plain["is_table"] is True, plain["levels"])
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, OverflowError) as error:
            reason = " ".join(str(error).split())[:100]
            raise AezooError(f"{what} is damaged: its units of the data ({reason}); save the model again") from None
