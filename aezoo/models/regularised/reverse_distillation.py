"""Reverse distillation from a one-class embedding (Deng & Li 2022), https://arxiv.org/abs/2201.10703

A student reconstructs the feature maps of a frozen teacher from a bottleneck embedding, from the deepest to the first:

    L = sum_k 1/P_k sum_p M_kp - log p(x | g(z))     M_kp = 1 - cos(E_kp, D_kp)              (equations 1 and 2)
    z = OCE(concat_k MFF_k(E_k))     D_K = S_K(z)     D_k = S_k(D_{k+1})

for the K feature maps E_k of the teacher and their P_k positions p. MFF brings each map to the grid of the last map by
convolutions of stride 2, OCE halves that grid, and S_k doubles it. The bottleneck z does not transmit unseen features,
such as those of a defect, so they are missing in D. The map is the sum over k of the interpolated M_k, smoothed by a
Gaussian filter, and the score is its maximum. g is a decoder that shows codes as samples; no gradient flows from it to
z, so it does not affect the rest (the paper has no such decoder).

The authors' code (https://github.com/hq-deng/RD4AD) compares whole maps in the loss, 1 - cos(E_k, D_k) of vectors over
all channels and positions; the formula above is from the paper. In the paper, OCE and S_k are stages of a wide
ResNet-50; here, each consists of two convolutions. Normalisation is over a sample's channels and positions (GroupNorm),
not over the batch.
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
    """A student that reconstructs the feature maps of a frozen network from a bottleneck code.

    Args:
        latent_dim: channels of z; twice the channels of the last map in the paper. With 0, as many as the last map.
        sigma: standard deviation of the Gaussian filter, in pixels; 4 in the paper, for images of 256 x 256.
        **kwargs: see `FrozenFeatureAutoencoder`. The paper uses the maps of stages 1 to 3 of a wide ResNet-50.
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
        """Return z, (B, C_k, H_k, W_k) each -> (B, *code_shape)."""
        dtype = next(self.embedding.parameters()).dtype
        parts = [fusion(found.to(dtype)) for fusion, found in zip(self.fusions, maps, strict=True)]
        z: Tensor = self.embedding(torch.cat(parts, 1))
        return z

    def encode(self, x: Tensor) -> Tensor:
        return self.embed(self.maps(x)).to(x.dtype)

    def restore(self, z: Tensor) -> list[Tensor]:
        """Return D_k in the order of the teacher's maps, largest first, (B, *code_shape) -> (B, C_k, H_k, W_k) each."""
        found: list[Tensor] = []
        for stage in self.stages:
            found.append(stage(found[-1] if found else z))
        return found[::-1]

    def distances(self, maps: list[Tensor], restored: list[Tensor]) -> list[Tensor]:
        """Return M_k, (B, C_k, H_k, W_k) each -> (B, H_k, W_k) each."""
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
        """Return the sum of all distances at each pixel, (B, C, H, W) -> (B, H, W)."""
        maps = self.maps(x)
        distances = self.distances(maps, self.restore(self.embed(maps)))
        return smoothed(torch.stack([self.enlarged(M, align_corners=True) for M in distances]).sum(0), self.sigma)


def _convolution(channels: int, out_channels: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out_channels, 3, stride, 1), nn.GroupNorm(1, out_channels), nn.ReLU()]


def _downsampling(shape: tuple[int, ...], last: tuple[int, ...]) -> nn.Module:
    """Return layers that halve a map as often as needed, then resize it to the last map's grid and channels."""
    layers: list[nn.Module] = []
    channels, side = shape[0], shape[1]
    while side > last[1] and math.ceil(side / 2) >= last[1]:
        layers += _convolution(channels, last[0], stride=2)
        channels, side = last[0], math.ceil(side / 2)
    if channels != last[0]:
        layers += _convolution(channels, last[0])
    return nn.Sequential(*layers, nn.Upsample(size=last[1:], mode="bilinear"))


def _upsampling(deep: tuple[int, ...], shallow: tuple[int, ...]) -> nn.Module:
    """Return layers that compute a map from the next deeper map."""
    up = nn.Upsample(size=shallow[1:], mode="nearest")
    return nn.Sequential(up, *_convolution(deep[0], shallow[0]), nn.Conv2d(shallow[0], shallow[0], 3, padding=1))
