"""Reverse distillation from a one-class embedding (Deng & Li 2022), https://arxiv.org/abs/2201.10703

A student restores the feature maps of a frozen teacher from a narrow embedding of them, from the deepest to the first:

    L = sum_k 1/P_k sum_p M_kp - log p(x | g(z))     M_kp = 1 - cos(E_kp, D_kp)              (equations 1 and 2)
    z = OCE(concat_k MFF_k(E_k))     D_K = S_K(z)     D_k = S_k(D_{k+1})

for the K feature maps E_k of the teacher and their P_k places p. MFF brings each map to the grid of the last by
convolutions of stride 2, OCE halves that grid, and S_k doubles it. What does not fit through z, as of a defect, is
missing in D. The map is the sum over k of the enlarged M_k, smoothed by a Gaussian filter, and the score its maximum.
g is a decoder that shows codes as samples; it reads z without its gradient and changes nothing else (the paper has
none).

The authors' code (https://github.com/hq-deng/RD4AD) compares whole maps in the loss, 1 - cos(E_k, D_k) of vectors over
all channels and places; the formula above is the paper's. OCE and S_k of the paper are stages of a wide ResNet-50; here
they are two convolutions each. Normalisation is over a sample's channels and places (GroupNorm), not over the batch.
"""

import math
from itertools import pairwise
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.frozen_features import FrozenFeatureArgs, FrozenFeatureAutoencoder, smoothed
from aezoo.training.limits import check_at_least


class ReverseDistillation(FrozenFeatureAutoencoder, tags=("anomaly",)):
    """A student that restores frozen feature maps from one narrow code.

    Args:
        latent_dim: channels of z; twice those of the last map in the paper. 0 chooses as many as the last map has.
        sigma: of the filter over the map, in pixels; 4 in the paper, for images of 256 x 256.
        **kwargs: see `FrozenFeatureAutoencoder`. The maps of stages 1 to 3 of a wide ResNet-50 are the paper's.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 0,
        sigma: float = 4.0,
        **kwargs: Unpack[FrozenFeatureArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, latent_dim=latent_dim, sigma=sigma)
        self.sigma = sigma
        channels, *grid = self.map_shapes[-1]
        self.code_shape = (latent_dim or channels, *(math.ceil(side / 2) for side in grid))
        self.fusions = nn.ModuleList(_downsampling(shape, self.map_shapes[-1]) for shape in self.map_shapes)
        self.embedding = nn.Sequential(
            *_convolution(channels * len(self.map_shapes), channels, stride=2),
            nn.Conv2d(channels, self.code_shape[0], 3, padding=1),
        )
        shapes = [self.code_shape, *reversed(self.map_shapes)]
        self.stages = nn.ModuleList(_upsampling(deep, shallow) for deep, shallow in pairwise(shapes))
        self.decoder = self.build_image_decoder()

    def embed(self, maps: list[Tensor]) -> Tensor:
        """z, (B, C_k, H_k, W_k) each -> (B, *code_shape)."""
        dtype = next(self.embedding.parameters()).dtype
        parts = [fusion(found.to(dtype)) for fusion, found in zip(self.fusions, maps, strict=True)]
        z: Tensor = self.embedding(torch.cat(parts, 1))
        return z

    def encode(self, x: Tensor) -> Tensor:
        return self.embed(self.maps(x)).to(x.dtype)

    def restore(self, z: Tensor) -> list[Tensor]:
        """D_k, as the maps of the teacher from the largest on: (B, *code_shape) -> (B, C_k, H_k, W_k) each."""
        found: list[Tensor] = []
        for stage in self.stages:
            found.append(stage(found[-1] if found else z))
        return found[::-1]

    def distances(self, maps: list[Tensor], restored: list[Tensor]) -> list[Tensor]:
        """M_k, (B, C_k, H_k, W_k) each -> (B, H_k, W_k) each."""
        with torch.autocast(maps[0].device.type, enabled=False):
            pairs = zip(maps, restored, strict=True)
            return [1 - F.cosine_similarity(E, at_least_float32(D)) for E, D in pairs]

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        maps = self.maps(x)
        z = self.embed(maps)
        distillation = torch.stack([M.mean() for M in self.distances(maps, self.restore(z))]).sum()
        nll = self.decoder_nll(z, x)
        return {"loss": distillation + nll, "nll": nll, "distillation": distillation}

    def anomaly_map(self, x: Tensor) -> Tensor:
        """The sum of all distances at each pixel, (B, C, H, W) -> (B, H, W)."""
        maps = self.maps(x)
        distances = self.distances(maps, self.restore(self.embed(maps)))
        return smoothed(torch.stack([self.enlarged(M, align_corners=True) for M in distances]).sum(0), self.sigma)


def _convolution(channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out_channels, 3, stride, 1), nn.GroupNorm(1, out_channels), nn.ReLU()]


def _downsampling(shape: tuple[int, ...], last: tuple[int, ...]) -> nn.Module:
    """A map on the grid of the last, with as many channels: halved as often as needed, then resized to fit."""
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[1]
    while side > last[1] and math.ceil(side / 2) >= last[1]:
        layers += _convolution(channels, last[0], stride=2)
        channels, side = last[0], math.ceil(side / 2)
    if channels != last[0]:
        layers += _convolution(channels, last[0])
    return nn.Sequential(*layers, nn.Upsample(size=last[1:], mode="bilinear"))


def _upsampling(deep: tuple[int, ...], shallow: tuple[int, ...]) -> nn.Module:
    """A map from the next deeper one."""
    up = nn.Upsample(size=shallow[1:], mode="nearest")
    return nn.Sequential(up, *_convolution(deep[0], shallow[0]), nn.Conv2d(shallow[0], shallow[0], 3, padding=1))
