"""MHVAE, the multi-modal hierarchical VAE (Dorent et al. 2023), https://arxiv.org/abs/2309.08747

A sample consists of parts x = (x_1, ..., x_M), its modalities, and has L levels of codes, z_1 at the bottom to z_L at
the top. Given some of the parts, S, the posterior of a level is the product of their experts and the prior:

    p(x, z) = p(x_1 | z_1) ... p(x_M | z_1) p(z_1 | z_2) ... p(z_{L-1} | z_L) p(z_L)     p(z_L) = N(0, I)
    q(z_l | x_S, z_{l+1}) = N(mu, sigma^2), proportional to p(z_l | z_{l+1}) prod_(i in S) q_i(z_l | x_i, z_{l+1})
    1 / sigma^2 = 1 / s^2 + sum_i 1 / sigma_i^2     mu = sigma^2 (m / s^2 + sum_i mu_i / sigma_i^2)     p = N(m, s^2)

    L = 1 / (2^M - 1) sum_S (E_q[-log p(x | z_1)] + beta sum_l E_q[KL(q(z_l | x_S, z_{l+1}) || p(z_l | z_{l+1}))])

in nats per sample, over all non-empty S. Each S decodes all parts, also those not in it, so with beta = 1 each term is
a bound on -log p(x). MultiVae (https://github.com/AgatheSenellart/MultiVae) also uses this mean; the authors' code
(https://github.com/ReubenDo/MHVAE), for two parts, uses the sum of the three terms. nll, kl, kl_l and elbo are those of
all parts; `subset_nelbo` is the contribution of the other S to L.

The authors' code weights means by 1 / sigma_i and uses the sum of these weights as 1 / sigma, which is not a product of
Gaussians; here q is one. As in that code, all parts share the networks of q_i below the top, whose inputs are z_{l+1}
and the output of the part's encoder for the level. Unlike in that code, codes are vectors, not maps, and there is no
adversarial loss. Its warm-up of the KL, without which levels easily remain unused, is the callback BetaAnnealing in
linear mode.

Given z_1, the parts are independent, so the product can be the true posterior at the bottom level. At higher levels
they are not independent: the product of several parts is an approximation, which is overconfident in a linear model. L
= 1 is an MVAE in which each subset decodes all parts.

The code contains all levels from the bottom up, D = D_1 + ... + D_L; `decode` reads only z_1, since x depends only on
it.

Shapes: B batch, D code, L levels, M parts, S subsets of them.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.multimodal import Decoders, Multimodal, PartsArgs
from aezoo.distributions import gaussians
from aezoo.errors import AezooError
from aezoo.models.variational.hierarchical_vae import HierarchicalVAE, LevelsArgs
from aezoo.models.variational.ladder_vae import BottomDecoder
from aezoo.models.variational.mopoe_vae import MOST_PARTS
from aezoo.nets.blocks.levels import GaussianParams, gaussian


class MHVAEArgs(LevelsArgs, PartsArgs, total=False):
    """Arguments of `MHVAE`."""


class MHVAE(Multimodal, HierarchicalVAE, tags=("multimodal", "imputation")):
    """A VAE of several modalities with a hierarchy of codes; each level determines the prior of the level below.

    Args:
        parts: sizes of at most 6 parts along the first dimension of input_shape that is longer than 1, channels of
            images or entries of vectors, rows of images with one channel; halves by default.
        **kwargs: see `HierarchicalVAE`.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Unpack[MHVAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        # a capacity is a target for a single KL, but this loss has several
        del self.capacity
        self.build_parts(self.parts, self.net, self.hidden_dims, self.activation, n_decoded=self.latent_dims[0])
        if len(self.sizes) > MOST_PARTS:
            raise AezooError(f"parts must be at most {MOST_PARTS}, got {len(self.sizes)}: use mvae or mmvae for more")
        if len(self.latent_dims) > 1:
            self.decoder = Decoders(
                [BottomDecoder(self.latent_dims[0], part) for part in self.decoder], self.decoder.dim
            )

    def subsets(self) -> list[tuple[int, ...]]:
        """Return all non-empty subsets of the parts, the set of all parts first."""
        m = len(self.sizes)
        return [chosen for size in range(m, 0, -1) for chosen in combinations(range(m), size)]

    def bottom_up(self, x: Tensor, parts: Sequence[int] | None = None) -> list[Tensor]:
        """Return h_1, ..., h_L of some parts (default: all); h_L is mean and log-variance: -> (B, M, 2 D_l)."""
        return [*self.encode_parts(x, parts).split([2 * d for d in self.latent_dims], 2)]

    def experts(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of each part's q_i(z_L|x_i), at the top: (B, *input_shape) -> (B, M, D_L) twice."""
        return gaussian(self.bottom_up(x, parts)[-1])

    def q_and_p(self, h_L: list[Tensor], above: list[Tensor]) -> tuple[GaussianParams, GaussianParams]:
        """Mean and log-variance of q(z_l | x_S, z_{l+1}), S the parts of h_l, and of p(z_l | z_{l+1})."""
        h, prior = h_L[-1 - len(above)], self.priors.prior_params(above)
        if above:
            experts = self.posteriors[-len(above)](h, above[-1][..., None, :].expand(*h.shape[:-1], -1))
        else:
            experts = gaussian(h)
        mu, log_var = (
            torch.cat([own, of_p[..., None, :].expand_as(own[..., :1, :])], -2)
            for own, of_p in zip(experts, prior, strict=True)
        )
        return gaussians.product(mu, log_var), prior

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        levels = self.top_down(self.bottom_up(x, parts), draw=False)
        return torch.cat([level.mu for level in levels], 1), torch.cat([level.log_var for level in levels], 1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        h_LM = [h.unbind(1) for h in self.bottom_up(x)]
        of_S = ([torch.stack([h_M[i] for i in chosen], 1) for h_M in h_LM] for chosen in self.subsets())
        drawn_S = [self.top_down(h_L, draw=True) for h_L in of_S]
        z_BSD = torch.stack([torch.cat([level.z for level in levels], 1) for levels in drawn_S], 1)
        nll_BS = torch.stack([self.nll_of_part(i, z_BSD, x_i) for i, x_i in enumerate(self.split(x))]).sum(0)
        kl_SL = torch.stack([torch.stack([level.kl().mean() for level in levels]) for levels in drawn_S])
        nll_S = nll_BS.mean(0)
        nelbo_S = nll_S + self.beta * kl_SL.sum(1)
        nll, kl, rest = nll_S[0], kl_SL[0].sum(), nelbo_S[1:].sum() / len(nelbo_S)
        each = {f"kl_{i}": value for i, value in enumerate(kl_SL[0], 1)}
        return {"loss": nelbo_S.mean(), "nll": nll, "kl": kl, "elbo": -(nll + kl), "subset_nelbo": rest, **each}
