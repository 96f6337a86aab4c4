"""Multiply importance weighted autoencoder (Rainforth et al. 2018), https://arxiv.org/abs/1802.04537

Maximises the mean of M importance weighted bounds of K samples each, in nats per sample:

    log p(x) >= E[1/M sum_m log 1/K sum_k w_mk]     w_mk = p(x|z_mk) p(z_mk) / q(z_mk|x)     z_mk ~ q(z|x) independently

Averaging over M reduces the noise in the encoder's gradient, and K tightens the bound. M = 1 is the IWAE; K = 1 is a
VAE with M samples. The estimators are those of the IWAE, applied in each group of K samples.

Shapes: B batch, D code, M groups, K importance samples in a group.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.models.variational.iwae import IWAE, MOST_SAMPLES, IWAEArgs


class MIWAE(IWAE, defaults={"n_samples": 8}, tags=("generation",)):
    """Gaussian code with a standard normal prior, trained on the mean of several importance weighted bounds.

    Args:
        n_groups: M, number of bounds that are averaged; M K codes are decoded for each data sample.
        n_samples: K, number of importance samples per bound.
        **kwargs: see `IWAE`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, n_groups: int = 8, **kwargs: Unpack[IWAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        if not 1 <= n_groups <= MOST_SAMPLES // self.n_samples:
            raise AezooError(
                f"n_groups must be at least 1 and n_groups n_samples at most {MOST_SAMPLES}, got {n_groups}"
            )
        self.n_groups = n_groups

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BND, nll_BN, kl_BN = self.draw(x, self.n_groups * self.n_samples)
        log_w_BMK = -(nll_BN + kl_BN).unflatten(1, (self.n_groups, self.n_samples))
        if self.estimator == "dreg":
            self.scale_gradient(z_BND, log_w_BMK.detach().softmax(2).flatten(1))
        bound = (torch.logsumexp(log_w_BMK, 2) - math.log(self.n_samples)).mean()
        return {"loss": -bound, "nll": nll_BN.mean(), "kl": kl_BN.mean(), "elbo": bound}
