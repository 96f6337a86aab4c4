"""The units of the data that a model was trained on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# suffixes of files of tables
TABLES = (".csv", ".parquet")


@dataclass(frozen=True)
class DataUnits:
    """How samples were made of data in their own units: (x - offset) / factor.

    Attributes:
        scaling: `offset` and `factor`, as in `aezoo.data.in_memory.Scale`; {} if nothing was scaled by statistics of
            the training data.
        white: see `aezoo.data.source.Source`.
        columns: names of a table's columns; () if they have none.
        is_table: whether the data are a table.
    """

    scaling: Mapping[str, Tensor] = field(default_factory=dict)
    white: int | None = None
    columns: tuple[str, ...] = ()
    is_table: bool = False

    @property
    def offset_and_factor(self) -> tuple[Tensor, Tensor]:
        """Both in float64 on the CPU, 0 and 1 without scaling."""
        scaling = self.scaling or {"offset": torch.zeros(()), "factor": torch.ones(())}
        return scaling["offset"].cpu().double(), scaling["factor"].cpu().double()

    def has_scaling(self, scaling: Mapping[str, Tensor]) -> bool:
        """Whether samples are scaled in exactly this way."""
        own = self.scaling
        return own.keys() == scaling.keys() and all(torch.equal(own[key].cpu(), scaling[key].cpu()) for key in own)
