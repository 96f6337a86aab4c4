"""Noise2Noise (Lehtinen et al. 2018), https://arxiv.org/abs/1803.04189

Learns to denoise without clean targets, from two noisy copies y1 and y2 of a sample, with independent noise:

    L = E[ -log p(y2 | f(y1)) ]     with likelihood=gaussian  E ||f(y1) - y2||^2 + D/2 log(pi)

Given y1, zero-mean noise in y2 adds Var(y2 | x) to the squared error and does not change the minimiser (section 2). The
best f is therefore the same as with clean targets, E[x | y1]. This holds for Gaussian noise and for Poisson noise,
y = Poisson(peak x) / peak. It does not hold for masked, replaced or clipped values, whose mean is not x, nor for
likelihoods other than the squared error; with the absolute error (laplace), f estimates medians.

The network and its code, which is not a bottleneck, are those of dncnn. Training draws new copies for every batch;
evaluation draws them once, from a fixed seed. mse and psnr compare f(y1) with the clean sample. The paper's networks
train on noise whose strength is drawn for each sample; here the strength is fixed.
"""

import math
from typing import Unpack

import torch
from torch import Generator, Tensor

from aezoo import corruptions
from aezoo.autoencoder import at_least_float32
from aezoo.corruptions import Corruption, GaussianNoise
from aezoo.errors import AezooError
from aezoo.models.classic.dncnn import DnCNN, DnCNNArgs

_MAX_PEAK = 1e6


class PoissonNoise(Corruption):
    """Poisson noise, Poisson(amount x) / amount: counts with mean `amount` where x is 1, rescaled to the scale of x."""

    def forward(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        rate = self.amount * at_least_float32(x).clamp(min=0)
        return (torch.poisson(rate, generator) / self.amount).to(x.dtype)


def unbiased(name: str) -> Corruption:
    """Return the corruption with mean x that a name, gaussian:STD or poisson:PEAK, stands for."""
    kind, _, argument = name.partition(":")
    if kind == "poisson":
        try:
            peak = float(argument)
        except ValueError:
            peak = math.nan
        if not 0 < peak <= _MAX_PEAK:
            raise AezooError(f"corruption {name!r} needs a peak above 0 and at most {_MAX_PEAK:g}, as in poisson:30")
        return PoissonNoise(peak)
    noise = corruptions.corruption(name) if kind == "gaussian" else None
    if not isinstance(noise, GaussianNoise) or noise.amount == 0:
        raise AezooError(f"corruption {name!r} does not work: use noise of mean zero, as in gaussian:0.1 or poisson:30")
    return noise


class Noise2Noise(DnCNN, tags=("denoising",)):
    """Learns from pairs of noisy copies; metrics in evaluation also start from noisy input.

    Args:
        corruption: gaussian:STD or poisson:PEAK, where PEAK is the average count for a value of 1.
        width: features of each layer; 64 in the paper of the network.
        depth: number of convolutions; 17 in the paper of the network.
        **kwargs: see `DnCNN`.
    """

    corruption: Corruption

    def __init__(
        self, input_shape: tuple[int, ...], *, corruption: str = "gaussian:0.1", **kwargs: Unpack[DnCNNArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.corruption = unbiased(corruption)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        y1, y2 = self.corruption(x), self.corruption(x)
        nll_B = self.nll(self.decoder(self.encoder(y1)), y2)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll}

    def check_batch(self, x: Tensor) -> None:
        super().check_batch(x)
        if self.training and isinstance(self.corruption, PoissonNoise) and float(x.min()) < 0:
            raise AezooError(
                f"Poisson noise needs data of at least 0, got {float(x.min()):.4g}: scale the data, "
                "or use corruption='gaussian:0.1'"
            )
