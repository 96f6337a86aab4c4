"""dVAE, the discrete VAE of DALL-E (Ramesh et al. 2021), https://arxiv.org/abs/2102.12092

A Gumbel VQ-VAE (see `gumbel_vq_vae`) with the likelihood of appendix A.3 and the schedules of appendix A.2:

    L = E[-log p(x|z)] + beta KL(q(c|x) || p(c))     summed over pixels and positions: the paper divides by the pixels
    log p(x|z) = sum_i log 0.8 - |logit(y_i) - mu_i| / b_i - log(2 b_i y_i (1 - y_i))     y = 0.8 x + 0.1

mu and log b are the decoder's output, two maps for each channel of x. beta rises from 0 (by default to 6.6) over
`kl_steps`, and tau falls (by default to 1/16) over `temperature_steps`, both along half a period of a cosine. With beta
above 1 or with relaxed codes, L is not a bound; `elbo` is one, as in `gumbel_vq_vae`.

log b has a soft lower bound of -5: the likelihood of constant pixels has no maximum, and 1/255 is about exp(-4.4) in
the logit of mid-grey. The reconstruction is the mean of x; the paper decodes to the median, sigmoid(mu). This
likelihood suits photographs. On digits, which are mostly black, it fits black first and the codes collapse; use
bernoulli for these.

Shapes: B batch, C channels of a code, K codes, P positions.
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.distributions.likelihoods import LogitLaplace
from aezoo.models.quantised.gumbel_vq_vae import GumbelVQVAE, GumbelVQVAEArgs
from aezoo.training.limits import check_at_least


class LogitLaplaceWithScale(LogitLaplace):
    """Logit-Laplace with a scale for each value: params (B, 2 C, ...) hold the locations, then the log scales."""

    def __init__(self) -> None:
        super().__init__(learned=False)

    def split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_b = params.chunk(2, 1)
        return mu, F.softplus(log_b + 5).clamp(max=10) - 5

    def best_params(self, x: Tensor) -> Tensor:
        mu = super().best_params(x)
        return torch.cat([mu, torch.full_like(mu, -100)], 1)  # the lower bound of log b


class DVAE(GumbelVQVAE, defaults={"beta": 6.6, "temperature": 1 / 16, "temperature_steps": 2000}, tags=("tokenizer",)):
    """Learns a map of codes sampled from logits, with the schedules and the logit-Laplace likelihood of DALL-E.

    Args:
        beta: weight of the KL term after kl_steps.
        kl_steps: optimiser steps over which the weight rises from 0; 0 for beta from the start. The paper uses 5,000.
        temperature_steps: optimiser steps over which tau falls to temperature; 0 keeps it there. The paper uses
            150,000.
        likelihood: how outputs are compared with data: logit_laplace, for which the decoder also outputs scales;
            logit_laplace:learned with one scale for all values; bernoulli, continuous_bernoulli, gaussian,
            gaussian:0.1, gaussian:learned, sigmoid_gaussian, laplace, discretised_logistic, beta_binomial, logcosh,
            logit_laplace.
        **kwargs: see `GumbelVQVAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        kl_steps: int = 1000,
        likelihood: str = "logit_laplace",
        **kwargs: Unpack[GumbelVQVAEArgs],
    ) -> None:
        check_at_least(0, kl_steps=kl_steps)
        super().__init__(input_shape, likelihood=likelihood, **kwargs)
        self.kl_steps = kl_steps
        if likelihood == "logit_laplace":
            self.likelihood = LogitLaplaceWithScale()
            channels, *grid = self.input_shape
            flat = isinstance(next(self.decoder.children()), nn.Flatten)
            code_shape = (math.prod(self.code_shape),) if flat else self.code_shape
            decoder = nets.decoder(self.net, code_shape, (2 * channels, *grid), self.hidden_dims[::-1], self.activation)
            self.decoder = nn.Sequential(nn.Flatten(), decoder) if flat else decoder

    def tau(self) -> Tensor:
        risen = _half_cosine(self.step_fraction(self.temperature_steps))
        return self.start_temperature + (self.temperature - self.start_temperature) * risen

    def kl_weight(self) -> Tensor:
        return self.beta * _half_cosine(self.step_fraction(self.kl_steps))


def _half_cosine(share: Tensor) -> Tensor:
    """Increase from 0 to 1 with `share`, with slope 0 at both ends."""
    return (1 - torch.cos(math.pi * share)) / 2
