"""What training and evaluation use of a model; `aezoo.Autoencoder` declares, documents and implements it."""

from functools import cached_property
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from torch import Tensor, nn

from aezoo.training.traits import Traits

if TYPE_CHECKING:
    from aezoo.corruptions import Corruption
    from aezoo.distributions.likelihoods import Likelihood
    from aezoo.training.data_statistics import DataStatistics


class ModelInterface(pl.LightningModule, Traits):
    """The traits; all other names are declared for type checkers only."""

    if TYPE_CHECKING:
        compile_mode: str
        importance_samples: int
        takes_bytes: bool
        data_statistics: DataStatistics | None
        steps_before: int
        input_shape: tuple[int, ...]
        likelihood: Likelihood
        corruption: Corruption | None
        encoder: nn.Module
        decoder: nn.Module
        lr: float
        optimizer: str
        weight_decay: float
        lr_schedule: str
        warmup_steps: int

        @cached_property
        def code_shape(self) -> tuple[int, ...]: ...

        def encode(self, x: Tensor) -> Tensor: ...

        def decode(self, z: Tensor) -> Tensor: ...

        def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]: ...

        def invalid_mask(self, x: Tensor) -> Tensor: ...

        def all_gather_batch(self, values: Tensor) -> Tensor: ...

        def code_reconstruction_score(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...
