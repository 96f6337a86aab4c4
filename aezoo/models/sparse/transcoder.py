"""Transcoder (Dunefsky et al. 2024), https://arxiv.org/abs/2406.11944

A sparse code predicts the activations at one location of a network from those at another, such as a layer's output from
its input. The rows of a sample are the activations at several locations; x are the input rows and y the rows to
predict:

    f = relu(W_enc x + b_enc)     y_hat = sum_i f_i d_i + b     ||d_i|| = 1     L = -log p(y | y_hat) + lam sum_i f_i

L is in nats per sample. With form april, the penalty is lam sum_i f_i ||d_i||, without the constraint. `targets` are
the rows of y; all others are input rows. Without targets, all rows are both input and output, as in sae_l1.

The active latents may also be selected by TopK, without a penalty, or by JumpReLU, with the penalty lam ||f||_0 as in
jumprelu_sae (Gemma Scope 2, transcoders). With skip, a linear map of x is added (Paulo et al. 2025,
https://arxiv.org/abs/2501.18823), initialised to 0:

    y_hat = sum_i f_i d_i + W_skip x + b

The code is then f, followed by W_skip x, which is not a function of f.

The code does not determine the input rows. In a reconstruction, they are replaced by their mean over all training
samples so far, on all ranks. The loss and the score cover only the targets; mse and psnr in evaluation cover the whole
reconstruction.

Shapes: B batch, R input rows, T rows to predict, X data dimensions of a row, N latents.
"""

import math
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.models.sparse.sae_l1 import SAEL1, SAEL1Args
from aezoo.nets.blocks.dictionary import Dictionary, scatter_code, top_k
from aezoo.nets.blocks.jumprelu import JumpReLU
from aezoo.training.limits import check_above


class SkipDictionary(Dictionary):
    """Maps f and W_skip x to W f + W_skip x + b, (B, N + X) -> (B, *input_shape)."""

    def forward(self, f_BN: Tensor) -> Tensor:
        f_BN, skip_BX = f_BN[:, : self.latent_dim], f_BN[:, self.latent_dim :]
        return super().forward(f_BN) + skip_BX.unflatten(1, self.input_shape)


class Transcoder(JumpReLU, SAEL1, tags=("interpretability",)):
    """Predicts some rows of a sample from the other rows, with few active latents.

    Args:
        input_shape: shape of one sample: (S, D) for S locations. Any shape is valid; if it has several dimensions, the
            first one is the number of rows.
        targets: indices of the rows to predict, from 0; all others are input rows. If empty, all rows are both.
        form: unit_norm (2023) or april (April 2024).
        activation: relu; topk:K, the K largest pre-activations; or jumprelu, those above a learned threshold.
        bandwidth: width of the rectangle that estimates the gradient of the thresholds of jumprelu.
        skip: add a linear map of the input rows.
        **kwargs: see `SAEL1`.
    """

    seen: Tensor
    mean_RX: Tensor
    skip: nn.Linear | None

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        targets: tuple[int, ...] = (),
        form: str = "unit_norm",
        activation: str = "relu",
        bandwidth: float = 0.05,
        skip: bool = False,
        **kwargs: Unpack[SAEL1Args],
    ) -> None:
        self.k = _k_of(activation)
        check_above(0, bandwidth=bandwidth)
        super().__init__(input_shape, form=form, **kwargs)
        self.n_rows = self.input_shape[0] if len(self.input_shape) > 1 else 1
        self.targets = tuple(targets)
        if len({*targets}) < len(targets) or not all(0 <= row < self.n_rows for row in targets):
            raise AezooError(f"targets must be different rows from 0 to {self.n_rows - 1}, got {self.targets}")
        if len(targets) == self.n_rows:
            raise AezooError(
                f"targets {self.targets} include all rows, so no input is left: give fewer, or none to use all as both"
            )
        if self.k > self.latent_dim:
            raise AezooError(f"activation topk:K needs K of at most latent_dim={self.latent_dim}, got {activation}")
        if skip and not targets:
            raise AezooError("skip without targets would copy the input to the output: set targets, or disable skip")
        self.activation = activation
        if activation == "jumprelu":
            self.init_thresholds(self.latent_dim, 0.01, bandwidth)
        self.skip = None
        if targets:
            self.sources = tuple(row for row in range(self.n_rows) if row not in targets)
            row_shape = self.input_shape[1:]
            self.encoder = nn.Linear(len(self.sources) * math.prod(row_shape), self.latent_dim)
            nn.init.zeros_(self.encoder.bias)
            kind, shape = SkipDictionary if skip else Dictionary, (len(targets), *row_shape)
            self.decoder = kind(self.latent_dim, shape, unit_norm=self.unit_norm)
            if skip:
                self.skip = nn.Linear(self.encoder.in_features, math.prod(shape), bias=False)
                nn.init.zeros_(self.skip.weight)
                self.code_shape = (self.latent_dim + math.prod(shape),)
                self.sparse_code = False
            self.register_buffer("mean_RX", torch.zeros(len(self.sources), *row_shape))
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def read(self, x: Tensor) -> Tensor:
        return rows(x, self.sources).flatten(1) if self.targets else super().read(x)

    def predicted(self, x: Tensor) -> Tensor:
        return rows(x, self.targets) if self.targets else x

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return pi, (B, *input_shape) -> (B, N)."""
        pi: Tensor = self.encoder(self.read(x))
        return pi

    def latents(self, x: Tensor) -> Tensor:
        return self.active(self.pre_activations(x))

    def active(self, pi_BN: Tensor) -> Tensor:
        """Return f, (B, N) -> (B, N)."""
        if self.k:
            return scatter_code(*top_k(pi_BN, self.k), self.latent_dim)
        return self.jump(at_least_float32(pi_BN)).to(pi_BN.dtype) if self.activation == "jumprelu" else pi_BN.relu()

    def with_skip(self, f_BN: Tensor, x: Tensor) -> Tensor:
        """Return the code, (B, N), (B, *input_shape) -> (B, *code_shape)."""
        return f_BN if self.skip is None else torch.cat([f_BN, self.skip(self.read(x))], 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.with_skip(self.latents(x), x)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f_BN = self.latents(x)
        return f_BN, self.decoder(self.with_skip(f_BN, x))

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
        if self.activation == "relu":
            return super().loss(x, y)
        pi_BN = self.pre_activations(x)
        f_BN = self.active(pi_BN)
        nll = self.nll(self.decoder(self.with_skip(f_BN, x)), self.predicted(x)).mean()
        terms = {"loss": nll, "nll": nll, **self.usage_terms(f_BN)}
        if self.activation == "jumprelu":
            terms["l0"] = self.batch_mean(self.step(at_least_float32(pi_BN)).sum(1))
            terms["loss"] = nll + self.warm_up_weight(self.l1) * terms["l0"]
        return terms

    def after_optimizer_step(self) -> None:
        super().after_optimizer_step()
        if self.activation == "jumprelu":
            self.clamp_thresholds()

    @torch.no_grad()
    def update_mean(self, x_BRX: Tensor) -> None:
        """Update the mean of the input rows with a batch of all ranks."""
        n = x_BRX.shape[0] * (dist.get_world_size() if self._across_ranks() else 1)
        self.seen.add_(n)
        self.mean_RX.add_((self.batch_mean(x_BRX) - self.mean_RX).to(self.mean_RX) * (n / self.seen))


def _k_of(activation: str) -> int:
    """Return the K of topk:K, or 0 for another activation.

    Raises:
        AezooError: there is no such activation.
    """
    name, _, k = activation.partition(":")
    if name == "topk" and k.isdecimal() and int(k) >= 1:
        return int(k)
    if activation not in ("relu", "jumprelu"):
        raise AezooError(f"activation must be relu, jumprelu or topk:K with K of at least 1, got {activation!r}")
    return 0


def rows(x: Tensor, which: tuple[int, ...]) -> Tensor:
    """Select rows of each sample, without an index tensor that would have to be copied to the device."""
    return torch.stack([x[:, row] for row in which], 1)
