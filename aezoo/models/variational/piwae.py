"""Partially importance weighted autoencoder (Rainforth et al. 2018), https://arxiv.org/abs/1802.04537

The decoder maximises the IWAE's bound over all M K samples, and the encoder the MIWAE's bound on them; in nats:

    decoder   log p(x) >= E[log 1/(MK) sum_mk w_mk]         d = sum_mk u_mk d log w_mk     u_mk = w_mk / sum_mk w_mk
    encoder   log p(x) >= E[1/M sum_m log 1/K sum_k w_mk]   d = sum_mk c_mk d log w_mk     c_mk = 1/M w_mk / sum_k w_mk
    w_mk = p(x|z_mk) p(z_mk) / q(z_mk|x)    z_mk ~ q(z|x) independently

A single loss gives both gradients, without a second optimiser. Let log p~ be log p(x, z) at codes detached from the
encoder, and let the weights be constants. The loss then has the value of the decoder's bound and the gradient of

    sum_mk c_mk log w_mk + (u_mk - c_mk) log p~_mk

The weight is c for the encoder, and c + (u - c) = u for the decoder, which is therefore evaluated twice. M = 1 is the
IWAE. stl uses only the encoder's path through z; dreg uses this path with c_mk = 1/M v_mk^2, where v_mk is the share of
w_mk in the sum of its group.

Shapes: B batch, D code, M groups, K importance samples in a group, N = M K.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.models.variational.iwae import IWAE, MOST_SAMPLES, IWAEArgs


class PIWAE(IWAE, defaults={"n_samples": 8}, tags=("generation",)):
    """Gaussian code with a standard normal prior; MIWAE's gradient for the encoder, IWAE's for the decoder.

    Args:
        n_groups: M, number of bounds that the encoder averages; M K codes are decoded for each data sample, twice.
        n_samples: K, number of importance samples for each of the encoder's bounds.
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
        m, k = self.n_groups, self.n_samples
        z_BND, nll_BN, kl_BN = self.draw(x, m * k)
        log_w_BN = -(nll_BN + kl_BN)
        log_w_BMK = log_w_BN.detach().unflatten(1, (m, k))
        v_BMK = log_w_BMK.softmax(2)
        c_BN = (v_BMK**2 if self.estimator == "dreg" else v_BMK).flatten(1) / m
        u_BN = log_w_BN.detach().softmax(1)
        z_cut_BND = z_BND.detach()
        log_p_cut_BN = self.log_prior(z_cut_BND) - self.nll_given(x, z_cut_BND)
        surrogate = (c_BN * log_w_BN + (u_BN - c_BN) * log_p_cut_BN).sum(1).mean()
        iwae = (torch.logsumexp(log_w_BN.detach(), 1) - math.log(m * k)).mean()
        miwae = (torch.logsumexp(log_w_BMK, 2) - math.log(k)).mean()
        bound = iwae + (surrogate - surrogate.detach())
        return {"loss": -bound, "nll": nll_BN.mean(), "kl": kl_BN.mean(), "miwae": miwae, "elbo": bound}
