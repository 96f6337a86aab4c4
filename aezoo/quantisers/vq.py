"""VQ, vector quantisation (van den Oord et al. 2017), https://arxiv.org/abs/1711.00937

    z_q = e_k    k = argmin_j ||z - e_j||
    codebook = ||sg(z) - e_k||^2    commitment = ||z - sg(e_k)||^2, weighted by beta

The codes are parameters that are trained by the term `codebook`, or exponential moving averages of the rows assigned to
them (appendix A.1). In the second case there is no such term:

    N_k <- d N_k + (1 - d) n_k    m_k <- d m_k + (1 - d) sum of the n_k rows    e_k = m_k / N_k where n_k > 0

over the rows of all ranks, with initial N_k = 1 and m_k = e_k. A code without assigned rows does not change, so the
division needs no smoothing.

A code whose N_k falls below `dead_below` moves to a row of the batch; these rows are evenly spread over the batches of
all ranks. N_k becomes the mean N / K, or dead_below if that is larger, and m_k = N_k e_k. With N <= K rows the mean is
at most 1, and dead_below is limited to half of it: a code that has moved and is never selected moves again after log 2
/ log(1 / d) steps or more, which is 69 by default.

Estimators: `estimators.ste`, `rotation`, `diveq` (which has no term `codebook`), and gumbel: in training k is drawn
    from softmax_j(-||z - e_j||^2 / temperature), and the gradient is that of the relaxed sample.

Shapes: N rows, D channels, K codes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.distributions.categorical import sample_gumbel
from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.common import k_means, nearest, relative_distance
from aezoo.quantisers.estimators import diveq, rotation, ste

UPDATES = ("ema", "gradient")
ESTIMATORS = ("ste", "rotation", "gumbel", "diveq")


class VQ(Quantiser):
    """Maps rows to the nearest of K vectors. Terms: commitment and, for codes trained by gradient, codebook.

    Args:
        dim: D, channels of z.
        size: K, number of codes.
        update: update rule of the codes: ema, or gradient of the term codebook.
        decay: d, decay rate of the moving averages.
        dead_below: N_k, in rows per batch of all ranks, below which a code moves to a row, see above; 0 for never.
        estimator: gradient estimator: ste, rotation, gumbel or diveq.
        cosine: project z and the codes to the unit sphere first.
        temperature: temperature of gumbel, a squared distance; it must be well below the squared distances between
            codes, or selection is nearly random and codes merge.
        sigma: standard deviation of diveq's noise.

    Raises:
        AezooError: an invalid value.
    """

    code_KD: Tensor
    sum_KD: Tensor
    count_K: Tensor
    updates: Tensor

    def __init__(
        self,
        dim: int,
        size: int = 512,
        *,
        update: str = "ema",
        decay: float = 0.99,
        dead_below: float = 0.0,
        estimator: str = "ste",
        cosine: bool = False,
        temperature: float = 0.03,
        sigma: float = 1e-3,
    ) -> None:
        super().__init__(dim, (size,))
        for name, value, possible in (("update", update, UPDATES), ("estimator", estimator, ESTIMATORS)):
            if value not in possible:
                raise AezooError(f"{name} must be one of {', '.join(possible)}, got {value!r}")
        if not (0 <= decay < 1 and dead_below >= 0 and temperature > 0 and sigma >= 0):
            raise AezooError(
                "VQ needs decay in [0, 1), dead_below and sigma of at least 0 and a temperature above 0, got "
                f"{decay}, {dead_below}, {sigma} and {temperature}"
            )
        self.decay, self.dead_below, self.estimator, self.cosine = decay, dead_below, estimator, cosine
        self.temperature, self.sigma = temperature, sigma
        self.uses_ema, self.tracks_usage = update == "ema", update == "ema" or dead_below > 0
        code_KD = torch.empty(size, dim).uniform_(-1 / size, 1 / size)
        if self.uses_ema:
            self.register_float32_buffer("code_KD", code_KD)
            self.register_float32_buffer("sum_KD", code_KD.clone())
        else:
            self.code_KD = nn.Parameter(code_KD)
        if self.tracks_usage:
            self.register_float32_buffer("count_K", torch.ones(size))
            self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def codebook(self) -> Tensor:
        """Return the codes as used in comparisons, (K, D)."""
        code_KD = self.code_KD.to(self.exact_dtype)
        if self.training and self.tracks_usage:
            code_KD = code_KD.clone()  # updates overwrite the codes before the backward pass
        return self.project(code_KD)

    def project(self, rows: Tensor) -> Tensor:
        """Return rows for the comparison with codes: unchanged, or projected to the unit sphere."""
        return F.normalize(rows, dim=-1) if self.cosine else rows

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        z_ND = self.project(z_ND)
        q_ND, index_N, terms = self.select_codes(z_ND, rows_per_sample)
        return self.apply_estimator(z_ND, q_ND, rows_per_sample), index_N[:, None], terms

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return F.embedding(index_NQ[:, 0], self.codebook())

    def select_codes(
        self, z_ND: Tensor, rows_per_sample: int = 1, kept_N: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return codes, indices and terms of projected rows; in training, the rows update the codes.

        Args:
            z_ND: (N, D).
            rows_per_sample: rows per sample.
            kept_N: mask of the rows that update the codes; all if None.

        Returns:
            Codes with the gradient that reaches the codebook, (N, D), indices, (N,), and terms, (N,) each.
        """
        code_KD = self.codebook()
        if self.training and self.estimator == "gumbel":
            log_p_NK = -relative_distance(z_ND, code_KD) / self.temperature
            # random numbers are drawn per sample, so the shape is (B, P, K)
            noisy_NK = log_p_NK + sample_gumbel(log_p_NK.unflatten(0, (-1, rows_per_sample))).flatten(0, 1)
            index_N = noisy_NK.argmax(1)
            chosen_ND, soft_ND = F.embedding(index_N, code_KD), noisy_NK.softmax(1) @ code_KD
            q_ND = ste(soft_ND, chosen_ND)
        else:
            index_N = nearest(z_ND, code_KD)
            q_ND = chosen_ND = F.embedding(index_N, code_KD)
        terms = {"commitment": (z_ND - chosen_ND.detach()).square().sum(1)}  # trains only the encoder
        if not self.uses_ema and self.estimator != "diveq":
            terms["codebook"] = (z_ND.detach() - chosen_ND).square().sum(1)
        if self.training and self.tracks_usage:
            self._update_codebook(z_ND, index_N, kept_N)
        return q_ND, index_N, terms

    def apply_estimator(self, z_ND: Tensor, q_ND: Tensor, rows_per_sample: int = 1) -> Tensor:
        """Return the codes with a gradient in z by the estimator, (N, D), (N, D) -> (N, D)."""
        if self.estimator == "rotation":
            return rotation(z_ND, q_ND)
        if self.training and self.estimator == "gumbel":
            return q_ND
        if self.training and self.estimator == "diveq":
            noise_ND = torch.randn_like(z_ND.unflatten(0, (-1, rows_per_sample))).flatten(0, 1)
            return diveq(z_ND, q_ND, self.sigma, noise_ND)
        return ste(z_ND, q_ND)

    @torch.no_grad()
    def _update_codebook(self, z_ND: Tensor, index_N: Tensor, kept_N: Tensor | None) -> None:
        kept_N1 = torch.ones_like(z_ND[:, :1]) if kept_N is None else kept_N.to(z_ND.dtype)[:, None]
        zeros = z_ND.new_zeros(self.codebook_sizes[0], self.dim + 1)
        # sums and row counts in one tensor, for a single exchange between ranks
        totals = self.all_reduce_sum(zeros.index_add(0, index_N, torch.cat([z_ND * kept_N1, kept_N1], 1)))
        batch_sum_KD, hits_K = totals[:, :-1], totals[:, -1]
        self.count_K.lerp_(hits_K, 1 - self.decay)
        if self.uses_ema:
            self.sum_KD.lerp_(batch_sum_KD, 1 - self.decay)
            mean_KD = self.sum_KD / self.count_K[:, None]
            self.code_KD.copy_(torch.where(hits_K[:, None] > 0, mean_KD, self.code_KD))
        if self.dead_below:
            self._replace_dead_codes(z_ND)
        self.updates.add_(1)

    def _replace_dead_codes(self, z_ND: Tensor) -> None:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if self.is_distributed() else (0, 1)
        n, all_n = z_ND.shape[0], z_ND.shape[0] * ranks
        mean = all_n / self.codebook_sizes[0]
        # with few rows, evenly used codes would be dead, and a code that has moved would be dead in the next step
        threshold = self.dead_below if mean > 1 else min(self.dead_below, mean / 2)
        dead_K = self.count_K < threshold
        order_K = dead_K.cumsum(0) - 1
        # rows of all ranks, evenly spread and different at each update; each rank contributes its rows
        row_K = (order_K * all_n // dead_K.sum().clamp(min=1) + self.updates) % all_n - rank * n
        local_K = dead_K & (row_K >= 0) & (row_K < n)
        fresh_KD = self.all_reduce_sum(torch.where(local_K[:, None], z_ND[row_K.clamp(0, n - 1)], 0))
        count = max(mean, threshold)
        self.count_K.copy_(torch.where(dead_K, count, self.count_K))
        self.code_KD.copy_(torch.where(dead_K[:, None], fresh_KD, self.code_KD))
        if self.uses_ema:
            self.sum_KD.copy_(torch.where(dead_K[:, None], fresh_KD * count, self.sum_KD))

    def _init_rows(self, z_ND: Tensor) -> None:
        """Initialise the codes by k-means, computed on the first rank for all ranks."""
        z_ND, distributed = self.project(z_ND), dist.is_available() and dist.is_initialized()
        result_KD1 = z_ND.new_zeros(self.codebook_sizes[0], self.dim + 1)
        if not distributed or dist.get_rank() == 0:
            mean_KD, count_K = k_means(z_ND, self.codebook_sizes[0])
            result_KD1 = torch.cat([mean_KD, count_K[:, None]], 1)
        if distributed:
            dist.broadcast(result_KD1, 0)
        self.code_KD.copy_(result_KD1[:, :-1])
        if self.tracks_usage:
            self.count_K.copy_(result_KD1[:, -1])
        if self.uses_ema:
            self.sum_KD.copy_(result_KD1[:, :-1] * result_KD1[:, -1:])
