"""JumpReLU sparse autoencoder (Rajamanoharan et al. 2024), https://arxiv.org/abs/2407.14435

A latent outputs its pre-activation if it exceeds a threshold per latent, and the penalty is the number of active
latents:

    pi = W_enc (x - b) + b_enc     f = pi H(pi - theta)     x_hat = sum_i f_i d_i + b     ||d_i|| = 1
    L = -log p(x | x_hat) + lam ||f||_0     ||f||_0 = sum_i H(pi_i - theta_i)     (equation 9)

L is in nats per sample, H is the unit step and theta >= 0. The derivative of a step with respect to theta is 0 almost
everywhere, so it is estimated (section 4) with a rectangle of width eps, K(u) = 1 for |u| < 1/2:

    df / dtheta = -theta / eps K((pi - theta) / eps)     dH(pi - theta) / dtheta = -1 / eps K((pi - theta) / eps)

Their mean over samples estimates the derivative of the mean. Both use pi: a ReLU before them would move all values
below 0 to 0, within the rectangle of a small theta. With target_l0, the penalty is lam (L0 / target_l0 - 1)^2, with L0
the mean over the batch of all ranks. theta is trained in float32. Its logarithm is not trained, because the derivative
with respect to it vanishes as theta approaches 0. theta = 0 is the ReLU. With form april, as in sae_l1, b is not
subtracted and directions have any norm.

Shapes: B batch, X data dimensions, N latents.
"""

from typing import Unpack

from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.models.sparse.sae_l1 import SAEL1, DictionaryArgs, FormArgs
from aezoo.nets.blocks.jumprelu import JumpReLU
from aezoo.training.limits import check_above, check_at_least


class JumpReLUSAEArgs(DictionaryArgs, FormArgs, total=False):
    """Arguments that `JumpReLUSAE` passes to `SAEL1`."""


class JumpReLUSAE(JumpReLU, SAEL1, tags=("interpretability",)):
    """Few latents of a wide dictionary are active for each sample, each above a learned threshold.

    Args:
        latent_dim: N, number of latents in the dictionary.
        l0_weight: lam, weight of the number of active latents, or of the penalty with target_l0.
        l0_steps: optimiser steps over which lam rises from 0; with 0, lam is constant.
        target_l0: target number of active latents per sample; 0 penalises the number itself.
        threshold: initial theta; 0.001 in the paper.
        bandwidth: eps, width of the rectangle that gives thresholds their gradient; 0.001 in the paper.
        **kwargs: see `SAEL1`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 512,
        l0_weight: float = 0.1,
        l0_steps: int = 0,
        target_l0: float = 0.0,
        threshold: float = 0.01,
        bandwidth: float = 0.05,
        **kwargs: Unpack[JumpReLUSAEArgs],
    ) -> None:
        check_at_least(0, l0_weight=l0_weight, l0_steps=l0_steps)
        if not (target_l0 == 0 or 0 < target_l0 <= latent_dim):
            raise AezooError(f"target_l0 must be 0 or lie between 0 and latent_dim={latent_dim}, got {target_l0}")
        check_at_least(0, threshold=threshold)
        check_above(0, bandwidth=bandwidth)
        super().__init__(input_shape, latent_dim=latent_dim, l1=l0_weight, l1_steps=l0_steps, **kwargs)
        self.l0_weight = l0_weight
        self.target_l0 = target_l0
        self.init_thresholds(latent_dim, threshold, bandwidth)

    def pre_activations(self, x: Tensor) -> Tensor:
        """Return pi in at least float32, (B, *input_shape) -> (B, N)."""
        return at_least_float32(self.encoder(self.read(x)))

    def latents(self, x: Tensor) -> Tensor:
        return self.jump(self.pre_activations(x)).to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        x = self.normalised(x)
        pi_BN = self.pre_activations(x)
        f_BN = self.jump(pi_BN).to(x.dtype)
        nll = self.nll(self.decoder(f_BN), x).mean()
        l0 = self.batch_mean(self.step(pi_BN).sum(1))
        penalty = (l0 / self.target_l0 - 1) ** 2 if self.target_l0 else l0
        return {
            "loss": nll + self.warm_up_weight(self.l0_weight) * penalty,
            "nll": nll,
            **self.usage_terms(f_BN),
            "l0": l0,
        }

    def after_optimizer_step(self) -> None:
        super().after_optimizer_step()
        self.clamp_thresholds()
