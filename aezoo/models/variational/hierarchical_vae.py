"""Top-down hierarchical VAE with free bits (Kingma et al. 2016), https://arxiv.org/abs/1606.04934

L levels of Gaussian latent variables, z_1 (bottom) to z_L (top), are inferred from the top down; in nats per sample:

    p(x, z) = p(x | z_1, ..., z_L) p(z_1 | z_2) ... p(z_{L-1} | z_L) p(z_L)     p(z_L) = N(0, I)
    q(z | x) = q(z_L | x) q(z_{L-1} | x, z_L) ... q(z_1 | x, z_2)
    KL_l = E_q[KL(q(z_l | x, z_{l+1}) || p(z_l | z_{l+1}))]     log p(x) >= ELBO = E_q[log p(x|z)] - sum_l KL_l
    L = E_q[-log p(x|z)] + beta |sum_l max(free_bits, KL_l) - C|

KL_l is the mean over the batch, and a level whose KL is below its free bits is not pushed towards 0 (paper's appendix
on free bits). All conditionals are diagonal Gaussians, computed by networks with one hidden layer; level l depends on x
through the encoder's output h_l. L = 1 is the VAE; C is 0 unless the callback BetaAnnealing increases it. The paper's
flows are in `vae_iaf`. The code contains all levels from the bottom up; `encode` returns the mean of the top level,
then the mean of the next level given it, and so on.

Shapes: B batch, D code, D_l level l, L levels.
"""

from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.distributions.latent_chain import LatentChain
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE, BetaArgs
from aezoo.nets.blocks.levels import Conditional, ConditionalGaussian, GaussianChain, GaussianParams, Level, gaussian
from aezoo.training.limits import check_at_least


class LevelsArgs(BetaArgs, total=False):
    """Arguments of `HierarchicalVAE`, without free_bits."""

    latent_dims: tuple[int, ...]
    level_dim: int


class HierarchicalVAEArgs(LevelsArgs, total=False):
    """Arguments of `HierarchicalVAE`."""

    free_bits: float


class HierarchicalVAE(VAE, normal_prior=False, tags=("generation",)):
    """Several levels of Gaussian codes, where each level determines the prior of the level below.

    Args:
        latent_dims: D_1, ..., D_L, sizes of the levels from the bottom up.
        level_dim: width of the hidden layer of the networks between levels.
        free_bits: KL of each level in nats, averaged over the batch, below which it does not change the loss.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dims: tuple[int, ...] = (32, 16),
        level_dim: int = 64,
        free_bits: float = 0.0,
        **kwargs: Unpack[BetaArgs],
    ) -> None:
        if min(latent_dims, default=0) < 1:
            raise AezooError(f"latent_dims must have at least one size, each at least 1, got {tuple(latent_dims)}")
        check_at_least(1, level_dim=level_dim)
        check_at_least(0, free_bits=free_bits)
        super().__init__(input_shape, latent_dim=sum(latent_dims), **kwargs)
        self.level_dim = level_dim
        self.latent_dims = tuple(latent_dims)
        self.free_bits = free_bits
        self.priors = GaussianChain(latent_dims, level_dim, self.activation)
        nets = (ConditionalGaussian(2 * d + up, level_dim, d, self.activation) for d, up in pairwise(latent_dims))
        self.posteriors = nn.ModuleList(nets)

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        """Return h_1, ..., h_L, where h_L is the top level's mean and log-variance: (B, *input_shape) -> (B, 2 D_l)."""
        return [*self.encoder(x).split([2 * d for d in self.latent_dims], 1)]

    def q_and_p(self, h_L: list[Tensor], above: list[Tensor]) -> tuple[GaussianParams, GaussianParams]:
        """Mean and log-variance of q(z_l | x, z_{l+1}) and p(z_l | z_{l+1}), given the levels above, top first."""
        h, p = h_L[-1 - len(above)], self.priors.prior_params(above)
        return self.posteriors[-len(above)](h, above[-1]) if above else gaussian(h), p

    def top_down(self, h_L: list[Tensor], draw: bool) -> list[Level]:
        """Return the levels from the bottom up, with z ~ q(z|x) if `draw`, otherwise z at the means of q."""
        levels: list[Level] = []
        for _ in h_L:
            levels.append(Level.from_distributions(*self.q_and_p(h_L, [level.z for level in levels]), draw=draw))
        return levels[::-1]

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of each level given the mean of the one above: (B, *input_shape) -> (B, D), (B, D)."""
        levels = self.top_down(self.bottom_up(x), draw=False)
        return torch.cat([level.mu for level in levels], 1), torch.cat([level.log_var for level in levels], 1)

    def kl(self, mu_BD: Tensor, log_var_BD: Tensor) -> Tensor:  # type: ignore[override]
        """sum_l KL_l in nats with each z at its mean, without noise, for scores: (B, D), (B, D) -> (B,)."""
        return self.priors.kl(mu_BD.split(self.latent_dims, 1), log_var_BD.split(self.latent_dims, 1))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        levels = self.top_down(self.bottom_up(x), draw=True)
        nll = self.nll(self.decoder(torch.cat([level.z for level in levels], 1).to(x.dtype)), x).mean()
        kl_L = self.batch_mean(torch.stack([level.kl() for level in levels], 1))
        kl, rate = kl_L.sum(), kl_L.clamp(min=self.free_bits).sum()
        each = {f"kl_{i}": value for i, value in enumerate(kl_L, 1)}
        return {"loss": nll + self.beta * (rate - self.capacity).abs(), "nll": nll, "kl": kl, "elbo": -nll - kl, **each}

    def log_prior(self, z: Tensor) -> Tensor:
        """The density log p(z_1 | z_2) + ... + log p(z_L) in nats, (..., D) -> (...)."""
        return self.priors.log_prob(z.split(self.latent_dims, -1))

    def sample_prior(self, n: int) -> Tensor:
        """Draw n codes from the top down, first z_L ~ p(z_L), then z_l ~ p(z_l | z_{l+1}): (n, D)."""
        return torch.cat(self.priors.sample(n, like=next(self.decoder.parameters())), 1)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Draw n codes z ~ q(z|x) for each sample, and log q(z|x) in nats: (B, *input_shape) -> (n, B, D), (n, B)."""
        levels = self.top_down([h.expand(n, *h.shape) for h in self.bottom_up(x)], draw=True)
        return torch.cat([level.z for level in levels], -1), torch.stack([level.log_q() for level in levels]).sum(0)

    def latent_chain(self) -> LatentChain:
        """Return the levels from the top down, in the form that bits-back coding needs."""
        layer = Conditional(self.priors.prior_params, lambda x, above: self.q_and_p(self.bottom_up(x), above)[0])
        layers = [layer for _ in self.latent_dims]
        return LatentChain([*layers], lambda z: self.decoder(torch.cat(z[::-1], 1)), self.likelihood, self.input_shape)
