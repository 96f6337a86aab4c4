"""VP, vector perturbation (Zhai et al. 2026), https://arxiv.org/abs/2602.17133

Quantisation has an error about as large as a cell. In training, z is perturbed by such an error instead of being
quantised. With D_m(z) the distance of z to its m-th neighbour in a queue of S rows of earlier batches,

    z' = z + u    u uniform in the ball of radius eta D_M(z)    M = ceil(S / K)
    z_q = z' with probability min(1, (D_k(z) D_M(z) / (D_k(z') D_M(z')))^D), 0 where ||u|| > eta D_M(z'), else z

This is a Metropolis-Hastings step that preserves the density 1 / D_k^D of z. There is no gradient through the choice;
dL/dz is dL/dz_q. The terms are 0 if each channel of z has mean 0 and variance 1, over the rows of all ranks:

    code_mean = ||mu||^2    code_variance = ||sigma^2 - 1||^2

Evaluation uses the nearest of K codes, which have no influence on the loss: they are the moving averages of `vq`. The
authors instead cluster the queue by k-means at the end of training or for inspection; their queue has 16 D K rows and
takes a fraction of 0.01 of each batch.

Shapes: N rows, D channels, K codes, S rows in the queue.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from aezoo.quantisers.base import Rows
from aezoo.quantisers.estimators import ste
from aezoo.quantisers.vq import VQ
from aezoo.training.limits import check_at_least

# number of rows whose distances to the queue are computed together, and number of rows of the queue in a group
_ROWS, _GROUP = 512, 8


class VectorPerturbation(VQ):
    """Perturbs rows in training by about the error of quantisation. Terms: code_mean and code_variance.

    Args:
        dim: D, channels of z.
        size: K, number of codes.
        eta: maximum perturbation relative to the distance to the M-th neighbour.
        neighbours: k, the neighbour whose distance estimates the density.
        queue_size: S.
        share: fraction of the rows of a batch that enter the queue.
        decay: d, decay rate of the codes' moving averages.
        dead_below: N_k, in rows per batch of all ranks, below which a code moves to a row, see `vq`; 0 for never.

    Raises:
        AezooError: an invalid value.
    """

    queue_SD: Tensor
    next: Tensor

    def __init__(
        self,
        dim: int,
        size: int = 512,
        *,
        eta: float = 1.0,
        neighbours: int = 8,
        queue_size: int = 4096,
        share: float = 0.1,
        decay: float = 0.99,
        dead_below: float = 1.0,
    ) -> None:
        super().__init__(dim, size, decay=decay, dead_below=dead_below)
        check_at_least(0, eta=eta, share=share)
        check_at_least(1, neighbours=neighbours, queue_size=queue_size)
        self.eta, self.share = eta, min(share, 1.0)
        self.k, self.m = min(neighbours, queue_size), math.ceil(queue_size / size)
        self.register_float32_buffer("queue_SD", torch.randn(queue_size, dim))
        self.register_buffer("next", torch.zeros((), dtype=torch.long))

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        q_ND, index_N, _ = self.select_codes(z_ND, rows_per_sample)
        terms = self.moments(z_ND, 1.0)
        if not self.training:
            return ste(z_ND, q_ND), index_N[:, None], terms
        of_samples = z_ND.detach().unflatten(0, (-1, rows_per_sample))  # random numbers are drawn per sample
        direction_ND = torch.randn_like(of_samples).flatten(0, 1)
        radius_N, coin_N = (torch.rand_like(of_samples[..., 0]).flatten() for _ in range(2))
        moved_ND = z_ND + self.perturb(z_ND, direction_ND, radius_N, coin_N)
        self._enqueue(z_ND)
        return moved_ND, index_N[:, None], terms

    @torch.no_grad()
    def perturb(self, z_ND: Tensor, direction_ND: Tensor, radius_N: Tensor, coin_N: Tensor) -> Tensor:
        """Return the accepted perturbations, 0 where a proposal is rejected, (N, D).

        Args:
            z_ND: the rows.
            direction_ND: standard normal.
            radius_N: uniform in [0, 1].
            coin_N: uniform in [0, 1].
        """
        near_N, far_N = self.distances(z_ND)
        length_N = self.eta * far_N * radius_N ** (1 / self.dim)
        u_ND = length_N[:, None] * F.normalize(direction_ND, dim=1)
        other_near_N, other_far_N = self.distances(z_ND + u_ND)
        log_ratio_N = self.dim * (near_N.log() + far_N.log() - other_near_N.log() - other_far_N.log())
        accepted_N = (coin_N.log() < log_ratio_N) & (length_N <= self.eta * other_far_N)
        return torch.where(accepted_N[:, None], u_ND, 0)

    def distances(self, z_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return D_k and D_M of rows, both positive, (N,), (N,)."""
        most, size = max(self.k, self.m), len(self.queue_SD)
        # the m nearest rows are in the m nearest groups: two short searches are faster than a long one
        groups = max(most, math.ceil(size / _GROUP))
        # a difference of squares has few correct digits in float32; Apple's GPUs have no higher precision
        exact = z_ND.dtype if z_ND.device.type == "mps" else torch.float64
        queue_SD = F.pad(self.queue_SD.to(z_ND.dtype), (0, 0, 0, -size % groups))
        square_S = F.pad(self.queue_SD.to(exact).square().sum(1), (0, -size % groups), value=torch.inf)
        first_I1 = torch.arange(0, len(queue_SD), groups, device=z_ND.device)[:, None]
        parts = []
        for rows in z_ND.split(_ROWS):
            all_nS = torch.addmm(square_S, rows.to(exact), queue_SD.to(exact).T, alpha=-2)
            group_nM = all_nS.unflatten(1, (-1, groups)).amin(1).topk(most, largest=False, sorted=False).indices
            of_groups_nC = (group_nM[:, None] + first_I1).flatten(1)
            nearest_nM = all_nS.gather(1, of_groups_nC).topk(most, largest=False).indices
            found_n2 = of_groups_nC.gather(1, nearest_nM[:, [self.k - 1, self.m - 1]])
            # if a row is in the queue, D_M(z') may be ||u||, for which expanded squares are not exact enough
            parts.append(torch.cdist(rows[:, None], queue_SD[found_n2], compute_mode="donot_use_mm_for_euclid_dist"))
        near_N, far_N = torch.cat(parts)[:, 0].clamp(min=torch.finfo(z_ND.dtype).tiny).unbind(1)
        return near_N, far_N

    @torch.no_grad()
    def _enqueue(self, z_ND: Tensor) -> None:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if self.is_distributed() else (0, 1)
        n, all_n = z_ND.shape[0], z_ND.shape[0] * ranks
        i_C = torch.arange(min(len(self.queue_SD), math.ceil(self.share * all_n)), device=z_ND.device)
        # rows of all ranks, evenly spread and different at each update; each rank contributes its rows
        row_C = (i_C * all_n // max(1, len(i_C)) + self.updates) % all_n - rank * n
        own_C1 = ((row_C >= 0) & (row_C < n))[:, None]
        fresh_CD = self.all_reduce_sum(torch.where(own_C1, z_ND[row_C.clamp(0, n - 1)], 0))
        self.queue_SD.index_copy_(0, (self.next + i_C) % len(self.queue_SD), fresh_CD)
        self.next.add_(len(i_C)).remainder_(len(self.queue_SD))

    def _init_rows(self, z_ND: Tensor) -> None:
        """Initialise the codes by k-means, and fill the queue with rows, repeated if there are too few."""
        super()._init_rows(z_ND)
        i_S = torch.arange(len(self.queue_SD), device=z_ND.device)
        self.queue_SD.copy_(z_ND[i_S * len(z_ND) // len(i_S)])
