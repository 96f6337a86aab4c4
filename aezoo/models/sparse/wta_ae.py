"""Winner-take-all autoencoder (Makhzani & Frey 2015), https://arxiv.org/abs/1409.2752

Each unit is kept only for the samples of the batch that activate it most:

    h = relu(f(x))     h_ij is kept if it is among the ceil(p B) largest of h_1j, ..., h_Bj     (section 2)
    L = -log p(x | V h_kept + c)

L is in nats per sample. Each unit is thus active for a fraction p of the samples (lifetime sparsity), while the number
of active units per sample is not limited. The decoder is linear. With convolutions, only the largest value of each
feature map is kept first (spatial sparsity), and the largest over the batch are selected among these (section 3). The
batch is that of all ranks.

Codes are not made sparse, as in the paper, which does not reconstruct after training. Without sparsity, the decoder's
sum over all units would be far too large. Reconstructions and scores therefore keep only the largest value of each map,
if it is at least theta_j, a running mean of the smallest value kept for unit j. The loss in evaluation keeps the
largest values of the given batch. p = 1 without spatial sparsity is the autoencoder with a ReLU code.

Shapes: B batch on this rank, N samples on all ranks, D units or feature maps, G points of the grid.
"""

import math
from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError
from aezoo.nets.conv import CONVS, rank_of
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class WTAAE(
    Autoencoder, defaults={"likelihood": "gaussian"}, sparse_code=True, compares_samples=True, tags=("representation",)
):
    """Each unit is active for the same small fraction of the samples.

    Args:
        input_shape: shape of one sample; any without spatial, else (C, L), (C, H, W) or (C, D, H, W).
        lifetime: p, fraction of the samples for which each unit is kept; 0.05 in the paper for images of digits.
        spatial: use convolutions of stride 1 and keep one value of each feature map, instead of dense layers.
        latent_dim: D, size of the code, or number of its feature maps, each of the same size as the sample.
        hidden_dims: widths or channels of the encoder's layers before the code.
        **kwargs: see `Autoencoder`.
    """

    theta_D: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        lifetime: float = 0.05,
        spatial: bool = False,
        latent_dim: int = 256,
        hidden_dims: tuple[int, ...] = (),
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        if not 0 < lifetime <= 1:
            raise AezooError(f"lifetime must be above 0 and at most 1, got {lifetime}")
        self.lifetime = lifetime
        self.spatial = spatial
        self.register_buffer("theta_D", torch.zeros(latent_dim))
        if not spatial:
            self.code_shape = (latent_dim,)
            self.encoder = nets.encoder("mlp", self.input_shape, self.code_shape, hidden_dims)
            self.decoder = nets.decoder("mlp", self.code_shape, self.input_shape, ())
            return
        if any(width < 1 for width in hidden_dims):
            raise AezooError(f"hidden_dims must be whole numbers above 0, got {tuple(hidden_dims)}")
        conv = CONVS[rank_of(self.input_shape)]
        self.code_shape = (latent_dim, *self.input_shape[1:])
        layers: list[nn.Module] = []
        channels = self.input_shape[0]
        for width in hidden_dims:
            layers += [conv(channels, width, 5, padding=2), nn.ReLU()]
            channels = width
        self.encoder = nn.Sequential(*layers, conv(channels, latent_dim, 5, padding=2))
        self.decoder = conv(latent_dim, self.input_shape[0], 11, padding=5)  # large: the decoder's only layer

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).relu()

    def winners(self, h_BD: Tensor) -> Tensor:
        """Return whether each unit is kept for each sample, for ceil(p N) samples per unit, (B, D) -> (B, D)."""
        h_ND = self.all_gather_batch(h_BD.detach())
        # a product such as 0.07 * 100 is rounded to slightly more than its exact value
        best_kD, index_kD = h_ND.topk(math.ceil(self.lifetime * len(h_ND) - 1e-9), dim=0)
        if self.training:
            self.theta_D.lerp_(best_kD[-1].to(self.theta_D), 0.1)  # like BatchNorm's running statistics
        kept_ND = torch.zeros_like(h_ND, dtype=torch.bool).scatter(0, index_kD, True)
        first = self.gather_rank() * len(h_BD)
        return kept_ND[first : first + len(h_BD)]

    def mask_units(self, h: Tensor, which: Callable[[Tensor], Tensor]) -> Tensor:
        """Keep the largest value of each map where `which` of these values, (B, D), is true; set the rest to 0."""
        if not self.spatial:
            return h * which(h)
        h_BDG = h.flatten(2)
        largest_BD1, index_BD1 = h_BDG.max(2, keepdim=True)
        kept_BD1 = largest_BD1 * which(largest_BD1[..., 0])[..., None]
        return torch.zeros_like(h_BDG).scatter(2, index_BD1, kept_BD1).view_as(h)

    def above_theta(self, h_BD: Tensor) -> Tensor:
        return at_least_float32(h_BD) >= self.theta_D

    def decode(self, z: Tensor) -> Tensor:
        return self.likelihood.mean(self.decoder(self.mask_units(z, self.above_theta)))

    def score(self, x: Tensor) -> Tensor:
        return self.nll(self.decoder(self.mask_units(self.encode(x), self.above_theta)), x)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        h = self.mask_units(self.encode(x), self.winners)
        nll_B = self.nll(self.decoder(h), x)
        nll = nll_B.mean()
        return {"loss": nll, "nll": nll, "l0": (h > 0).flatten(1).sum(1).float().mean()}
