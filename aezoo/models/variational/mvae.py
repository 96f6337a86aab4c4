"""MVAE, the multimodal VAE (Wu & Goodman 2018), https://arxiv.org/abs/1802.05335

A sample consists of parts x = (x_1, ..., x_M), its modalities. Each encoder is an expert for z, and so is the prior:

    q(z|x_S) = N(mu_S, diag sigma_S^2), proportional to p(z) prod_(i in S) q_i(z|x_i)     S: some of the parts
    1 / sigma_S^2 = 1 + sum_i 1 / sigma_i^2     mu_S = sigma_S^2 sum_i mu_i / sigma_i^2     (section 2.1)

    L = -ELBO(x) - sum_i ELBO(x_i) - sum_j ELBO(x_Sj)     (section 2.2)
    ELBO(x_S) = E_q(z|x_S)[sum_(i in S) log p(x_i|z)] - beta KL(q(z|x_S) || p(z))

in nats per sample. The first ELBO is that of all parts, the next ones are those of single parts, and the last k are
those of random subsets of 2 to M - 1 parts. Subsets are drawn separately for each sample: first the size, uniformly, as
in the authors' code (https://github.com/mhw32/multimodal-vae-public, celeba19), then the members. The terms nll, kl and
elbo are those of all parts; `subset_nelbo` is the contribution of the other ELBOs to L. With M = 1, this is a VAE whose
posterior is q_1 times the prior. If parts of a sample are missing, L is computed from its other parts. With a single
part, only ELBO(x_i) remains, as in the paper's weakly supervised experiments.

Shapes: B batch, D code, M parts, S subsets: all parts, each single part, k random ones.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.bases.multimodal import MissingModalities, MultimodalVAEArgs
from aezoo.distributions import gaussians
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE

# the code of each is decoded
MOST_SUBSETS = 1000


class MVAE(MissingModalities, VAE, tags=("multimodal", "imputation")):
    """A VAE of several modalities whose posterior is the product of the prior and one expert for each modality.

    Args:
        n_subsets: k, number of random subsets of the parts whose ELBO is added at each step; none for two parts.
        beta: weight of the KL terms of all subsets.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_subsets: int = 1,
        **kwargs: Unpack[MultimodalVAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        # a capacity is a target for a single KL, but this loss has several
        del self.capacity
        if not 0 <= n_subsets <= MOST_SUBSETS:
            raise AezooError(f"n_subsets must be from 0 to {MOST_SUBSETS}, got {n_subsets}")
        self.n_subsets = n_subsets
        self.build_parts(self.parts, self.net, self.hidden_dims, self.activation)

    @staticmethod
    def product(mu: Tensor, log_var: Tensor, member: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(z) prod_i q_i(z) over the i in `member`: (..., M, D), (..., M) -> (..., D)."""
        # the prior N(0, I) is one more expert, with mean and log-variance 0
        mu, log_var = (F.pad(values, (0, 0, 0, 1)) for values in (mu, log_var))
        return gaussians.product(mu, log_var, None if member is None else F.pad(member, (0, 1), value=True))

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        return self.product(*self.experts(x, parts), self.present_mask(x, parts))

    def subsets(self, present_BM: Tensor) -> Tensor:
        """The parts in each subset, (B, S, M): all parts that the sample has, each single part, and random ones.

        If a sample has fewer than 2 parts, its single-part subsets are empty; with fewer than 3, so are its random
        ones. Empty subsets add nothing to the loss.
        """
        n, m, device = *present_BM.shape, present_BM.device
        present_B1M, n_present_B11 = present_BM[:, None], present_BM.sum(1)[:, None, None]
        alone_BMM = (
            torch.eye(m, dtype=torch.bool, device=device)[: m if m > 1 else 0] & present_B1M & (n_present_B11 > 1)
        )
        fixed_BSM = torch.cat([present_B1M, alone_BMM], 1)
        if m < 3 or not self.n_subsets:
            return fixed_BSM
        size_Bk1 = 2 + (torch.rand(n, self.n_subsets, 1, device=device) * (n_present_B11 - 2)).long()
        rank_BkM = torch.rand(n, self.n_subsets, m, device=device).masked_fill(~present_B1M, 1).argsort(2).argsort(2)
        return torch.cat([fixed_BSM, (rank_BkM < size_Bk1) & (n_present_B11 > 2)], 1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BMD, log_var_BMD = self.experts(x)
        m, member_BSM = len(self.sizes), self.subsets(self.present_mask(x))
        mu_BSD, log_var_BSD = self.product(mu_BMD[:, None], log_var_BMD[:, None], member_BSM)
        z_BSD = mu_BSD + torch.exp(0.5 * log_var_BSD) * torch.randn_like(mu_BSD)
        nll = rest_nll = mu_BSD.new_zeros(())
        for i, x_i in enumerate(self.split(x)):
            # part i is decoded only for the subsets that can contain it: all parts, only part i, and random ones
            z_BsD, member_BsM = (
                torch.cat([v[:, :1], v[:, 1 + i : 2 + i], v[:, 1 + m :]], 1) for v in (z_BSD, member_BSM)
            )
            nll_Bs = self.nll_of_part(i, z_BsD, x_i) * member_BsM[..., i]
            nll, rest_nll = nll + nll_Bs[:, 0].mean(), rest_nll + nll_Bs[:, 1:].sum(1).mean()
        kl_BS = self.kl(mu_BSD.flatten(0, 1), log_var_BSD.flatten(0, 1)).unflatten(0, member_BSM.shape[:2])
        kl, rest_kl = kl_BS[:, 0].mean(), kl_BS[:, 1:].sum(1).mean()
        rest = rest_nll + self.beta * rest_kl
        return {"loss": nll + self.beta * kl + rest, "nll": nll, "kl": kl, "elbo": -(nll + kl), "subset_nelbo": rest}
