"""Stochastic VQ, the quantiser of the Gaussian SQ-VAE (Takida et al. 2022), https://arxiv.org/abs/2205.07547

    q(k|z) = softmax_k(-||z - e_k||^2 / (2 s^2))    y = softmax((log q + g) / temperature)    z_q = sum_k y_k e_k
    dequantisation = E_q ||z - e_k||^2 / (2 s^2)    kl = log K - H(q)

in nats, with Gumbel noise g. Codes and log s^2 are parameters. Both terms are expectations over the whole codebook.
Their sum

    dequantisation + kl = -log(1/K sum_k exp(-||z - e_k||^2 / (2 s^2)))

falls to 0 as s grows and q becomes uniform; as s falls to 0, q becomes the nearest code (VQ). With `variance` sample or
place, z has one additional channel, which is added to log s^2: its mean over the sample's positions, or its value at
the position. These are the types gaussian_2 and gaussian_3 of the authors' code, https://github.com/sony/sqvae, which
adds variances instead of their logarithms and uses the relaxed code for the dequantisation. In evaluation, z_q is the
nearest code, which has the highest probability; with `hard`, the forward value in training is a code drawn from q. A
callback may lower the buffer `temperature` during training.

Shapes: B batch, P positions, N = B P rows, D channels of a code, K codes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.distributions.categorical import gumbel_softmax, kl_from_uniform
from aezoo.errors import AezooError
from aezoo.quantisers.base import Quantiser, Rows
from aezoo.quantisers.common import nearest, relative_distance

VARIANCES = ("one", "sample", "place")


class StochasticVQ(Quantiser):
    """A relaxed sample of a code, given distances. Terms: dequantisation and kl.

    Args:
        code_dim: D, channels of a code; z has an additional channel unless variance is one.
        size: K, number of codes.
        variance: one for a common s^2; sample or place for an additional factor per sample or position.
        start_variance: initial s^2, relative to codes of variance 1.
        temperature: temperature of the relaxation.
        hard: return one-hot codes in training too, with the gradient of the relaxed codes.

    Raises:
        AezooError: an invalid value.
    """

    temperature: Tensor

    def __init__(
        self,
        code_dim: int,
        size: int = 512,
        *,
        variance: str = "one",
        start_variance: float = 1.0,
        temperature: float = 1.0,
        hard: bool = False,
    ) -> None:
        super().__init__(code_dim + (variance != "one"), (size,), code_dim)
        if variance not in VARIANCES:
            raise AezooError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
        if not (0 < start_variance < math.inf and 0 < temperature < math.inf):
            raise AezooError(
                "StochasticVQ needs a start_variance and a temperature above 0 and finite, got "
                f"{start_variance} and {temperature}"
            )
        self.variance, self.hard = variance, hard
        self.register_float32_buffer("temperature", torch.tensor(float(temperature)))
        self.code_KD = nn.Parameter(torch.randn(size, code_dim))
        self.log_variance = nn.Parameter(torch.tensor(math.log(start_variance)))

    def logits(self, z: Tensor) -> Tensor:
        """Return log q(k|z) up to one constant per row, -||z - e_k||^2 / (2 s^2): (B, dim, *positions) -> (B, P, K)."""
        with torch.autocast(z.device.type, enabled=False):
            z_ND = z.movedim(1, -1).flatten(0, -2).to(self.exact_dtype)
            rows_per_sample = math.prod(z.shape[2:])
            return self._logits(z_ND, rows_per_sample).unflatten(0, (-1, rows_per_sample))

    def _logits(self, z_ND: Tensor, rows_per_sample: int) -> Tensor:
        z_ND, log_variance_N1 = self._parts(z_ND, rows_per_sample)
        code_KD = self.code_KD.to(self.exact_dtype)
        # centring at the mean of the codes minimises the rounding error of the expanded square
        centre_D = code_KD.detach().mean(0)
        z_ND, code_KD = z_ND - centre_D, code_KD - centre_D
        square_NK = z_ND.square().sum(1, keepdim=True) + relative_distance(z_ND, code_KD)
        return -0.5 * square_NK.clamp(min=0) * torch.exp(-log_variance_N1)

    def _parts(self, z_ND: Tensor, rows_per_sample: int) -> tuple[Tensor, Tensor]:
        """Return the channels of z to compare with codes, and log s^2 in [-15, 10], which limits rounding errors."""
        log_variance_N1 = self.log_variance.to(self.exact_dtype).view(1, 1)
        if self.variance != "one":
            z_ND, own_N1 = z_ND.split([self.code_dim, 1], 1)
            if self.variance == "sample":
                own_N1 = (
                    own_N1.unflatten(0, (-1, rows_per_sample))
                    .mean(1, keepdim=True)
                    .expand(-1, rows_per_sample, -1)
                    .flatten(0, 1)
                )
            log_variance_N1 = log_variance_N1 + own_N1
        return z_ND, log_variance_N1.clamp(-15, 10)

    def _quantise_rows(self, z_ND: Tensor, rows_per_sample: int = 1) -> Rows:
        logits_NK = self._logits(z_ND, rows_per_sample)
        log_q_NK = logits_NK.log_softmax(1)
        q_NK = log_q_NK.exp()
        terms = {
            "dequantisation": -(q_NK * logits_NK).sum(1),
            "kl": kl_from_uniform(q_NK, log_q_NK, self.codebook_sizes[0]),
        }
        if self.training:
            # random numbers are drawn per sample, so the shape is (B, P, K)
            y_NK = gumbel_softmax(log_q_NK.unflatten(0, (-1, rows_per_sample)), self.temperature, self.hard).flatten(
                0, 1
            )
            return y_NK @ self.code_KD.to(self.exact_dtype), y_NK.argmax(1, keepdim=True), terms
        index_N1 = nearest(z_ND[:, : self.code_dim], self.code_KD.to(self.exact_dtype))[:, None]
        return self._lookup_rows(index_N1), index_N1, terms

    def _lookup_rows(self, index_NQ: Tensor) -> Tensor:
        return F.embedding(index_NQ[:, 0], self.code_KD.to(self.exact_dtype))
