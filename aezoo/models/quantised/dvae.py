"""dVAE, the discrete VAE of DALL-E (Ramesh et al. 2021), https://arxiv.org/abs/2102.12092

A Gumbel VQ-VAE (see `gumbel_vq_vae`) with the likelihood of appendix A.3 and the schedules of appendix A.2:

    L = E[-log p(x|z)] + beta KL(q(c|x) || p(c))     summed over pixels and places: the paper divides by the pixels
    log p(x|z) = sum_i log 0.8 - |logit(y_i) - mu_i| / b_i - log(2 b_i y_i (1 - y_i))     y = 0.8 x + 0.1

mu and log b are the decoder's output, two maps for each channel of x. beta rises from 0 (by default to 6.6) over
`kl_steps`, and tau falls (by default to 1/16) over `temperature_steps`, both along half a period of a cosine. With beta
above 1 or with relaxed codes, L is not a bound; `elbo` is one, as in `gumbel_vq_vae`.

log b has a soft floor of -5: constant pixels have no maximum likelihood, and 1/255 is about exp(-4.4) in the logit of
mid-grey. The reconstruction is the mean of x; the paper decodes to the median, sigmoid(mu). This likelihood suits
photographs. On digits, which are mostly black, it learns black first and the codes collapse; use bernoulli for these.

Shapes: B batch, C channels of a code, K codes, P places.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.distributions.likelihoods import LogitLaplace
from aezoo.models.quantised.gumbel_vq_vae import GumbelVQVAE
from aezoo.training.limits import at_least


class LogitLaplaceOfTwo(LogitLaplace):
    """Logit-Laplace with a scale for each value: params (B, 2 C, ...) hold the locations, then the log scales."""

    def __init__(self) -> None:
        super().__init__(learned=False)

    def split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_b = params.chunk(2, 1)
        return mu, F.softplus(log_b + 5).clamp(max=10) - 5


class DVAE(GumbelVQVAE):
    """A map of codes sampled from logits, with the schedules and the logit-Laplace likelihood of DALL-E.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: C, channels of a code.
        codebook_size: K, number of codes.
        beta: weight of the KL term after kl_steps.
        kl_steps: optimiser steps over which the weight rises from 0; 0 for beta from the start. The paper uses 5,000.
        temperature: final tau, at least 0.01: near 0, codes are nearly one-hot and gradients are noisy.
        start_temperature: tau at the first step.
        temperature_steps: optimiser steps over which tau falls to temperature; 0 keeps it there. The paper has 150,000.
        hard: decode one-hot codes in training too, with the gradient of the relaxed codes.
        places: codes per sample with net mlp, lstm and transformer; others have a code at each place of their grid.
        net: resnet, conv, convnext, conv_keras, unet, gdn, dc, vit, mixer, mlp, lstm or transformer.
        hidden_dims: channels of the encoder's stages (mlp: widths of its layers); the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        likelihood: how outputs are compared with data: logit_laplace, of which the decoder gives scales, too;
            logit_laplace:learned with one for all values; bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        codebook_size: int = 512,
        beta: float = 6.6,
        kl_steps: int = 1000,
        temperature: float = 1 / 16,
        start_temperature: float = 1.0,
        temperature_steps: int = 2000,
        hard: bool = False,
        places: int = 16,
        net: str = "resnet",
        hidden_dims: tuple[int, ...] = (32, 64),
        activation: str = "relu",
        likelihood: str = "logit_laplace",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        at_least(0, kl_steps=kl_steps)
        super().__init__(
            input_shape,
            latent_dim=latent_dim,
            codebook_size=codebook_size,
            beta=beta,
            temperature=temperature,
            start_temperature=start_temperature,
            temperature_steps=temperature_steps,
            hard=hard,
            places=places,
            net=net,
            hidden_dims=hidden_dims,
            activation=activation,
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()
        self.kl_steps = kl_steps
        if likelihood == "logit_laplace":
            self.likelihood = LogitLaplaceOfTwo()
            channels, *grid = self.input_shape
            flat = isinstance(next(self.decoder.children()), nn.Flatten)
            code_shape = (math.prod(self.code_shape),) if flat else self.code_shape
            decoder = nets.decoder(net, code_shape, (2 * channels, *grid), hidden_dims[::-1], activation)
            self.decoder = nn.Sequential(nn.Flatten(), decoder) if flat else decoder

    def tau(self) -> Tensor:
        risen = _half_cosine(self.step_fraction(self.temperature_steps))
        return self.start_temperature + (self.temperature - self.start_temperature) * risen

    def kl_weight(self) -> Tensor:
        return self.beta * _half_cosine(self.step_fraction(self.kl_steps))


def _half_cosine(share: Tensor) -> Tensor:
    """Rises from 0 to 1 with its argument, flat at both ends."""
    return (1 - torch.cos(math.pi * share)) / 2
