"""beta-VAE with annealed capacity (Burgess et al. 2018), https://arxiv.org/abs/1804.03599

    L = E_q[-log p(x|z)] + gamma |KL(q(z|x) || p(z)) - C|     (equation 8, with the sign of a loss)
    C = max_capacity min(1, t / capacity_steps)     t optimiser steps taken

in nats per sample. The capacity C of the code increases during training. KL is the mean over the batch of all ranks, so
single samples may use more or less than C; with per_sample it is computed for each sample separately. gamma = 1 and
max_capacity = 0 give the VAE.

C is part of the model: a resumed run continues with it, evaluation uses the value of the last training step, and the
callback BetaAnnealing is not needed.

Shapes: B batch, D code.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.network import LatentArgs
from aezoo.models.variational.vae import VAE
from aezoo.training.limits import check_at_least


class AnnealedVAE(VAE, tags=("disentanglement",)):
    """A VAE whose KL term is kept near a target that increases during training.

    Args:
        gamma: weight of the distance between the KL term and C; the paper uses 1000, with much longer training.
        max_capacity: final C in nats; the paper uses 25 on dSprites.
        capacity_steps: number of optimiser steps over which C increases from 0; the paper uses 100,000.
        per_sample: keep the KL term of each sample near C, instead of the mean over the batch.
        **kwargs: see `VAE`.
    """

    steps: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        gamma: float = 30.0,
        max_capacity: float = 25.0,
        capacity_steps: int = 1000,
        per_sample: bool = False,
        **kwargs: Unpack[LatentArgs],
    ) -> None:
        check_at_least(0, gamma=gamma, max_capacity=max_capacity)
        check_at_least(1, capacity_steps=capacity_steps)
        super().__init__(input_shape, **kwargs)
        self.gamma = gamma
        self.per_sample = per_sample
        self.max_capacity = max_capacity
        self.capacity_steps = capacity_steps
        # BetaAnnealing would change these without effect; it refuses a model without them
        del self.beta, self.capacity
        self.enable_step_counter()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl_B = self.kl(mu_BD, log_var_BD)
        kl = self.batch_mean(kl_B)
        C = self.max_capacity * self.step_fraction(self.capacity_steps)
        distance = (kl_B - C).abs().mean() if self.per_sample else (kl - C).abs()
        return {"loss": nll + self.gamma * distance, "nll": nll, "kl": kl, "elbo": -(nll + kl), "capacity": C}
