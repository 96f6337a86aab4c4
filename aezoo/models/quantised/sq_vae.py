"""SQ-VAE, a stochastically quantised VAE (Takida et al. 2022), https://arxiv.org/abs/2205.07547

Codes are sampled by their distance, with a learned variance; this is the paper's Gaussian SQ-VAE:

    L = E[-log p(x|z_q)] + E_q ||z - z_q||^2 / (2 s^2) + P log K - H(q)      z = f(x)
    q(c|x) = prod_n softmax_k(-||z_n - e_k||^2 / (2 s^2))                    c uniform, z_q,n = e_c_n
    p(x|z_q) = N(g(z_q), v),   v = argmin L = mean of (x - g(z_q))^2         the likelihood of `sigma_vae`

L is a negative ELBO in which codes have noise N(z_q, s^2). q has the same noise around z, N(z, s^2), but it is not
sampled. All weights are 1, and no gradient is stopped. All terms but the first are means over the codebook and fall as
s grows. The first falls with s if other codes reconstruct worse, and faster for smaller v. So q is broad at first and
concentrates on the nearest code as reconstructions improve.

In training, codes are relaxed as in `gumbel_vq_vae`, with its temperature schedule, or one-hot (`hard`). In evaluation,
the loss samples codes, and v is its running mean. There, and always with `hard`, log p(x) >= E[elbo] with elbo = -(nll
+ kl), since p(x) is that of codes without noise. `encode` and all reconstructions use the nearest codes without
sampling; `score` is L at these codes.

Shapes: B batch, X data dimensions, D channels of a code, K codes, P positions.
"""

import math
from typing import Any, Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import FixedLikelihoodArgs
from aezoo.bases.quantised import CodeMapAutoencoder
from aezoo.distributions.categorical import sample_gumbel
from aezoo.distributions.likelihoods import Gaussian
from aezoo.quantisers.base import Quantised, quantisers_in_eval_mode
from aezoo.quantisers.stochastic_vq import StochasticVQ
from aezoo.training.limits import check_at_least


class SQVAE(CodeMapAutoencoder, has_prior=True, score_term="latents", tags=("tokenizer",)):
    """Learns a map of codes sampled by distance, with a learned variance that falls as reconstructions improve.

    Args:
        latent_dim: D, channels of a code.
        codebook_size: K, number of codes.
        variance: one s^2 for all, or with a factor from the encoder for each sample, or position (place).
        start_variance: initial s^2, relative to codes of variance 1: if too small, one code takes all; if too large,
            no code matters. 8 suits 64 channels (the authors' code has 11), 0.5 the variance sample or place.
        temperature: final temperature of the relaxed codes, at least 0.01: near 0, gradients are noisy.
        start_temperature: temperature at the first step.
        temperature_steps: optimiser steps over which it falls to temperature; 0 keeps it there.
        hard: decode one-hot codes in training too, with the gradient of the relaxed codes.
        places: codes per sample with net mlp, lstm and transformer; others have a code at each position of their grid.
        **kwargs: see `CodeMapAutoencoder`.
    """

    likelihood: Gaussian
    quantiser: StochasticVQ
    steps: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        codebook_size: int = 512,
        variance: str = "one",
        start_variance: float = 2.0,
        temperature: float = 0.5,
        start_temperature: float = 1.0,
        temperature_steps: int = 1000,
        hard: bool = False,
        places: int = 16,
        **kwargs: Unpack[FixedLikelihoodArgs],
    ) -> None:
        super().__init__(input_shape, likelihood="gaussian", places=places, **kwargs)
        check_at_least(0, temperature_steps=temperature_steps)
        check_at_least(0.01, temperature=temperature, start_temperature=start_temperature)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(2, codebook_size=codebook_size)
        self.temperature = temperature
        self.start_temperature = start_temperature
        self.temperature_steps = temperature_steps
        self.enable_step_counter()
        self.quantiser = StochasticVQ(
            latent_dim,
            codebook_size,
            temperature=float(self.tau()),
            variance=variance,
            start_variance=start_variance,
            hard=hard,
        )
        self.build_code_nets(self.quantiser.dim, latent_dim)
        # read by scores and evaluation; saved, unlike the usual fixed scale of a likelihood
        self.likelihood.register_buffer("log_scale", self.likelihood.log_scale)

    def tau(self) -> Tensor:
        """Return the temperature at the current step, ()."""
        share = self.step_fraction(self.temperature_steps)
        return self.start_temperature ** (1 - share) * self.temperature**share

    def begin_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        x, y = super().begin_step(batch, batch_idx)
        self.quantiser.temperature.copy_(self.tau())
        return x, y

    def draw(self, x: Tensor) -> Quantised:
        """Sample codes from q(c|x), relaxed in training, and return a result like that of `quantise`."""
        z = self.encoder(x)
        found = self.quantiser.quantise(z)
        if self.training:
            return found
        logits_BPK = self.quantiser.logits(z)
        indices = (logits_BPK + sample_gumbel(logits_BPK)).argmax(2).view_as(found.indices)
        return Quantised(self.codes(indices).to(z.dtype), indices, found.terms)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.draw(x)
        sse_B = (at_least_float32(x) - at_least_float32(self.decoder(z_q))).flatten(1).square().sum(1)
        log_s, x_dim = self.likelihood.log_scale, x[0].numel()
        if self.training:
            # dL/dv = 0 at this v, so it needs no gradient
            v = (self.batch_mean(sse_B) / x_dim).clamp(math.exp(-30), math.exp(20)).detach()
            log_s.lerp_((0.5 * v.log()).to(log_s), 0.1)  # like BatchNorm's running statistics
        else:
            v = torch.exp(2 * at_least_float32(self.likelihood.bounded_scale))
        nll = (sse_B / (2 * v) + x_dim / 2 * torch.log(2 * math.pi * v)).mean()
        kl = terms["kl"]
        figures = {"elbo": -(nll + kl), "sigma": v.sqrt(), "code_sigma": torch.exp(self.quantiser.log_variance / 2)}
        return {"loss": nll + kl + terms["dequantisation"], "nll": nll, **terms, **figures}

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return L with the nearest codes in nats, without noise, (B, *input_shape) -> (B,)."""
        z = self.encoder(x)
        with quantisers_in_eval_mode(self):
            z_q = self.quantiser(z).z_q
        latent_BP = math.log(self.index_sizes[0]) - self.quantiser.logits(z).logsumexp(2)
        return self.nll(self.decoder(z_q), x) + latent_BP.sum(1)

    def sample(self, n: int) -> Tensor:
        return self.decode_indices(torch.randint(self.index_sizes[0], (n, *self.index_shape), device=self.device))
