"""Categorical variational autoencoder (Jang et al. 2016), https://arxiv.org/abs/1611.01144

The code has N independent categorical variables of K classes, trained with a relaxation; in nats per sample:

    L = E[-log p(x|z)] + beta KL(q(c|x) || p(c))     q(c|x) = prod_n Cat(p_n)     p(c) uniform
    z_n = softmax((log p_n + g_n) / tau)             g_n Gumbel noise: z_n -> one-hot of arg max (log p_n + g_n) ~ q
    KL = sum_n sum_k p_nk log(K p_nk)                from 0, for the uniform, to N log K

tau is `temperature`, or decreases to it from `start_temperature` by a constant factor per step. In evaluation, codes
are one-hot samples from q (Maddison et al. 2016). In this case, and always with `straight_through`, log p(x) >= E[elbo]
with elbo = -(nll + kl) for any beta. `encode` returns the probabilities p, whose reconstructions are better than those
of one-hot codes.

Shapes: B batch, N variables, K classes, D = N K code, S importance samples, M = K^N possible codes.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs
from aezoo.distributions.categorical import all_codes, gumbel_softmax, kl_from_uniform, one_hot, sample_categorical
from aezoo.models.variational.vae import VAE, BetaArgs
from aezoo.training.limits import check_at_least


class CategoricalVAEArgs(NetworkArgs, total=False):
    """Arguments of `CategoricalVAE`, without beta and the size of the code."""

    temperature: float
    start_temperature: float
    temperature_steps: int
    straight_through: bool


class CategoricalVAE(VAE, normal_prior=False, tags=("generation",)):
    """Categorical code with a uniform prior, trained with a relaxation.

    Args:
        n_variables: N, number of categorical variables in the code.
        n_classes: K, number of classes of each variable; the code has N K entries. The paper uses 10, which needs
            longer training.
        temperature: tau, at least 0.01; near 0, codes are nearly one-hot and gradients are noisy.
        start_temperature: tau at the first step, if temperature_steps is above 0.
        temperature_steps: number of optimiser steps over which tau decreases exponentially to temperature; 0 uses
            temperature from the start.
        straight_through: decode one-hot codes in training as well, with the gradient of the relaxed codes.
        **kwargs: see `VAE`.
    """

    steps: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_variables: int = 20,
        n_classes: int = 4,
        temperature: float = 0.5,
        start_temperature: float = 1.0,
        temperature_steps: int = 0,
        straight_through: bool = False,
        **kwargs: Unpack[BetaArgs],
    ) -> None:
        check_at_least(1, n_variables=n_variables)
        check_at_least(2, n_classes=n_classes)
        check_at_least(0, temperature_steps=temperature_steps)
        check_at_least(0.01, temperature=temperature, start_temperature=start_temperature)
        super().__init__(input_shape, latent_dim=n_variables * n_classes, **kwargs)
        self.variables = (n_variables, n_classes)
        self.temperature = temperature
        self.start_temperature = start_temperature
        self.temperature_steps = temperature_steps
        self.straight_through = straight_through
        self.encoder = self.build_encoder(self.code_shape)
        self.enable_step_counter()

    def tau(self) -> Tensor:
        """Return the temperature at the current step, ()."""
        share = self.step_fraction(self.temperature_steps)
        return self.start_temperature ** (1 - share) * self.temperature**share

    def log_probs(self, x: Tensor) -> Tensor:
        """Return the logarithms of the probabilities p of q(c|x): (B, *input_shape) -> (B, N, K)."""
        return at_least_float32(self.encoder(x)).unflatten(1, self.variables).log_softmax(2)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The class probabilities and their logarithms: (B, *input_shape) -> (B, D), (B, D)."""
        log_p_BD = self.log_probs(x).flatten(1)
        return log_p_BD.exp(), log_p_BD

    def kl(self, p_BD: Tensor, log_p_BD: Tensor) -> Tensor:  # type: ignore[override]
        """KL(q(c|x) || uniform) in nats, in closed form: (B, D), (B, D) -> (B,)."""
        return kl_from_uniform(p_BD, log_p_BD, self.variables[1])

    def draw(self, log_p_BNK: Tensor) -> Tensor:
        """Draw z from the relaxed distribution, or one-hot c with its gradient: (B, N, K) -> (B, N, K)."""
        return gumbel_softmax(log_p_BNK, self.tau(), self.straight_through or not self.training)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        log_p_BNK = self.log_probs(x)
        nll = self.nll(self.decoder(self.draw(log_p_BNK).flatten(1).to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(log_p_BNK.exp().flatten(1), log_p_BNK.flatten(1)))
        return {"loss": nll + self.beta * (kl - self.capacity).abs(), "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def log_prior(self, z: Tensor) -> Tensor:
        """The probability log p(c) of one-hot codes in nats, (..., D) -> (...)."""
        return z.new_full(z.shape[:-1], -self.variables[0] * math.log(self.variables[1]))

    def sample_prior(self, n: int) -> Tensor:
        weight = next(self.decoder.parameters())
        return one_hot(torch.rand(n, *self.variables, device=weight.device)).flatten(1).to(weight.dtype)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Draw n one-hot codes c ~ q(c|x) for each sample, and log q(c|x) in nats: -> (n, B, D), (n, B)."""
        c_SBNK, log_q_SB = sample_categorical(self.log_probs(x).expand(n, -1, -1, -1))
        return c_SBNK.flatten(2), log_q_SB

    @torch.no_grad()
    def log_likelihood(self, x: Tensor, n: int) -> Tensor:
        """Return log p(x) in nats, exact if there are at most n codes, else importance-sampled: (B, *shape) -> (B,)."""
        n_variables, k = self.variables
        if k**n_variables > n:
            return super().log_likelihood(x, n)
        params_M = self.decoder(all_codes(n_variables, k, x.device).flatten(1).to(x.dtype))
        log_px_BM = torch.stack([-self.nll(params_M, sample.expand_as(params_M)) for sample in x])
        return torch.logsumexp(log_px_BM, 1) - n_variables * math.log(k)
