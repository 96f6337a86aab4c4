"""Triplet-based VAE (Ishfaq et al. 2018), https://arxiv.org/abs/1802.04403

    L = E_q(z|x)[-log p(x|z)] + beta KL(q(z|x) || p(z)) + lambda T
    T = mean over triplets of max(0, ||mu_a - mu_p|| - ||mu_a - mu_n|| + m)

in nats per sample. The posterior mean of an anchor must be nearer to that of each positive, another sample with the
same label, than to that of a negative, a sample with another label, by the margin m. Triplets are mined in the batch of
all ranks as in triplet_ae:

    all         every triplet
    active      every triplet with a loss above 0; the mean does not include the others (Hermans et al. 2017)
    semi_hard   for each a and p the nearest n that is farther than p, or the farthest n if none is

Samples without a label (-1) are in no triplet. Without triplets, and with lambda = 0, this is the VAE. Codes, scores
and samples never use labels.

Shapes: B batch on this rank, D code.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.triplet import TripletAutoencoder
from aezoo.models.variational.vae import VAE, VAEArgs


class TripletVAE(VAE, TripletAutoencoder, tags=("representation",)):
    """A VAE whose posterior means are close together for samples with the same label.

    Args:
        triplet_weight: lambda, weight of the triplet loss.
        margin: m, by how much the negatives must be farther away than the positives.
        mining: which triplets of a batch are used: all, active or semi_hard.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        triplet_weight: float = 10.0,
        margin: float = 1.0,
        mining: str = "active",
        **kwargs: Unpack[VAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.set_triplet_loss(triplet_weight, margin, mining)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        triplet = torch.zeros_like(nll) if y is None else self.triplet_loss(mu_BD, y)
        loss = nll + self.beta * (kl - self.capacity).abs() + self.triplet_weight * triplet
        return {"loss": loss, "nll": nll, "kl": kl, "elbo": -(nll + kl), "triplet": triplet}
