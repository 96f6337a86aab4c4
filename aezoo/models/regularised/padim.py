"""PaDiM, a Gaussian of frozen features at each position (Defard et al. 2021), https://arxiv.org/abs/2011.08785

    s_p(x) = sqrt((z_p - mu_p)' Sigma_p^-1 (z_p - mu_p))
    mu_p = 1/N sum_i z_ip     Sigma_p = 1/(N - 1) sum_i (z_ip - mu_p)(z_ip - mu_p)' + epsilon I     (equation 1)

z_p consists of D channels of all feature maps at position p of the largest map; values of smaller maps are repeated. mu
and Sigma are computed during training, in one pass and without gradients (Chan et al. 1983): the result does not depend
on how the samples are divided into batches and ranks. Further epochs add every sample again, which increases N and
changes little else.

L = -log p(x | g(z)) trains a decoder that shows codes as samples; no gradient flows from it to z, so it does not affect
the rest (the paper has no such decoder). The map is s, interpolated and smoothed by a Gaussian filter; the score is its
maximum.

Shapes: B batch, D channels, P positions.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.frozen_features import FrozenFeatureArgs, FrozenFeatureAutoencoder, smoothed, stacked
from aezoo.training.limits import check_at_least


class PaDiM(FrozenFeatureAutoencoder, tags=("anomaly",)):
    """A Gaussian for each position of the feature maps; the Mahalanobis distance is the anomaly score.

    Args:
        n_features: D, number of channels, a fixed random subset; all if there are fewer. 100 in the paper for
            ResNet-18, 550 for a wide ResNet-50.
        epsilon: constant added to the variances.
        sigma: standard deviation of the Gaussian filter, in pixels; 4 in the paper, for images of 224 x 224.
        **kwargs: see `FrozenFeatureAutoencoder`. The paper uses the maps of stages 1 to 3 of a ResNet.
    """

    exact_buffers = ("mean_PD", "scatter_PDD")
    one_epoch = True

    channels_D: Tensor
    count: Tensor
    mean_PD: Tensor
    scatter_PDD: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_features: int = 100,
        epsilon: float = 0.01,
        sigma: float = 4.0,
        **kwargs: Unpack[FrozenFeatureArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, n_features=n_features)
        check_at_least(1e-6, epsilon=epsilon)
        check_at_least(0, sigma=sigma)
        self.epsilon, self.sigma = epsilon, sigma
        n_channels, (height, width) = sum(shape[0] for shape in self.map_shapes), self.map_shapes[0][1:]
        drawn = torch.randperm(n_channels, generator=torch.Generator().manual_seed(0))[:n_features].sort().values
        self.code_shape = (len(drawn), height, width)
        self.register_buffer("channels_D", drawn)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean_PD", torch.zeros(height * width, len(drawn)))
        self.register_buffer("scatter_PDD", torch.zeros(height * width, len(drawn), len(drawn)))
        self.decoder = self.build_image_decoder()

    def embed(self, x: Tensor) -> Tensor:
        """Return the channels at all positions, (B, *input_shape) -> (B, D, H', W')."""
        return stacked(self.maps(x), "nearest").index_select(1, self.channels_D)

    def encode(self, x: Tensor) -> Tensor:
        return self.embed(x).to(x.dtype)

    @torch.no_grad()
    def observe(self, z: Tensor) -> None:
        """Add a batch of all ranks to mu and to the scatter matrix about mu, (B, D, H', W')."""
        z_BPD = z.flatten(2).mT
        before, mean_PD, scatter_PDD = self.count.to(z), self.mean_PD.to(z), self.scatter_PDD.to(z)
        with torch.autocast(z.device.type, enabled=False):
            batch_PD = self.batch_mean(z_BPD)
            off_PBD = (z_BPD - batch_PD).transpose(0, 1)
            n = len(self.all_gather_batch(z_BPD[:, 0, 0]))
            # n times the mean over ranks
            batch_PDD = n * self.batch_mean((off_PBD.mT @ off_PBD / len(z))[None])
            moved_PD = batch_PD - mean_PD
            share = n / (before + n)
            scatter_PDD = scatter_PDD + batch_PDD + (before * share) * moved_PD[..., None] * moved_PD[:, None]
        self.mean_PD.copy_(mean_PD + share * moved_PD)
        self.scatter_PDD.copy_(scatter_PDD)
        self.count.add_(n)

    def covariance(self) -> Tensor:
        """Return Sigma, (P, D, D)."""
        scatter_PDD = at_least_float32(self.scatter_PDD)
        eye_DD = torch.eye(scatter_PDD.shape[-1], device=scatter_PDD.device, dtype=scatter_PDD.dtype)
        return scatter_PDD / (self.count - 1).clamp(min=1) + self.epsilon * eye_DD

    def distances(self, z: Tensor) -> Tensor:
        """Return s, (B, D, H', W') -> (B, H', W')."""
        with torch.autocast(z.device.type, enabled=False):
            off_PDB = z.flatten(2).permute(2, 1, 0) - at_least_float32(self.mean_PD)[..., None]
            # ||A^-1 (z - mu)|| with Sigma = A A'
            scaled_PDB = torch.linalg.solve_triangular(torch.linalg.cholesky(self.covariance()), off_PDB, upper=False)
            return scaled_PDB.square().sum(1).sqrt().mT.unflatten(1, z.shape[2:])

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z = self.embed(x)
        if self.training:
            self.observe(z)
        nll = self.decoder_nll(z, x)
        return {"loss": nll, "nll": nll}

    def anomaly_map(self, x: Tensor) -> Tensor:
        """Return the distance at each pixel, (B, C, H, W) -> (B, H, W)."""
        return smoothed(self.enlarged(self.distances(self.embed(x))), self.sigma)
