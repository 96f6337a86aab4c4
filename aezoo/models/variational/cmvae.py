"""CMVAE, the clustering multimodal VAE (Palumbo et al. 2024), https://openreview.net/forum?id=k5THrhXDV3

A sample consists of parts x = (x_1, ..., x_M), its modalities. The model is `mmvae_plus`, with u in one of K clusters:

    p(x, c, u, w) = p(c) p(u|c) prod_i p(w_i) p(x_i|u, w_i)     p(u|c) = N(m_c, diag s_c^2)     p(c), m, s: learned
    q(u|x) = 1/M sum_i q_i(u|x_i)     q(c|u) = p(c|u)

    L = 1/M sum_i E_q_i[-log p(x_i|u, w_i) - sum_(j != i) E_r_j[log p(x_j|u, w)]
                        + beta (log q(u|x) - log p(u) + KL(q_i(w_i|x_i) || p(w_i)))]     p(u) = sum_c p(c) p(u|c)

in nats per sample, a bound if L of `mmvae_plus` is one. The paper's mean over q(c|u) of log p(c, u) - log q(c|u) equals
log p(u). The estimate is the same as in `mmvae_plus`, plus log N(u; 0, I) - log p(u) at each sample; K = 1 with m = 0
and s = 1 gives `mmvae_plus`. The paper's diffusion model is not implemented. MultiVae
(https://github.com/AgatheSenellart/MultiVae) uses s = 1.

The probability of a cluster is the mean over parts of q_i(c|x_i), which is proportional to exp E_q_i[log p(c) p(u|c)]
as in VaDE (https://arxiv.org/abs/1611.05148); the paper samples one u from each part and takes the most frequent of
their clusters. After training, `prune` chooses the number of clusters: it repeatedly removes the cluster with the
smallest sum_x q(c|x), and of the sets of 2 to K clusters it keeps the one with the smallest penalised normalised
entropy, averaged over parts and samples,

    beta H(q_i(c|x_i)) / log K - 1/D log sum_c exp E_q_i[log p(c) p(u|c)]

Shapes: B batch, D shared code, M parts, S of them that are used, K clusters.
"""

import math
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.mixture_prior import MixturePrior
from aezoo.distributions.gaussians import LOG_2PI
from aezoo.errors import AezooError
from aezoo.models.variational.mmvae_plus import MMVAEPlus, MMVAEPlusArgs

_LOG_ZERO = -1e4  # its exponential is 0, and weights remain finite


class CMVAE(MixturePrior, MMVAEPlus, tags=("multimodal", "imputation", "generation")):
    """A VAE of several modalities with private codes, and a shared code whose prior is a mixture of clusters.

    Args:
        latent_dim: D, size of the code that all parts share.
        private_dim: P, size of each part's private code.
        n_components: K, number of clusters, each a Gaussian component of the shared code's prior.
        beta: weight of the KL term.
        **kwargs: see `MMVAEPlus`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        n_components: int = 10,
        **kwargs: Unpack[MMVAEPlusArgs],
    ) -> None:
        super().__init__(input_shape, latent_dim=latent_dim, **kwargs)
        self.build_mixture(n_components, latent_dim)

    def draws(self, x: Tensor, noise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        u_BMD, nll_BM, kl_BM = super().draws(x, noise)
        return u_BMD, nll_BM, kl_BM - 0.5 * (u_BMD**2 + LOG_2PI).sum(2) - self.mixture_log_prob(u_BMD)

    def log_prior(self, z: Tensor) -> Tensor:
        u, w = z.split([self.latent_dim, z.shape[-1] - self.latent_dim], -1)
        return self.mixture_log_prob(u) + super().log_prior(w)

    def sample_prior(self, n: int) -> Tensor:
        z = super().sample_prior(n)
        return torch.cat([self.sample_mixture(n).to(z.dtype), z[:, self.latent_dim :]], 1)

    def log_clusters(self, x: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        """E_q_i[log p(c) p(u|c)] in nats for some parts, all by default: (B, *input_shape) -> (B, S, K)."""
        mu_BSD, log_var_BSD = self.components(x, parts)
        return self.log_joint(mu_BSD.flatten(0, 1), log_var_BSD.exp().flatten(0, 1)).unflatten(0, mu_BSD.shape[:2])

    @torch.no_grad()
    def clusters(self, x: Tensor, parts: Sequence[int] | None = None) -> Tensor:
        """The probability of each cluster given some of the parts, all by default: (B, *input_shape) -> (B, K)."""
        return (self.weights(x, parts)[..., None] * self.log_clusters(x, parts).softmax(2)).mean(1)

    @torch.no_grad()
    def prune(self, x: Tensor) -> dict[int, float]:
        """Choose the best number of clusters for these samples, and set p(c) of the other clusters to 0.

        Args:
            x: samples on which the numbers of clusters are compared, (B, *input_shape).

        Returns:
            The penalised normalised entropy for each number of clusters.

        Raises:
            AezooError: there is only one cluster.
        """
        log_w_K, log_BMK, share_BM = self.weight_K.log_softmax(0), self.log_clusters(x), self.weights(x)
        kept = (log_w_K > _LOG_ZERO / 2).nonzero().flatten().tolist()
        if len(kept) < 2:
            raise AezooError("prune needs at least 2 clusters, but there is only one")
        found = {}
        while len(kept) > 1:
            own_BMK = log_BMK[..., kept] - log_w_K[kept].logsumexp(0)
            q_BMK = own_BMK.softmax(2)
            entropy_BM = torch.special.entr(q_BMK).sum(2) / math.log(len(kept))
            penalised_BM = self.beta * entropy_BM - own_BMK.logsumexp(2) / self.latent_dim
            found[len(kept)] = (share_BM * penalised_BM).mean().item(), kept
            least = (share_BM[..., None] * q_BMK).sum((0, 1)).argmin().item()
            kept = [c for i, c in enumerate(kept) if i != least]
        best = min(found.values())[1]
        self.weight_K[[c for c in range(self.n_components) if c not in best]] = _LOG_ZERO
        return {k: penalised for k, (penalised, _) in found.items()}
