"""Transcoder (Dunefsky et al. 2024), https://arxiv.org/abs/2406.11944

A sparse code of one place of a network predicts another, such as a layer's output from its input. The rows of a sample
are the activations at several places; x are the rows that are read, y those that are predicted:

    f = relu(W_enc x + b_enc)     y_hat = sum_i f_i d_i + b     ||d_i|| = 1     L = -log p(y | y_hat) + lam sum_i f_i

L is in nats per sample. With form april, the penalty is lam sum_i f_i ||d_i||, without the constraint. Targets are the
rows of y; all others are read. Without targets, every row is read and predicted, which is sae_l1 with all that belongs
to it.

The code does not determine the rows that are only read. A reconstruction has their mean there, over all samples of
training so far and all ranks. The loss and the score cover the targets alone; the mse and psnr of an evaluation cover
whole reconstructions.

Shapes: B batch, R rows that are read, T that are predicted, X data dimensions of a row, N latents.
"""

import math
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.models.sparse.sae_l1 import SAEL1, SAEL1Args


class Transcoder(SAEL1):
    """Few latents, read from some rows of a sample, predict the others.

    Args:
        input_shape: shape of one sample: (S, D) for S places. Any shape is valid; if it has several dimensions, the
            first one counts the rows.
        targets: rows to predict, the first is 0; all others are read. If empty, all rows are read and predicted.
        form: unit_norm (2023) or april (April 2024).
        **kwargs: see `SAEL1`.
    """

    seen: Tensor
    mean_RX: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        targets: tuple[int, ...] = (),
        form: str = "unit_norm",
        **kwargs: Unpack[SAEL1Args],
    ) -> None:
        super().__init__(input_shape, form=form, **kwargs)
        self.n_rows = self.input_shape[0] if len(self.input_shape) > 1 else 1
        self.targets = tuple(targets)
        if len({*targets}) < len(targets) or not all(0 <= row < self.n_rows for row in targets):
            raise AezooError(f"targets must be different rows from 0 to {self.n_rows - 1}, got {self.targets}")
        if len(targets) == self.n_rows:
            raise AezooError(
                f"targets {self.targets} leave no row to read: give fewer, or none to read and predict all"
            )
        if targets:
            self.sources = tuple(row for row in range(self.n_rows) if row not in targets)
            row_shape = self.input_shape[1:]
            self.encoder = nn.Linear(len(self.sources) * math.prod(row_shape), self.latent_dim)
            nn.init.zeros_(self.encoder.bias)
            self.decoder = type(self.decoder)(self.latent_dim, (len(targets), *row_shape))
            self.register_buffer("mean_RX", torch.zeros(len(self.sources), *row_shape))
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def read(self, x: Tensor) -> Tensor:
        return rows(x, self.sources).flatten(1) if self.targets else super().read(x)

    def predicted(self, x: Tensor) -> Tensor:
        return rows(x, self.targets) if self.targets else x

    def decode(self, z: Tensor) -> Tensor:
        if not self.targets:
            return super().decode(z)
        y_hat = self.likelihood.mean(self.decoder(z))
        found = dict(zip(self.targets, y_hat.unbind(1), strict=True))
        found |= {row: m.to(y_hat).expand_as(y_hat[:, 0]) for row, m in zip(self.sources, self.mean_RX, strict=True)}
        return torch.stack([found[row] for row in range(self.n_rows)], 1)

    def score(self, x: Tensor) -> Tensor:
        return self.nll(self.decoder(self.encode(x)), self.predicted(x))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        if self.training and self.targets:
            self.update_mean(rows(x, self.sources))
        return super().loss(x, y)

    @torch.no_grad()
    def update_mean(self, x_BRX: Tensor) -> None:
        """Add a batch of all ranks to the mean of the rows that are read."""
        n = x_BRX.shape[0] * (dist.get_world_size() if self._across_ranks() else 1)
        self.seen.add_(n)
        self.mean_RX.add_((self.batch_mean(x_BRX) - self.mean_RX).to(self.mean_RX) * (n / self.seen))


def rows(x: Tensor, which: tuple[int, ...]) -> Tensor:
    """Some rows of each sample, without an index that would have to be copied to the device."""
    return torch.stack([x[:, row] for row in which], 1)
