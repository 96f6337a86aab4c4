"""MVTCAE (Hwang et al. 2021), https://papers.nips.cc/paper/2021/hash/65a99bb7a3115fdede20da98b08a370f-Abstract.html

The multi-view total correlation autoencoder. A sample consists of parts x = (x_1, ..., x_M), its modalities or views.
The posterior is the product of their encoders' Gaussians, the experts:

    q(z|x) = N(mu, diag sigma^2), proportional to prod_i q_i(z|x_i)     q_i = N(mu_i, diag sigma_i^2)     p(z) = N(0, I)
    1 / sigma^2 = sum_i 1 / sigma_i^2     mu = sigma^2 sum_i mu_i / sigma_i^2

    L = (M - alpha) / M E_q[-sum_i log p(x_i|z)] + beta ((1 - alpha) KL(q || p) + alpha / M sum_i KL(q || q_i))

in nats per sample. The total correlation of the parts that z explains is

    sum_i I(x_i; z) - I(x; z) = (M - 1) / M sum_i I(x_i; z) - 1 / M sum_i I(x; z | x_i)

where I(x; z | x_i), the information in z about x beyond x_i, is at most E KL(q || q_i). L is alpha times the resulting
bound plus 1 - alpha times the loss of a VAE whose posterior does not include the prior. With alpha = 1, no term
contains the prior; M = 1 is 1 - alpha times the VAE. If parts of a sample are missing, L is computed from the others,
and M is their number.

This follows the authors' code (https://github.com/gr8joo/MVTCAE, where alpha is tc_ratio, 5 / 6, and beta is 2.5 on
PolyMNIST), except for the 1e-8 that it adds to variances in the product. The posterior given only some parts is the
product of their experts.

Shapes: B batch, D code, M parts.
"""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.multimodal import MissingModalities, MultimodalVAEArgs
from aezoo.distributions import gaussians
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE


class MVTCAE(MissingModalities, VAE, tags=("multimodal", "imputation")):
    """A VAE of several modalities whose posterior, the product of their experts, is kept near each expert.

    Args:
        beta: weight of all KL terms.
        alpha: weight of the KL terms between the posterior and the parts, from 0 to 1; that of the prior is 1 - alpha.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        alpha: float = 5 / 6,
        **kwargs: Unpack[MultimodalVAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        # a capacity is a target for a single KL, but this loss has several
        del self.capacity
        self.build_parts(self.parts, self.net, self.hidden_dims, self.activation)
        if not 0 <= alpha <= 1:
            raise AezooError(f"alpha must be from 0 to 1, got {alpha}")
        if alpha == len(self.sizes) == 1:
            raise AezooError("alpha must be less than 1 for samples of one part: their loss would have no KL term")
        self.alpha = alpha

    def infer(self, x: Tensor, parts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        return gaussians.product(*self.experts(x, parts), self.present_mask(x, parts))

    def shares(self, n_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and alpha / M for samples with these numbers of parts: (B,) -> (B,), (B,)."""
        return torch.full_like(n_B, self.alpha), self.alpha / n_B

    def terms(self, x: Tensor, mu_BMD: Tensor, log_var_BMD: Tensor) -> dict[str, Tensor]:
        """The loss and its terms, from the experts' moments: (B, *input_shape), (B, M, D), (B, M, D) -> scalars."""
        present_BM = self.present_mask(x)
        mu_BD, log_var_BD = gaussians.product(mu_BMD, log_var_BMD, present_BM)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll_B, kl_B = self.nll(self.decoder(z_BD.to(x.dtype)), x), self.kl(mu_BD, log_var_BD)
        parts_kl_BM = gaussians.kl(mu_BD[:, None], log_var_BD[:, None], mu_BMD, log_var_BMD)
        parts_kl_B = parts_kl_BM.masked_fill(~present_BM, 0).sum(1)
        alpha_B, share_B = self.shares(present_BM.sum(1).to(mu_BD.dtype))
        loss_B = (1 - share_B) * nll_B + self.beta * ((1 - alpha_B) * kl_B + share_B * parts_kl_B)
        nll, kl, parts_kl = nll_B.mean(), kl_B.mean(), parts_kl_B.mean()
        return {"loss": loss_B.mean(), "nll": nll, "kl": kl, "parts_kl": parts_kl, "elbo": -(nll + kl)}

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        return self.terms(x, *self.experts(x))
