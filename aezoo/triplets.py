"""Triplets of labelled samples: an anchor, a positive of its label, a negative of another (Schroff et al. 2015).

Shapes: B batch on this rank, N samples on all ranks, D code; P positives and M negatives are N samples too.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError

MINING = ("all", "active", "semi_hard")


class WithTriplets(Autoencoder):
    """A model with a triplet loss on its codes; its constructor calls `keep_triplets`.

    Attributes:
        triplet_weight: weight of the triplet loss.
        margin: how much farther than the positives the negatives must be.
        mining: which triplets of a batch count: all, active or semi_hard, as `triplet_ae` describes them.
    """

    compares_samples: ClassVar[bool] = True
    reads_labels: ClassVar[bool] = True

    triplet_weight: float
    margin: float
    mining: str

    def keep_triplets(self, triplet_weight: float, margin: float, mining: str) -> None:
        """Take the attributes of these names.

        Raises:
            AezooError: a value that cannot work.
        """
        if not 0 <= triplet_weight < math.inf:
            raise AezooError(f"triplet_weight must be at least 0 and finite, got {triplet_weight}")
        if not 0 < margin < math.inf:
            raise AezooError(f"margin must be above 0 and finite, got {margin}")
        if mining not in MINING:
            raise AezooError(f"unknown mining {mining!r}: take one of {', '.join(MINING)}")
        self.triplet_weight, self.margin, self.mining = triplet_weight, margin, mining

    def triplets(self, d_BN: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each triplet and whether it counts, from the distances to all samples: two (B, P, M)."""
        y_N, rows_B = self.of_all_ranks(y_B), torch.arange(len(y_B), device=y_B.device)
        n = torch.arange(len(y_N), device=y_B.device)
        other_BN = n != (rows_B + self.own_rank() * len(y_B))[:, None]
        known_BN = (y_B[:, None] != -1) & (y_N != -1)
        positive_BN = known_BN & (y_B[:, None] == y_N) & other_BN
        negative_BN = known_BN & (y_B[:, None] != y_N)
        d_p_BP1, d_n_B1M = d_BN[:, :, None], d_BN[:, None, :]
        counts_BPM = positive_BN[:, :, None] & negative_BN[:, None, :]
        if self.mining == "semi_hard":
            beyond_BPM = counts_BPM & (d_n_B1M > d_p_BP1)
            nearest_BP = torch.where(beyond_BPM, d_n_B1M, torch.inf).argmin(2)
            farthest_B1 = torch.where(negative_BN, d_BN, -torch.inf).argmax(1, keepdim=True)
            chosen_BP = torch.where(beyond_BPM.any(2), nearest_BP, farthest_B1)
            counts_BPM = counts_BPM & (chosen_BP[:, :, None] == n)
        loss_BPM = (d_p_BP1 - d_n_B1M + self.margin).relu() * counts_BPM
        return loss_BPM, loss_BPM > 0 if self.mining == "active" else counts_BPM

    def triplet_loss(self, z_BD: Tensor, y_B: Tensor) -> Tensor:
        """This rank's share of T; the mean over ranks is T."""
        d_BN = torch.cdist(z_BD, self.of_all_ranks(z_BD), compute_mode="donot_use_mm_for_euclid_dist")
        loss_BPM, counts_BPM = self.triplets(d_BN, y_B)
        total = loss_BPM.sum((1, 2)).mean()
        number = self.batch_mean(counts_BPM.sum((1, 2)).to(total.dtype))
        return total / torch.where(number > 0, number, 1)
