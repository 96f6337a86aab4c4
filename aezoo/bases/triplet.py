"""Triplets of labelled samples: an anchor, a positive with its label and a negative with another (Schroff et al. 2015).

Shapes: B batch on this rank, N samples on all ranks, D code; P (positives) and M (negatives, sorted) also have size N.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.distributions.divergences import distances
from aezoo.errors import AezooError
from aezoo.nets.blocks.labels import check_labels
from aezoo.training.limits import check_above, check_at_least

MINING = ("all", "active", "semi_hard")


class TripletAutoencoder(Autoencoder, compares_samples=True, reads_labels=True):
    """A model with a triplet loss on its codes; its constructor calls `set_triplet_loss`.

    Attributes:
        triplet_weight: weight of the triplet loss.
        margin: minimum difference between the distances to negatives and to positives.
        mining: the triplets of a batch that are used: all, active or semi_hard, see `triplet_ae`.
    """

    triplet_weight: float
    margin: float
    mining: str

    def set_triplet_loss(self, triplet_weight: float, margin: float, mining: str) -> None:
        """Set the attributes with these names.

        Raises:
            AezooError: a value is invalid.
        """
        check_at_least(0, triplet_weight=triplet_weight)
        check_above(0, margin=margin)
        if mining not in MINING:
            raise AezooError(f"unknown mining {mining!r}: choose from {', '.join(MINING)}")
        self.triplet_weight = triplet_weight
        self.margin = margin
        self.mining = mining

    def triplets(self, d_BN: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss sum and the number of used triplets per anchor, from distances to all samples: (B,) each."""
        y_N = self.all_gather_batch(check_labels(y_B))
        other_BN = torch.arange(len(y_N), device=y_B.device) != self.local_rows(y_B)[:, None]
        known_BN = (y_B[:, None] != -1) & (y_N != -1)
        positive_BN = known_BN & (y_B[:, None] == y_N) & other_BN
        negative_BN = known_BN & (y_B[:, None] != y_N)
        number_B1 = negative_BN.sum(1, keepdim=True)
        # negatives sorted by distance, so that those within reach of a positive come first: N log N, not N^2
        d_BM = torch.where(negative_BN, d_BN, torch.inf).sort(dim=1, stable=True).values
        if self.mining == "semi_hard":
            beyond_BP = torch.searchsorted(d_BM.detach(), d_BN.detach(), right=True)
            chosen_BP = beyond_BP.minimum(number_B1 - 1).clamp(min=0)  # the farthest, if none is farther away
            has_one_BP = positive_BN & (number_B1 > 0)
            loss_BP = (d_BN - d_BM.gather(1, chosen_BP) + self.margin).relu() * has_one_BP
            return loss_BP.sum(1), has_one_BP.sum(1)
        reach_BP = d_BN + self.margin
        within_BP = torch.searchsorted(d_BM.detach(), reach_BP.detach()) * positive_BN
        # cumulative sums over the nearest negatives, starting with none
        sums_BM = F.pad(torch.where(d_BM < torch.inf, d_BM, 0).cumsum(1), (1, 0))
        loss_BP = within_BP * reach_BP - sums_BM.gather(1, within_BP)
        counts_BP = within_BP if self.mining == "active" else positive_BN * number_B1
        return loss_BP.sum(1), counts_BP.sum(1)

    def triplet_loss(self, z_BD: Tensor, y_B: Tensor) -> Tensor:
        """Return this rank's contribution to T; its mean over ranks is T."""
        d_BN = distances(self.all_gather_batch(z_BD))[self.local_rows(z_BD)]
        loss_B, counts_B = self.triplets(d_BN, y_B)
        total = loss_B.mean()
        number = self.batch_mean(counts_B.to(total.dtype))
        return total / torch.where(number > 0, number, 1)
