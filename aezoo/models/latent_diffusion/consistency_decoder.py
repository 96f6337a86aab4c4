"""Autoencoder with a consistency model as decoder (OpenAI 2023), https://github.com/openai/consistencydecoder

f removes noise of any level from samples in one step, given the code z = g(x); in nats per sample:

    L = E[d(f(x + s_n+1 e, s_n+1, z), stopgrad f(x + s_n e, s_n, z)) / (s_n+1 - s_n)] + w R     e ~ N(0, I)
    f(x, s, z) = c_skip(s) x + c_out(s) F(x / sqrt(s^2 + s_d^2), log(s) / 4, z)     hence f(x, s_0, z) = x
    c_skip = s_d^2 / ((s - s_0)^2 + s_d^2)     c_out = s_d (s - s_0) / sqrt(s^2 + s_d^2)
    d(a, b) = sqrt(||a - b||^2 + c^2) - c     c = 0.00054 sqrt(X)
    s_n = (s_0^1/7 + n/N (s_N^1/7 - s_0^1/7))^7     P(n) ~ Phi(s_n+1) - Phi(s_n), log s of mean -1.1, deviation 2
    xhat = f(0, s_N, z)     R = -log p(x|xhat) = ||x - xhat||^2 + const, a Gaussian of variance 1/2

This is consistency training (Song et al. 2023, https://arxiv.org/abs/2303.01469), improved (Song & Dhariwal 2023,
https://arxiv.org/abs/2310.14189): N doubles from start_noise_levels to noise_levels over level_steps, which in the
paper is the whole run. R is not in the paper: it is the distance for one step with N = 1. Without it (w = 0), images of
short runs are worse. Images are decoded from the mean of the noise, which is zero. Each code then has one image, and
with any w these images are closer to the samples than those from drawn noise. z has no KL term, as L does not bound a
likelihood. F receives z as upsampled channels.

Shapes: B batch, X data dimensions.
"""

import math
from itertools import pairwise
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import FixedLikelihoodArgs, NetworkAutoencoder
from aezoo.distributions import gaussians
from aezoo.distributions.divergences import pseudo_huber
from aezoo.errors import AezooError
from aezoo.nets.build import activation
from aezoo.nets.conv import CONVS, grids, rank_of
from aezoo.nets.resnet import ResidualBlock
from aezoo.training.limits import check_at_least

LOG_MEAN, LOG_STD, RHO = -1.1, 2.0, 7


_WIDTH = 32


class Block(ResidualBlock):
    """A residual block whose second normalisation is scaled and shifted, (B, C, *grid), (B or 1, 32) -> (B, C, *grid).

    Args:
        rank: 1, 2 or 3 grid dimensions.
        channels: number of channels, in and out.
        act: name of an activation.
    """

    def __init__(self, rank: int, channels: int, act: str) -> None:
        super().__init__(rank, channels, act)
        self.film = nn.Linear(_WIDTH, 2 * channels)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:  # type: ignore[override]
        norm, act, conv, norm_2, act_2, conv_2 = self.body
        scale, shift = self.film(level).unflatten(1, (-1, *[1] * (x.ndim - 2))).chunk(2, 1)
        h = norm_2(conv(act(norm(x))))
        x = x + conv_2(act_2(h * (1 + scale) + shift))
        return x


class Denoiser(nn.Module):
    """F, a U-Net: (B, *input_shape), (B or 1, 1), (B, channels, *any grid) -> (B, *input_shape).

    Its inputs are noisy samples, their noise level, and a map, which is upsampled to the samples' grid by nearest
    neighbours and concatenated as channels (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597). The noise
    level, a scalar, determines scale and shift of every block's second normalisation, as in diffusion models (Dhariwal
    & Nichol 2021, https://arxiv.org/abs/2105.05233). The stages are those of resnet; the maps of the downsampling path
    are added in the upsampling path. Unlike net unet, it has no code.

    Args:
        input_shape: shape of one sample.
        channels: channels of the map.
        dims: channels of the downsampling stages, each of stride 2.
        act: name of an activation.
    """

    frequencies: Tensor

    def __init__(self, input_shape: tuple[int, ...], channels: int, dims: tuple[int, ...], act: str) -> None:
        super().__init__()
        rank, data = rank_of(input_shape), input_shape[0]
        widths, conv = (*(dims[:1] or (data,)), *dims), CONVS[rank]
        # the log noise level spans a few units: the lowest frequency separates its ends, the highest tenths of a unit
        self.register_buffer("frequencies", torch.logspace(-1, 1, _WIDTH // 2), persistent=False)
        self.embed = nn.Sequential(
            nn.Linear(_WIDTH, _WIDTH), activation(act), nn.Linear(_WIDTH, _WIDTH), activation(act)
        )
        self.enlarge, self.first = nn.Upsample(input_shape[1:]), conv(data + channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.blocks = nn.ModuleList(Block(rank, n, act) for n in (*widths[1:], *widths[::-1]))
        up = zip(pairwise(widths[::-1]), grids(input_shape, len(dims))[-2::-1], strict=True)
        self.up = nn.ModuleList(nn.Sequential(nn.Upsample(grid), conv(a, b, 3, padding=1)) for (a, b), grid in up)
        self.last = nn.Sequential(activation(act), conv(widths[0], data, 3, padding=1))

    def forward(self, x: Tensor, level: Tensor, z: Tensor) -> Tensor:
        angles = level * at_least_float32(self.frequencies)
        embedded = self.embed(torch.cat([angles.cos(), angles.sin()], 1).to(z.dtype))
        maps, blocks = [self.first(torch.cat([x.to(z.dtype), self.enlarge(z)], 1))], iter(self.blocks)
        for down in self.down:
            maps.append(next(blocks)(down(maps[-1]), embedded))
        h = next(blocks)(maps.pop(), embedded)
        for up in self.up:
            h = next(blocks)(up(h) + maps.pop(), embedded)
        out: Tensor = self.last(h)
        return out


class ConsistencyDecoder(nn.Module):
    """Decodes (B, *code_shape) -> (B, *input_shape) by one step of f from s_N."""

    def __init__(self, net: nn.Module, input_shape: tuple[int, ...], *sigmas: float) -> None:
        super().__init__()
        self.net = net
        self.input_shape = input_shape
        self.sigma_min, self.sigma_max, self.sigma_data = sigmas

    def f(self, x: Tensor, s: Tensor, z: Tensor) -> Tensor:
        """Remove noise of standard deviation s, (B or 1, 1, ..., 1), from samples, (B, *input_shape) -> same shape."""
        s_0, s_d = self.sigma_min, self.sigma_data
        scale = (s.square() + s_d**2).sqrt()
        skip, out = s_d**2 / ((s - s_0).square() + s_d**2), s_d * (s - s_0) / scale
        return skip * x + out * at_least_float32(self.net(x / scale, s.log().flatten(1) / 4, z))

    def forward(self, z: Tensor) -> Tensor:
        x = at_least_float32(z).new_zeros(z.shape[0], *self.input_shape)
        return self.f(x, x.new_full([1] * x.ndim, self.sigma_max), z).to(z.dtype)


class ConsistencyDecoderAE(
    NetworkAutoencoder,
    hidden_dims={"resnet": (16, 32), "vit": (32, 32), "mixer": (32, 32)},
    defaults={"net": "resnet", "activation": "silu"},
    tags=("latent diffusion",),
):
    """Learns a feature map as code, decoded in one step by a model that learns to remove noise of any level.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), of any size.
        latent_dim: channels of the code.
        nll_weight: w.
        sigma_min: s_0, in units of the data.
        sigma_max: s_N, which must be large compared with the data.
        sigma_data: s_d, about the data's root mean square.
        start_noise_levels: N at the first step.
        noise_levels: N at the end; 1280 in the paper. A larger N makes gradients noisier and needs longer runs.
        level_steps: optimiser steps over which N rises; 0 keeps it at noise_levels.
        net: of the encoder: resnet, conv, convnext, conv_keras, unet, gdn, dc, ldm, vit or mixer.
        hidden_dims: channels of the encoder's stages; the decoder's U-Net has the same number. None chooses them by net
            and input_shape; `aezoo info consistency_decoder --shape C H W` shows the choice.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        **kwargs: see `NetworkAutoencoder`.
    """

    decoder: ConsistencyDecoder

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 4,
        nll_weight: float = 1.0,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        start_noise_levels: int = 10,
        noise_levels: int = 40,
        level_steps: int = 1000,
        **kwargs: Unpack[FixedLikelihoodArgs],
    ) -> None:
        super().__init__(input_shape, likelihood="gaussian", **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, nll_weight=nll_weight, level_steps=level_steps)
        if not 1e-4 <= sigma_min < sigma_max <= 1e4 or not 1e-4 <= sigma_data <= 1e4:
            raise AezooError(f"sigmas must be from 1e-4 to 1e4, min < max: got {sigma_min}, {sigma_max}, {sigma_data}")
        if not 1 <= start_noise_levels <= noise_levels <= 10_000:
            raise AezooError(f"noise_levels must rise, from 1 to 10000: got {start_noise_levels} to {noise_levels}")
        self.nll_weight = nll_weight
        self.level_steps = level_steps
        self.start_noise_levels = start_noise_levels
        self.noise_levels = noise_levels
        self.code_shape = nets.map_shape(self.net, self.input_shape, self.hidden_dims, latent_dim)
        self.encoder = self.build_encoder(self.code_shape)
        F = Denoiser(self.input_shape, latent_dim, self.hidden_dims, self.activation)
        self.decoder = ConsistencyDecoder(F, self.input_shape, sigma_min, sigma_max, sigma_data)
        self.enable_step_counter()

    def n_levels(self) -> Tensor:
        """Return N at the current step, ()."""
        doublings = math.log2(self.noise_levels / self.start_noise_levels) + 1
        risen = (doublings * self.step_fraction(self.level_steps)).floor()
        return (self.start_noise_levels * 2**risen).clamp(max=self.noise_levels)

    def pair(self, u: Tensor, N: Tensor) -> tuple[Tensor, Tensor]:
        """Return adjacent levels s_n and s_n+1 of the shape of u, where n is the quantile of P(n) at u."""
        s_0, s_N = self.decoder.sigma_min, self.decoder.sigma_max
        low, high = (math.erf((math.log(s) - LOG_MEAN) / (LOG_STD * math.sqrt(2))) for s in (s_0, s_N))
        s = torch.exp(LOG_MEAN + LOG_STD * math.sqrt(2) * torch.erfinv(low + (high - low) * u))
        a, b = s_0 ** (1 / RHO), s_N ** (1 / RHO)
        n = ((s ** (1 / RHO) - a) / (b - a) * N).floor().clamp_min(0).minimum(N - 1)
        return (a + n / N * (b - a)) ** RHO, (a + (n + 1) / N * (b - a)) ** RHO

    def consistency(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the first term of L, without R, for each sample, (B, *input_shape), codes -> (B,)."""
        x = at_least_float32(x)
        u = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device, dtype=x.dtype)
        (low, high), noise = self.pair(u, self.n_levels()), gaussians.standard_normal_like(x)
        found = self.decoder.f(x + high * noise, high, z)
        with torch.no_grad():  # second, since autocast would cache weights cast without gradients
            target = self.decoder.f(x + low * noise, low, z)
        return pseudo_huber(found, target) / (high - low).flatten()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z = self.encode(x)
        nll, consistency = self.nll(self.decoder(z), x).mean(), self.consistency(x, z).mean()
        return {"loss": consistency + self.nll_weight * nll, "nll": nll, "consistency": consistency}
