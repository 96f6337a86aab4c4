"""Autoencoder with a triplet loss on its codes (Schroff et al. 2015), https://arxiv.org/abs/1503.03832

    L = -log p(x | g(z)) + lambda T     z = f(x)
    T = mean over triplets of max(0, ||z_a - z_p|| - ||z_a - z_n|| + m)

L is in nats per sample. An anchor a must be nearer, by the margin m, to each positive p (another sample with
the same label) than to a negative n (a sample with another label). The distance is not squared (Hermans et al. 2017,
https://arxiv.org/abs/1703.07737). Triplets are mined in the batch of all ranks:

    all         every triplet
    active      every triplet whose loss is above 0; the others do not count in the mean (Hermans et al. 2017)
    semi_hard   for each a and p, the nearest n that is farther than p, or the farthest n if there is none (section 3.2)

Samples without a label (-1) are in no triplet. If there are no triplets, T is 0 and this is the plain autoencoder.

Shapes: B batch on this rank, D code.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.bases.triplet import TripletAutoencoder
from aezoo.training.limits import check_at_least


class TripletAE(TripletAutoencoder, NetworkAutoencoder, hidden_dims={"mlp": (256,)}, tags=("representation",)):
    """Learns codes that are close for samples with the same label; encoding and scores do not use labels.

    Args:
        latent_dim: D, size of the code.
        triplet_weight: lambda, weight of the triplet loss.
        margin: m, by which negatives must be farther away than positives.
        mining: which triplets of a batch count: all, active or semi_hard.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        triplet_weight: float = 10.0,
        margin: float = 1.0,
        mining: str = "active",
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        self.set_triplet_loss(triplet_weight, margin, mining)
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = self.encoder(x)
        nll = self.nll(self.decoder(z_BD), x).mean()
        triplet = torch.zeros_like(nll) if y is None else self.triplet_loss(at_least_float32(z_BD), y)
        return {"loss": nll + self.triplet_weight * triplet, "nll": nll, "triplet": triplet}
