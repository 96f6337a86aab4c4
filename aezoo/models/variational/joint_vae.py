"""Joint continuous and discrete VAE (Dupont 2018), https://arxiv.org/abs/1804.00104

    L = E[-log p(x|z, c)] + gamma |KL_z - C_z| + gamma |KL_c - C_c|     (equation 7, with the sign of a loss)
    KL_z = KL(q(z|x) || N(0, I))        C_z = max_capacity min(1, t / capacity_steps)
    KL_c = KL(q(c|x) || uniform)        C_c = min(max_discrete_capacity, N log K) min(1, t / capacity_steps)

in nats per sample, after t optimiser steps. z is Gaussian; c consists of N variables with K classes, as in
categorical_vae, and is one-hot in evaluation. gamma = 1 and capacities of 0 minimise the negative ELBO; n_variables = 0
is annealed_vae.

The authors' code increases C_c to max_discrete_capacity and limits it to N log K during the increase, so that it
reaches N log K earlier if that is smaller. On 8x8 digits (gamma 30, 2,500 steps, means of three seeds; see `python -m
benchmarks.deviations`) the nll ended at 21.3 with the authors' schedule and at 20.8 here, and the normalised mutual
information of the most probable c and the digit at 0 and at 0.44.

Shapes: B batch, D Gaussian part of the code, N variables, K classes, E = D + N K code, S importance samples.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.distributions import categorical, gaussians
from aezoo.models.variational.categorical_vae import CategoricalVAE, CategoricalVAEArgs
from aezoo.models.variational.vae import VAE
from aezoo.training.limits import check_at_least


class JointVAE(CategoricalVAE, defaults={"temperature": 0.67}, tags=("disentanglement",)):
    """A code with a Gaussian and a categorical part; the KL term of each is kept near a target that increases.

    Args:
        latent_dim: D, size of the Gaussian part.
        n_variables: N, number of categorical variables; may be 0.
        n_classes: K, number of classes of each variable.
        gamma: weight of the distance between each KL term and its capacity; the paper uses 30 on digits.
        max_capacity: final C_z in nats.
        max_discrete_capacity: final C_c in nats; at most N log K is used.
        capacity_steps: number of optimiser steps over which both increase from 0; the paper uses 25,000.
        temperature: tau of the relaxed classes, at least 0.01; near 0, they are nearly one-hot and gradients are noisy.
        straight_through: decode one-hot classes in training as well, with the gradient of the relaxed classes.
        **kwargs: see `CategoricalVAE`.
    """

    log_likelihood = VAE.log_likelihood  # there are infinitely many codes

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 10,
        n_variables: int = 1,
        n_classes: int = 10,
        gamma: float = 30.0,
        max_capacity: float = 5.0,
        max_discrete_capacity: float = 5.0,
        capacity_steps: int = 1000,
        **kwargs: Unpack[CategoricalVAEArgs],
    ) -> None:
        check_at_least(1, latent_dim=latent_dim, capacity_steps=capacity_steps)
        check_at_least(0, n_variables=n_variables, gamma=gamma)
        check_at_least(0, max_capacity=max_capacity, max_discrete_capacity=max_discrete_capacity)
        super().__init__(input_shape, n_variables=max(1, n_variables), n_classes=n_classes, **kwargs)
        del self.beta, self.capacity  # BetaAnnealing would change them without effect
        self.gamma = gamma
        self.max_capacity = max_capacity
        self.capacity_steps = capacity_steps
        self.max_discrete_capacity = min(max_discrete_capacity, n_variables * math.log(n_classes))
        self.variables = (n_variables, n_classes)
        n_probs = n_variables * n_classes
        self.sizes = (latent_dim, latent_dim, n_probs)
        self.code_shape = (latent_dim + n_probs,)
        self.encoder = self.build_encoder((sum(self.sizes),))
        self.decoder = self.build_decoder(self.code_shape)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of q(z|x), log p of q(c|x): (B, *input_shape) -> (B, D), (B, D), (B, N, K)."""
        mu_BD, log_var_BD, logits_BNK = at_least_float32(self.encoder(x)).split(self.sizes, dim=1)
        return mu_BD, log_var_BD.clamp(-30, 20), logits_BNK.unflatten(1, self.variables).log_softmax(2)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code's mean (mu and p) and log-variance (and log p): (B, *input_shape) -> (B, E), (B, E)."""
        mu_BD, log_var_BD, log_p = (part.flatten(1) for part in self.parts(x))
        return torch.cat([mu_BD, log_p.exp()], 1), torch.cat([log_var_BD, log_p], 1)

    def kl(self, mean_BE: Tensor, log_BE: Tensor) -> Tensor:  # type: ignore[override]
        """KL_z + KL_c in nats, from the results of `posterior`: (B, E), (B, E) -> (B,)."""
        d = self.sizes[0]
        return VAE.kl(mean_BE[:, :d], log_BE[:, :d]) + super().kl(mean_BE[:, d:], log_BE[:, d:])

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD, log_p_BNK = self.parts(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(torch.cat([z_BD, self.draw(log_p_BNK).flatten(1)], 1).to(x.dtype)), x).mean()
        kl_z = self.batch_mean(VAE.kl(mu_BD, log_var_BD))
        kl_c = self.batch_mean(super().kl(log_p_BNK.exp().flatten(1), log_p_BNK.flatten(1)))
        share = self.step_fraction(self.capacity_steps)
        C_z, C_c = self.max_capacity * share, self.max_discrete_capacity * share
        loss = nll + self.gamma * (kl_z - C_z).abs() + self.gamma * (kl_c - C_c).abs()
        terms = {"loss": loss, "nll": nll, "kl": kl_z + kl_c, "elbo": -(nll + kl_z + kl_c)}
        return terms | {"kl_continuous": kl_z, "kl_discrete": kl_c, "capacity": C_z, "discrete_capacity": C_c}

    def log_prior(self, z: Tensor) -> Tensor:
        """The density log p(z) p(c) of codes with one-hot classes in nats, (..., E) -> (...)."""
        return VAE.log_prior(self, z[..., : self.sizes[0]]) + super().log_prior(z[..., self.sizes[0] :])

    def sample_prior(self, n: int) -> Tensor:
        c = super().sample_prior(n)
        return torch.cat([torch.randn(n, self.sizes[0], device=c.device, dtype=c.dtype), c], 1)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Draw n codes with one-hot classes for each sample, and log q in nats: -> (n, B, E), (n, B)."""
        mu_BD, log_var_BD, log_p_BNK = self.parts(x)
        z_SBD, log_q_z_SB = gaussians.rsample(mu_BD, log_var_BD, n)
        c_SBNK, log_q_c_SB = categorical.sample_categorical(log_p_BNK.expand(n, -1, -1, -1))
        return torch.cat([z_SBD, c_SBNK.flatten(2)], 2), log_q_z_SB + log_q_c_SB
