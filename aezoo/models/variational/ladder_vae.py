"""Ladder variational autoencoder (Sonderby et al. 2016), https://arxiv.org/abs/1602.02282

There are L levels of Gaussian latent variables, z_1 at the bottom to z_L at the top; in nats per sample:

    p(x, z) = p(x | z_1) p(z_1 | z_2) ... p(z_{L-1} | z_L) p(z_L)     p(z_L) = N(0, I)     p(z_l | z_{l+1}) = N(m, s^2)
    d_1 = f_1(x), d_l = f_l(d_{l-1})     mu^_l, sigma^_l = linear in d_l, without noise
    q(z_L | x) = N(mu^_L, sigma^_L^2)    q(z_l | x, z_{l+1}) = N(mu, sigma^2)
    1 / sigma^2 = 1 / sigma^_l^2 + 1 / s^2     mu = sigma^2 (mu^_l / sigma^_l^2 + m / s^2)

    L = E_q[-log p(x|z_1)] + beta |sum_l max(free_bits, KL_l) - C|

So q is the product of two Gaussians, the bottom-up estimate and the top-down prior, each weighted by its precision. L =
1 is the VAE. The paper's deterministic warm-up of beta from 0 to 1 is the callback BetaAnnealing in linear mode. The
paper's batch normalisation is not used: it would make the loss of a sample depend on its batch, and a model with one
level would not be the VAE. Log-variances are linear in d_l; the paper uses the softplus of a linear function as the
variance.

The code contains all levels from the bottom up, D = D_1 + ... + D_L; `decode` reads only z_1, since x depends only on
it.

Shapes: B batch, D code, L levels.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.deprecated import renamed
from aezoo.models.variational.hierarchical_vae import HierarchicalVAE, HierarchicalVAEArgs
from aezoo.nets.blocks.levels import GaussianParams, gaussian


def product(estimate: GaussianParams, prior: GaussianParams) -> GaussianParams:
    """Return mean and log-variance of the normalised product of two Gaussians, each given as (mean, log-variance)."""
    (mu, log_var), (m, log_s2) = estimate, prior
    share = torch.sigmoid(log_s2 - log_var)  # share of the estimate in the sum of both precisions
    return torch.lerp(m, mu, share), log_var - F.softplus(log_var - log_s2)


class BottomDecoder(nn.Module):
    """A decoder of the first `size` values of a code."""

    def __init__(self, size: int, net: nn.Module) -> None:
        super().__init__()
        self.size = size
        self.net = net

    def forward(self, z: Tensor) -> Tensor:
        params: Tensor = self.net(z[:, : self.size])
        return params


class LadderVAE(HierarchicalVAE, defaults={"activation": "leaky_relu"}, tags=("generation",)):
    """Several levels of Gaussian codes, whose posteriors combine the data with the level above.

    Args:
        level_dim: size of the features d_l, and of the hidden layer of the networks between levels.
        **kwargs: see `HierarchicalVAE`.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Unpack[HierarchicalVAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        del self.posteriors
        # outputs of each level's network: an estimate, and the features for the level above
        sizes = [2 * d + self.level_dim for d in self.latent_dims[:-1]] + [2 * self.latent_dims[-1]]
        self.rungs = nn.ModuleList(
            nn.Sequential(
                nets.activation(self.activation),
                nn.Linear(self.level_dim, self.level_dim),
                nets.activation(self.activation),
                nn.Linear(self.level_dim, size),
            )
            for size in sizes[1:]
        )
        if len(self.latent_dims) > 1:
            bottom = self.latent_dims[:1]
            self.encoder = self.build_encoder((sizes[0],))
            self.decoder = BottomDecoder(bottom[0], self.build_decoder(bottom))

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        """Return mu^_l and log sigma^_l^2 of all levels: (B, *input_shape) -> (B, 2 D_l)."""
        found = self.encoder(x)
        h_L = [found[:, : 2 * self.latent_dims[0]]]
        for rung, d, below in zip(self.rungs, self.latent_dims[1:], self.latent_dims[:-1], strict=True):
            found = rung(found[:, 2 * below :])
            h_L.append(found[:, : 2 * d])
        return h_L

    def q_and_p(self, h_L: list[Tensor], above: list[Tensor]) -> tuple[GaussianParams, GaussianParams]:
        estimate, prior = gaussian(h_L[-1 - len(above)]), self.priors.prior_params(above)
        return product(estimate, prior) if above else estimate, prior


__getattr__ = renamed(__name__)
