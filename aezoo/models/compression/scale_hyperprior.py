"""Learned compression with a scale hyperprior (Ballé et al. 2018), https://arxiv.org/abs/1802.01436

Side information z contains the scales of the code and is written first (section 3):

    y = f(x)    z = h(|y|)    z^ = m + round(z - m)    s = scales(z^)    y^ = round(y)

    P(z^) factorised, learned    P(y^ | z^) = N(0, s^2) * U(-1/2, 1/2)    R = -log P(z^) - log P(y^ | z^)

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2

in nats per sample, for C channels of x; in training, noise replaces rounding, as in `factorized_prior`.

Shapes: B batch, M channels of the code, N of the side information.
"""

from typing import ClassVar, Unpack

import torch
from torch import Tensor

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.entropy_coded import (
    Coder,
    Distribution,
    Factorised,
    Gaussians,
    ProbabilityTable,
    gaussian_tables,
    scale_of,
)
from aezoo.bases.network import NetworkArgs
from aezoo.models.compression.factorized_prior import FactorizedPrior, FactorizedPriorArgs
from aezoo.training.limits import check_at_least


class HyperArgs(NetworkArgs, total=False):
    """Arguments of the hyperprior and its networks."""

    hyper_dim: int
    hyper_hidden_dims: tuple[int, ...]


class ScaleHyperpriorArgs(FactorizedPriorArgs, HyperArgs, total=False):
    """Arguments of `ScaleHyperprior`."""


class ScaleHyperprior(FactorizedPrior, tags=("compression",)):
    """Learns rounded codes that are Gaussian, with scales from side information.

    Args:
        hyper_dim: N, channels of the side information.
        hyper_hidden_dims: channels of the stages between y and z (net mlp: widths of layers); mirrored on the way back.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers;
            with net gdn, only in the networks of the side information.
        **kwargs: see `FactorizedPrior`.
    """

    per_channel: ClassVar[int] = 1  # parameters that the side information gives for each channel of the code

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        hyper_dim: int = 16,
        hyper_hidden_dims: tuple[int, ...] = (64,),
        **kwargs: Unpack[FactorizedPriorArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, hyper_dim=hyper_dim)
        self.z_shape: tuple[int, ...] = (hyper_dim,)
        hyper_net = "mlp"
        if len(self.code_shape) > 1:
            hyper_net = "conv"
            self.z_shape = nets.map_shape("conv", self.code_shape, hyper_hidden_dims, hyper_dim)
        params_shape = (self.per_channel * self.latent_dim, *self.code_shape[1:])
        self.hyper_encoder = nets.encoder(hyper_net, self.code_shape, self.z_shape, hyper_hidden_dims, self.activation)
        self.hyper_decoder = nets.decoder(
            hyper_net, self.z_shape, params_shape, hyper_hidden_dims[::-1], self.activation
        )
        self.density = Factorised(hyper_dim)  # of z; y has no learned density

    def side(self, y: Tensor) -> Tensor:
        """Return the side information before rounding, (B, *code_shape) -> (B, *z_shape)."""
        z: Tensor = self.hyper_encoder(y.abs())
        return z

    def code_side(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        """Code the side information and decode it to parameters of y, (n, per_channel M, *grid)."""
        z_hat = coder(None if y is None else self.side(y), self.density.distribution((n, *self.z_shape)))
        found: Tensor = self.hyper_decoder(z_hat.to(self.density.median_C))
        return at_least_float32(found)

    def distribution(self, mean: Tensor, raw_scale: Tensor) -> Distribution:
        """Return the distribution of a part of the code with these parameters, (n, C, ...) each."""
        return Gaussians(at_least_float32(mean), scale_of(raw_scale), len(self.density.median_C))

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        raw_scale = self.code_side(coder, y, n)
        return coder(y, self.distribution(torch.zeros_like(raw_scale), raw_scale))

    def tables(self) -> list[ProbabilityTable]:
        return self.density.tables() + gaussian_tables()
