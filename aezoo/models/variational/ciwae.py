"""Combination importance weighted autoencoder (Rainforth et al. 2018), https://arxiv.org/abs/1802.04537

Maximises a mixture of the evidence lower bound and the importance weighted bound, in nats per sample:

    log p(x) >= beta ELBO + (1 - beta) L_K
    ELBO = E[1/K sum_k log w_k]     L_K = E[log 1/K sum_k w_k]     w_k = p(x|z_k) p(z_k) / q(z_k|x)     z_k ~ q(z|x)

beta = 0 is the IWAE; beta = 1 is a VAE with K samples and a sampled KL. With v_k = w_k / sum_j w_j, the encoder's
gradient is sum_k c_k d log w_k with c_k = beta/K + (1 - beta) v_k. stl uses only the path through z. dreg uses this
path with beta/K + (1 - beta) v_k^2 instead; it has the mean of reparam (Tucker et al. 2018).

Shapes: B batch, D code, K importance samples.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.models.variational.iwae import IWAE, IWAEArgs


class CIWAE(IWAE, tags=("generation",)):
    """Gaussian code with a standard normal prior, trained with a mixture of the VAE's bound and the IWAE's bound.

    Args:
        beta: weight of the ELBO, from 0 to 1.
        **kwargs: see `IWAE`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, beta: float = 0.05, **kwargs: Unpack[IWAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        if not 0 <= beta <= 1:
            raise AezooError(f"beta must lie between 0 and 1, got {beta}")
        self.beta = beta

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BKD, nll_BK, kl_BK = self.draw(x, self.n_samples)
        log_w_BK = -(nll_BK + kl_BK)
        if self.estimator == "dreg":
            v_BK = log_w_BK.detach().softmax(1)
            stl_BK, dreg_BK = (self.beta / self.n_samples + (1 - self.beta) * v for v in (v_BK, v_BK**2))
            self.scale_gradient(z_BKD, dreg_BK / stl_BK.clamp_min(torch.finfo(v_BK.dtype).tiny))
        iwae = (torch.logsumexp(log_w_BK, 1) - math.log(self.n_samples)).mean()
        bound = self.beta * log_w_BK.mean() + (1 - self.beta) * iwae
        return {"loss": -bound, "nll": nll_BK.mean(), "kl": kl_BK.mean(), "iwae": iwae, "elbo": bound}
