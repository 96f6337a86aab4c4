"""CRMVAE, with reconstructions from each expert (Suzuki & Matsuo 2023), https://openreview.net/forum?id=Rn8u4MYgeNJ

A sample consists of parts x = (x_1, ..., x_M), its modalities. As in `mvtcae`, the posterior is the product of the
encoders' Gaussians, the experts, and is kept near each of them. In addition, each x_i is decoded from a code of its
expert:

    q(z|x) proportional to prod_i q_i(z|x_i)     q_i = N(mu_i, diag sigma_i^2)     p(z) = N(0, I)

    L = (1 - alpha / M) E_q[-log p(x|z)] + alpha / M sum_i E_q_i[-log p(x_i|z)] + beta R
    R = (1 - alpha) KL(q || p) + alpha / M sum_i KL(q || q_i)     alpha: M / (M + 1) by default

in nats per sample. L is (1 - alpha) L_0 + alpha / M sum_i L_i. Each of these terms contains every part once, and by
default all have the same weight:

    L_0 = E_q[-log p(x|z)] + beta KL(q || p)
    L_i = E_q[-sum_(j != i) log p(x_j|z)] + E_q_i[-log p(x_i|z)] + beta KL(q || q_i)

Without the E_q_i, L is the loss of `mvtcae`; with alpha = 0, it is the loss of a VAE. For beta = 1, -L_0 is a bound on
log p(x); it is the term elbo. -L_i is a bound on the log-evidence of x_i plus that of the other parts, each with q_i
instead of the prior. The log-evidence of x_i may then exceed log p(x_i), since KL(q_i || p) is missing, so -L is not a
bound on log p(x): if q and q_i are the posteriors of x and of x_i,

    -L = log p(x) + alpha / M sum_i KL(q_i || p)

MultiVae (https://github.com/AgatheSenellart/MultiVae) weights E_q by 1 / (M + 1), like the E_q_i, and its code weights
both by half of that, so the weight of a part decreases with the number of parts. Relative to E_q, its KLs have the same
weight as here if its beta is 1 / (2 M) of the beta here, and its E_q_i have M times the weight. If parts of a sample
are missing, L is computed from its other parts.

Shapes: B batch, D code, M parts.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.multimodal import MultimodalVAEArgs
from aezoo.models.variational.mvtcae import MVTCAE


class CRMVAE(MVTCAE, tags=("multimodal", "imputation")):
    """A VAE of several modalities whose posterior is near each expert, and whose experts also reconstruct their parts.

    Args:
        alpha: total weight of the L_i, from 0 to 1; L_0 has the weight 1 - alpha; None for M / (M + 1).
        **kwargs: see `MVTCAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        alpha: float | None = None,
        **kwargs: Unpack[MultimodalVAEArgs],
    ) -> None:
        super().__init__(input_shape, alpha=0.0 if alpha is None else alpha, **kwargs)
        self.all_alike = alpha is None
        if self.all_alike:
            self.alpha = len(self.sizes) / (len(self.sizes) + 1)

    def shares(self, n_B: Tensor) -> tuple[Tensor, Tensor]:
        return (n_B / (n_B + 1), 1 / (n_B + 1)) if self.all_alike else super().shares(n_B)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BMD, log_var_BMD = self.experts(x)
        terms = self.terms(x, mu_BMD, log_var_BMD)
        z_BMD = mu_BMD + torch.exp(0.5 * log_var_BMD) * torch.randn_like(mu_BMD)
        own = [self.nll_of_part(i, z_BMD[:, i : i + 1], x_i)[:, 0] for i, x_i in enumerate(self.split(x))]
        own_nll_B = torch.stack(own).sum(0)
        _, share_B = self.shares(self.present_mask(x).sum(1).to(own_nll_B.dtype))
        return {**terms, "loss": terms["loss"] + (share_B * own_nll_B).mean(), "own_nll": own_nll_B.mean()}
