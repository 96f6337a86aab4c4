"""Gated sparse autoencoder (Rajamanoharan et al. 2024), https://arxiv.org/abs/2404.16014

Separate paths compute which latents are active and their magnitudes, so that the penalty on the gates does not shrink
the magnitudes:

    pi_gate = W_gate (x - b) + b_gate     W_mag = exp(r) W_gate     f = H(pi_gate) relu(W_mag (x - b) + b_mag)
    x_hat = sum_i f_i d_i + b     ||d_i|| = 1
    L = -log p(x | x_hat) + lam sum_i relu(pi_gate)_i + ||x - x_hat_frozen(relu(pi_gate))||^2     (equation 8)

L is in nats per sample. The squared error is that of a Gaussian of variance 1/2. The step H passes no gradient. The
last two terms train the gate. The last one has a frozen decoder: it does not train W_dec, and like the second term, it
trains b only through pi_gate. r scales each row of W_gate. With form april, as in sae_l1, b is not subtracted,
directions have any norm and the penalty is lam sum relu(pi_gate)_i ||d_i||.

Shapes: B batch, X data dimensions, N latents.
"""

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from aezoo.autoencoder import at_least_float32
from aezoo.models.sparse.sae_l1 import SAEL1, FormArgs, SAEL1Args


class GatedSAEArgs(SAEL1Args, FormArgs, total=False):
    """Arguments of `GatedSAE`."""


class GatedSAE(SAEL1, tags=("interpretability",)):
    """Few latents of a wide dictionary are active for each sample, without the shrinkage of an L1 penalty.

    Args:
        l1: lam, weight of the sum of the gates' positive pre-activations.
        **kwargs: see `SAEL1`.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Unpack[GatedSAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        self.r_N = nn.Parameter(torch.zeros(self.latent_dim))
        self.b_mag_N = nn.Parameter(torch.zeros(self.latent_dim))

    def pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pre-activations of the gates and of the magnitudes, (B, *input_shape) -> (B, N), (B, N)."""
        shared_BN = F.linear(self.read(x), self.encoder.weight)
        return shared_BN + self.encoder.bias, self.r_N.exp() * shared_BN + self.b_mag_N

    def latents(self, x: Tensor) -> Tensor:
        gate_BN, magnitude_BN = self.pre_activations(x)
        return ((gate_BN > 0) * magnitude_BN.relu()).to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        x = self.normalised(x)
        gate_BN, magnitude_BN = self.pre_activations(x)
        f_BN = ((gate_BN > 0) * magnitude_BN.relu()).to(x.dtype)
        nll_B = self.nll(self.decoder(f_BN), x)
        l1_B = (at_least_float32(gate_BN).relu() * self.costs()).sum(1)
        frozen = {name: p.detach() for name, p in self.decoder.named_parameters()}
        via_gate = self.likelihood.mean(functional_call(self.decoder, frozen, gate_BN.relu().to(x.dtype)))
        aux_B = at_least_float32(x - via_gate).flatten(1).square().sum(1)
        return {
            "loss": (nll_B + self.warm_up_weight(self.l1) * l1_B + aux_B).mean(),
            "nll": nll_B.mean(),
            "l1": l1_B.mean(),
            "aux": aux_B.mean(),
            **self.usage_terms(f_BN),
        }
