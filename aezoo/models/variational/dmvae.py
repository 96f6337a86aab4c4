"""DMVAE, the private-shared disentangled multimodal VAE (Lee & Pavlovic 2021), https://arxiv.org/abs/2012.13024

A sample consists of parts x = (x_1, ..., x_M), its modalities. Each is decoded from a shared code u and a private w_i:

    p(x, u, w) = p(u) prod_i p(w_i) p(x_i|u, w_i)     p(u) = N(0, I)     p(w_i) = N(0, I)
    q(u|x_S) proportional to p(u) prod_(i in S) q_i(u|x_i)     S: some of the parts
    q_i(u, w_i|x_i) = N(mu_i, diag sigma_i^2)

    L = -ELBO_all(x) - sum_i ELBO_i(x)
    ELBO_S(x) = E_(q(u|x_S) q(w|x))[sum_j log p(x_j|u, w_j)]
                - beta (KL(q(u|x_S) || p(u)) + sum_j KL(q_j(w_j|x_j) || p(w_j)))

in nats per sample. With beta = 1, each ELBO is a bound on log p(x) of all parts. The first ELBO infers u from all
parts, each of the others from a single part. All parts are decoded from this u, each with its w_j, so u must contain
what they share. The terms nll, kl and elbo are those of the first ELBO; `cross_nelbo` is the contribution of the others
to L. With M = 1 there are no others, and the model is a VAE whose posterior of u includes the prior.

The posterior of u given one part includes the prior, as does the posterior given several parts. Therefore, if the q_i
are the likelihoods p(x_i|u), all posteriors of u are exact. For one part, the authors' code
(https://github.com/seqam-lab/DMVAE) and MultiVae (https://github.com/AgatheSenellart/MultiVae) use only q_i; a q_i that
is exact as a factor of a product is not exact as the posterior given one part. The authors' code also adds the KL of u
once for each decoded part, and omits the likelihoods of ELBO_all.

The code is (u, w_1, ..., w_M); for a part that is not used, w_i is the mean of p(w_i).

Shapes: B batch, D shared code, P private code, E = D + P, C = D + M P, M parts, S posteriors of u: given all parts,
    then given each single part.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.multimodal import Multimodal, MultimodalBetaArgs, PrivateDecoders
from aezoo.models.variational.mvae import MVAE
from aezoo.models.variational.vae import VAE
from aezoo.training.limits import check_at_least


class DMVAE(Multimodal, VAE, tags=("multimodal", "imputation")):
    """A VAE of several modalities with private codes, and a shared code whose posterior is a product of experts.

    Args:
        latent_dim: D, size of the code that all parts share.
        private_dim: P, size of each part's private code.
        beta: weight of the KL terms.
        **kwargs: see `VAE`.
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
        # a capacity is a target for a single KL, but this loss has several
        del self.capacity
        self.latent_dim = latent_dim
        self.build_parts(self.parts, self.net, self.hidden_dims, self.activation)
        self.decoder = PrivateDecoders([*self.decoder], self.decoder.dim, latent_dim)
        self.code_shape = (latent_dim + len(self.sizes) * private_dim,)

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        m, d = len(self.sizes), self.latent_dim
        parts = [*range(m)] if parts is None else [*parts]
        own = self.experts(x, parts)
        found = []
        for u_BD, values_BSE in zip(MVAE.product(*(v[..., :d] for v in own)), own, strict=True):
            w_SBP = values_BSE[..., d:].unbind(1)
            unseen_BP = torch.zeros_like(w_SBP[0])  # mean and log-variance of N(0, I)
            w_MBP = [w_SBP[parts.index(i)] if i in parts else unseen_BP for i in range(m)]
            found.append(torch.cat([u_BD, *w_MBP], 1))
        return found[0], found[1]

    def posteriors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log-variances of q(u|x_S) q(w|x) for all parts and each single part: -> (B, S, C), (B, S, C)."""
        m, d = len(self.sizes), self.latent_dim
        mu_BME, log_var_BME = self.experts(x)
        every_1M = torch.ones(1, m, dtype=torch.bool, device=x.device)
        alone_MM = torch.eye(m, dtype=torch.bool, device=x.device)[: m if m > 1 else 0]
        member_SM = torch.cat([every_1M, alone_MM])
        shared = MVAE.product(mu_BME[:, None, :, :d], log_var_BME[:, None, :, :d], member_SM)
        private = (v[:, None, :, d:].flatten(2).expand(-1, len(member_SM), -1) for v in (mu_BME, log_var_BME))
        mu_BSC, log_var_BSC = (torch.cat(pair, 2) for pair in zip(shared, private, strict=True))
        return mu_BSC, log_var_BSC

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BSC, log_var_BSC = self.posteriors(x)
        z_BSC = mu_BSC + torch.exp(0.5 * log_var_BSC) * torch.randn_like(mu_BSC)
        b, s, _ = z_BSC.shape
        x_BS = x[:, None].expand(b, s, *x.shape[1:]).flatten(0, 1)
        nll_BS = self.nll(self.decoder(z_BSC.flatten(0, 1).to(x.dtype)), x_BS).unflatten(0, (b, s))
        kl_BS = self.kl(mu_BSC.flatten(0, 1), log_var_BSC.flatten(0, 1)).unflatten(0, (b, s))
        nll, kl = nll_BS[:, 0].mean(), kl_BS[:, 0].mean()
        cross = (nll_BS + self.beta * kl_BS)[:, 1:].sum(1).mean()
        return {"loss": nll + self.beta * kl + cross, "nll": nll, "kl": kl, "elbo": -(nll + kl), "cross_nelbo": cross}
