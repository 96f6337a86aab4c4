"""FRE, the feature reconstruction error (Ahuja et al. 2023), https://papers.bmvc2023.org/0614.pdf

A linear autoencoder of the features of a frozen network; features with a large reconstruction error are anomalous:

    L = ||f - f_hat||^2 - log p(x | g(z))     z = W f + b     f_hat = W' z + c

f is one feature map of x as a vector, averaged over windows. Encoder and decoder share W. The minimum of the error is
that of principal component analysis. g is a decoder that shows codes as samples; no gradient flows from it to z, so it
does not affect the rest (the paper has no such decoder). The score is ||f - f_hat||^2, and its map is the sum over
channels at each position.
`aezoo detect --features` fits the same model to any features, as a baseline, by PCA (Ndiour et al. 2020,
https://arxiv.org/abs/2012.04250).

Shapes: B batch, F features, D code, C channels on the grid H' x W'.
"""

import math
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.bases.frozen_features import FrozenFeatureArgs, FrozenFeatureAutoencoder
from aezoo.training.limits import check_at_least


class FRE(FrozenFeatureAutoencoder, tags=("anomaly",)):
    """Principal component analysis of frozen features; the score is the reconstruction error.

    Args:
        latent_dim: D, number of components; at most half of the features.
        pool: side of the windows over which the map is averaged; 4 in anomalib for 256 x 256 images.
        **kwargs: see `FrozenFeatureAutoencoder`. Only the last map is used: choose it with out_indices.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 220,
        pool: int = 1,
        **kwargs: Unpack[FrozenFeatureArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim, pool=pool)
        self.pool = pool
        channels, *grid = self.map_shapes[-1]
        self.pooled_shape = (channels, *(max(1, side // pool) for side in grid))
        n_features = math.prod(self.pooled_shape)
        self.code_shape = (min(latent_dim, max(1, n_features // 2)),)
        self.W_DF = nn.Parameter(torch.empty(*self.code_shape, n_features))
        nn.init.xavier_uniform_(self.W_DF)
        self.b_D = nn.Parameter(torch.zeros(self.code_shape))
        self.c_F = nn.Parameter(torch.zeros(n_features))
        self.decoder = self.build_image_decoder()

    def feature_vector(self, x: Tensor) -> Tensor:
        """Return f, (B, *input_shape) -> (B, F)."""
        f = self.maps(x)[-1]
        return F.avg_pool2d(f, [min(self.pool, side) for side in f.shape[2:]]).flatten(1)

    def code(self, f_BF: Tensor) -> Tensor:
        """Return z, (B, F) -> (B, D)."""
        return F.linear(f_BF, self.W_DF.to(f_BF), self.b_D.to(f_BF))

    def errors(self, f_BF: Tensor) -> Tensor:
        """Return (f - f_hat)^2, (B, F) -> (B, F)."""
        with torch.autocast(f_BF.device.type, enabled=False):
            return (f_BF - F.linear(self.code(f_BF), self.W_DF.mT.to(f_BF), self.c_F.to(f_BF))).square()

    def encode(self, x: Tensor) -> Tensor:
        return self.code(self.feature_vector(x)).to(x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        f_BF = self.feature_vector(x)
        fre = self.errors(f_BF).sum(1).mean()
        nll = self.decoder_nll(self.code(f_BF), x)
        return {"loss": fre + nll, "nll": nll, "fre": fre}

    def anomaly_map(self, x: Tensor) -> Tensor:
        """Return the error at each position, interpolated to the size of the image, (B, C, H, W) -> (B, H, W)."""
        return self.enlarged(self.errors(self.feature_vector(x)).unflatten(1, self.pooled_shape).sum(1))

    def score(self, x: Tensor) -> Tensor:
        """Return ||f - f_hat||^2, (B, *input_shape) -> (B,)."""
        return self.errors(self.feature_vector(x)).sum(1)
