"""MMVAE+, with a private code for each part as well (Palumbo et al. 2023), https://openreview.net/forum?id=sdQGxouELX

A sample consists of parts x = (x_1, ..., x_M), its modalities. Each is decoded from a shared code u and a private w_i:

    p(x, u, w) = p(u) prod_i p(w_i) p(x_i|u, w_i)     p(u) = N(0, I)     p(w_i) = N(0, I)
    q(u|x) = 1/M sum_i q_i(u|x_i)     q_i(u, w_i|x_i) = N(mu_i, diag sigma_i^2)     r_i(w) = N(0, diag s_i^2)

    L = 1/M sum_i E_q_i[-log p(x_i|u, w_i) - sum_(j != i) E_r_j[log p(x_j|u, w)]
                        + beta (log q(u|x) - log p(u) + KL(q_i(w_i|x_i) || p(w_i)))]

in nats per sample, estimated as in `mmvae`. If u comes from another part, x_j is decoded with a w from r_j, so that
private codes cannot contain shared information; s_j is learned. If r_j is p, -L for beta = 1 is a bound on log p(x), in
which the posterior of w_j is q_j for a u from x_j, and the prior for a u from another part. If parts of a sample are
missing, L is computed from its other parts. L is that of MultiVae (https://github.com/AgatheSenellart/MultiVae) with
one sample of each code. In MultiVae, r_j also has the mean of p, but distributions are Laplace by default; here they
are Gaussian.

The code is (u, w_1, ..., w_M): the mean of the mu_i of u, and the w_i of each part. If a part is missing or not used,
its w_i is the mean of p(w_i).

Shapes: B batch, D shared code, P private code, E = D + P, M parts, S of them that are used, K importance samples.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.multimodal import MultimodalBetaArgs, PrivateDecoders
from aezoo.distributions import gaussians
from aezoo.models.variational.mmvae import MMVAE
from aezoo.training.limits import check_at_least


class MMVAEPlusArgs(MultimodalBetaArgs, total=False):
    """Arguments of `MMVAEPlus`, without the size of the shared code."""

    private_dim: int


class MMVAEPlus(MMVAE, tags=("multimodal", "imputation", "generation")):
    """A VAE of several modalities with one shared code, and a private code for each modality.

    Args:
        latent_dim: D, size of the code that all parts share.
        private_dim: P, size of each part's private code; 0 gives the MMVAE.
        beta: weight of the terms with q, log q(u|x) - log p(u) and the KL of w_i.
        **kwargs: see `MMVAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        private_dim: int = 4,
        **kwargs: Unpack[MultimodalBetaArgs],
    ) -> None:
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, private_dim=private_dim)
        super().__init__(input_shape, latent_dim=latent_dim + private_dim, **kwargs)
        self.latent_dim = latent_dim
        self.decoder = PrivateDecoders([*self.decoder], self.decoder.dim, latent_dim)
        self.code_shape = (latent_dim + len(self.sizes) * private_dim,)
        used = private_dim > 0 and len(self.sizes) > 1
        self.r_log_var_MP = nn.Parameter(torch.zeros(len(self.sizes), private_dim), requires_grad=used)

    def components(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        mu_BSE, log_var_BSE = self.experts(x, parts)
        return mu_BSE[..., : self.latent_dim], log_var_BSE[..., : self.latent_dim]

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        parts = range(len(self.sizes)) if parts is None else parts
        own, found = self.experts(x, parts), []
        mu_BSD, log_var_BSD = (values[..., : self.latent_dim] for values in own)
        u = gaussians.mixture_moments(mu_BSD, log_var_BSD, self.weights(x, parts))
        for u_BD, values_BSE in zip(u, own, strict=True):
            w = dict(zip(parts, values_BSE[..., self.latent_dim :].unbind(1), strict=True))
            unseen_BP = torch.zeros_like(values_BSE[:, 0, self.latent_dim :])  # mean and log-variance of N(0, I)
            found.append(torch.cat([u_BD, *(w.get(i, unseen_BP) for i in range(len(self.sizes)))], 1))
        return found[0], found[1]

    def draws(self, x: Tensor, noise: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decoded shared codes, and their -log p(x|u, w) and KL terms: -> (B, M, D), (B, M), (B, M)."""
        mu_BME, log_var_BME = self.experts(x)
        draw = torch.randn_like if noise else torch.zeros_like
        z_BME = mu_BME + torch.exp(0.5 * log_var_BME) * draw(mu_BME)
        u_BMD, w_BMP = z_BME[..., : self.latent_dim], z_BME[..., self.latent_dim :]
        std_MP = torch.exp(0.5 * at_least_float32(self.r_log_var_MP))
        # in one call, because a compiled graph may reorder separate draws
        r_BMMP = std_MP * draw(w_BMP[:, :, None].expand(-1, -1, len(self.sizes), -1))
        nll_MBM = []
        for i, x_i in enumerate(self.split(x)):
            w_i_BMP = torch.cat([r_BMMP[:, :i, i], w_BMP[:, i : i + 1], r_BMMP[:, i + 1 :, i]], 1)
            nll_MBM.append(self.nll_of_part(i, torch.cat([u_BMD, w_i_BMP], 2), x_i))
        kl_BM = self.kl(mu_BME.flatten(0, 1), log_var_BME.flatten(0, 1)).unflatten(0, mu_BME.shape[:2])
        log_q_BMM = self.log_densities(u_BMD, *(v[..., : self.latent_dim] for v in (mu_BME, log_var_BME)))
        log_mixture_BM = self.log_mean(log_q_BMM, self.weights(x))
        return u_BMD, torch.stack(nll_MBM).sum(0), kl_BM - (log_q_BMM.diagonal(dim1=1, dim2=2) - log_mixture_BM)

    def bound(self, x: Tensor, noise: bool = True) -> tuple[Tensor, Tensor]:
        _, nll_BM, kl_BM = self.draws(x, noise)
        weight_BM = self.weights(x)
        return weight_BM * nll_BM, weight_BM * kl_BM

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        u_KBD, log_q_u_KB = super().sample_posterior(x, n)
        mu_BMP, log_var_BMP = (v[..., self.latent_dim :] for v in self.experts(x))
        w_KBMP, log_q_w_KBM = gaussians.rsample(mu_BMP, log_var_BMP, n)
        return torch.cat([u_KBD, w_KBMP.flatten(2)], 2), log_q_u_KB + log_q_w_KBM.sum(2)
