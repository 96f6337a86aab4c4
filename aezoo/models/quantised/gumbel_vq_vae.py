"""Gumbel VQ-VAE, a grid of codes sampled from logits (Jang et al. 2016), https://arxiv.org/abs/1611.01144

The encoder outputs logits of K codes at each position. Codes are sampled from these logits, not selected by distance
(as in taming-transformers, https://github.com/CompVis/taming-transformers, and in DALL-E). In nats per sample:

    L = E[-log p(x|z)] + beta KL(q(c|x) || p(c))     q(c|x) = prod_n Cat(p_n)     p(c) uniform
    z_n = sum_k y_nk e_k                             y_n = softmax((log p_n + g_n) / tau)     g_n Gumbel noise
    KL = sum_n sum_k p_nk log(K p_nk)                from 0 to P log K, summed over positions

tau falls from `start_temperature` to `temperature` by a constant factor per step. In training, y is relaxed, or with
`hard` one-hot with the gradient of the relaxed y. In evaluation, the loss samples c itself. There, and everywhere with
`hard`, log p(x) >= E[elbo] with elbo = -(nll + kl), for any beta. `encode` takes the most likely codes and samples
nothing; `score` is nll + kl of these codes, which is not the negative of a bound.

Shapes: B batch, C channels of a code, K codes, P positions, D = P K.
"""

from typing import Any, Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import FixedLikelihoodArgs
from aezoo.bases.quantised import CodeMapArgs, CodeMapAutoencoder
from aezoo.distributions.categorical import kl_from_uniform, sample_gumbel
from aezoo.quantisers.base import Quantised
from aezoo.quantisers.gumbel_vq import GumbelVQ
from aezoo.training.limits import check_at_least


class GumbelVQVAEArgs(FixedLikelihoodArgs, total=False):
    """Arguments of `GumbelVQVAE`, without the likelihood."""

    latent_dim: int
    codebook_size: int
    beta: float
    temperature: float
    start_temperature: float
    temperature_steps: int
    hard: bool
    places: int


class GumbelVQVAE(CodeMapAutoencoder, has_prior=True, score_term="kl", tags=("tokenizer",)):
    """Learns a map of categorical codes with a uniform prior.

    Args:
        latent_dim: C, channels of a code.
        codebook_size: K, number of codes.
        beta: weight of the KL term; 1 gives the bound, but short training then leaves most of the code unused.
        temperature: final tau, at least 0.01: near 0, codes are nearly one-hot and gradients are noisy.
        start_temperature: tau at the first step.
        temperature_steps: optimiser steps over which tau falls to temperature; 0 keeps it there.
        hard: decode one-hot codes in training too, with the gradient of the relaxed codes.
        **kwargs: see `CodeMapAutoencoder`.
    """

    quantiser: GumbelVQ
    steps: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        codebook_size: int = 512,
        beta: float = 0.1,
        temperature: float = 0.5,
        start_temperature: float = 1.0,
        temperature_steps: int = 1000,
        hard: bool = False,
        **kwargs: Unpack[CodeMapArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, beta=beta, temperature_steps=temperature_steps)
        check_at_least(0.01, temperature=temperature, start_temperature=start_temperature)
        check_at_least(2, codebook_size=codebook_size)
        self.beta = beta
        self.temperature_steps = temperature_steps
        self.temperature = temperature
        self.start_temperature = start_temperature
        self.build_code_nets(codebook_size, latent_dim)
        self.enable_step_counter()
        self.quantiser = GumbelVQ(codebook_size, latent_dim, float(self.tau()), hard=hard)

    def tau(self) -> Tensor:
        """Return the temperature at the current step, ()."""
        share = self.step_fraction(self.temperature_steps)
        return self.start_temperature ** (1 - share) * self.temperature**share

    def kl_weight(self) -> Tensor | float:
        """Return the weight of the KL term at the current step."""
        return self.beta

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        x, y = super().begin_step(batch, batch_idx)
        self.quantiser.temperature.copy_(self.tau())
        return x, y

    def draw(self, x: Tensor) -> Quantised:
        """Sample codes from q(c|x), relaxed in training, and return a result like that of `quantise`."""
        logits = self.encoder(x)
        found = self.quantiser.quantise(logits)
        if self.training:
            return found
        logits_BPK = _by_place(logits)
        indices = (logits_BPK + sample_gumbel(logits_BPK)).argmax(2).view_as(found.indices)
        return Quantised(self.codes(indices).to(logits.dtype), indices, found.terms)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.draw(x)
        nll, kl = self.nll(self.decoder(z_q), x).mean(), terms["kl"]
        return {"loss": nll + self.kl_weight() * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return -log p(x | code) + KL for the most likely codes in nats, without noise, (B, *input_shape) -> (B,)."""
        logits = self.encoder(x)
        logits_BPK = _by_place(logits)
        codes = self.codes(logits_BPK.argmax(2).view(-1, *self.index_shape)).to(logits.dtype)
        log_p_BD = logits_BPK.log_softmax(2).flatten(1)
        return self.nll(self.decoder(codes), x) + kl_from_uniform(log_p_BD.exp(), log_p_BD, self.index_sizes[0])

    def sample(self, n: int) -> Tensor:
        size, device = self.index_sizes[0], self.quantiser.code_KC.device
        return self.decode_indices(torch.randint(size, (n, *self.index_shape), device=device))


def _by_place(logits: Tensor) -> Tensor:
    """Return logits in at least float32, (B, K, *positions) -> (B, P, K)."""
    return at_least_float32(logits).flatten(2).movedim(1, 2)
