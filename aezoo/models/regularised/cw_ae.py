"""Cramer-Wold autoencoder (Knop et al. 2018), https://arxiv.org/abs/1805.09235

    L = E[-log p(x | g(z))] + lam log d^2(q(z), p(z))     z = f(x), p(z) = N(0, I)
    d^2 = E_v[ integral (sum_n N(t; v'z_n, c) / N - N(t; 0, 1 + c))^2 dt ]     |v| = 1, c = (4 / (3 N))^(2/5)

L is in nats per sample. The codes and the prior are convolved with a Gaussian of variance c (Silverman's rule) and
projected onto a line. The squared difference of their densities is averaged over all lines. It has a closed form:

    2 sqrt(pi) d^2 = sum_nm phi(||z_n - z_m||^2 / 4 c) / N^2 c^1/2 + (1 + c)^-1/2
                     - 2 sum_n phi(||z_n||^2 / (2 + 4 c)) / N (c + 1/2)^1/2
    phi(s) = 1F1(1/2; D/2; -s) = E_v[exp(-s v_1^2)]     ~ (1 + 4 s / (2 D - 3))^-1/2 for D >= 20

Therefore, no random samples are needed. The codes are those of the batch, over all ranks; c and therefore d^2 depend on
their number.

Shapes: B batch on this rank, N samples on all ranks, D code.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import LatentArgs
from aezoo.distributions.divergences import squared_distances
from aezoo.models.regularised.wae_mmd import WAEMMD
from aezoo.training.limits import check_at_least

# at s = 30, where phi switches from the integral to its asymptotic series, 16 nodes and 16 terms agree to 13 digits
_FAR, _TERMS = 30.0, 16


def kummer(d: int) -> tuple[list[tuple[float, float]], list[float]]:
    """Return the quadrature and the asymptotic series of 1F1(1/2; d/2; -s).

    Returns:
        nodes u = v_1^2 and weights of E[exp(-s u)], for small s.
        coefficients of s^-1/2, s^-3/2, ... for large s (https://dlmf.nist.gov/13.7.E2).
    """
    from scipy.special import poch, rgamma, roots_jacobi

    b, k = d / 2, range(_TERMS)
    series = [float(poch(0.5, i) * poch(1.5 - b, i) / math.factorial(i) * math.gamma(b) * rgamma(b - 0.5)) for i in k]
    if d == 1:
        return [(1.0, 1.0)], series
    # for a random direction, u is Beta(1/2, (d - 1)/2) distributed
    nodes, weights = roots_jacobi(_TERMS, (d - 3) / 2, -0.5)
    return [(float((1 + x) / 2), float(w / weights.sum())) for x, w in zip(nodes, weights, strict=True)], series


class CWAE(WAEMMD, compares_samples=True, tags=("generation",)):
    """Deterministic codes, pulled towards a standard normal prior by their Cramer-Wold distance, in closed form.

    Args:
        cw_weight: lam, weight of the logarithm of the distance between all codes and the prior, 1 in the paper.
        **kwargs: see `WAEMMD`.
    """

    def __init__(self, input_shape: tuple[int, ...], *, cw_weight: float = 1.0, **kwargs: Unpack[LatentArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, cw_weight=cw_weight)
        del self.mmd_weight, self.kernel, self.kernel_scales, self.unbiased
        self.cw_weight = cw_weight
        self._quadrature, self._series = kummer(self.latent_dim)

    def phi(self, s: Tensor) -> Tensor:
        """Return 1F1(1/2; D/2; -s), elementwise, for s >= 0; for D >= 20, return its asymptotic form."""
        d = self.code_shape[0]
        if d >= 20:
            return (1 + 4 * s / (2 * d - 3)).rsqrt()
        is_far = s >= _FAR  # since torch 2.15, clamp has no gradient at its bounds
        near, far = s.masked_fill(is_far, 0.0), s.masked_fill(~is_far, _FAR)
        integral, series = torch.zeros_like(s), torch.zeros_like(s)
        for u, w in self._quadrature:
            integral = integral + w * torch.exp(-u * near)
        for c in reversed(self._series):
            series = series / far + c
        return torch.where(is_far, series * far.rsqrt(), integral)

    def distance(self, z_BD: Tensor) -> Tensor:
        """Return d^2 between the codes of all ranks and the prior, equal on every rank: (B, D) -> ()."""
        z_ND = self.all_gather_batch(z_BD)
        c = (4 / (3 * len(z_ND))) ** 0.4
        within_B = self.phi(squared_distances(z_BD, z_ND) / (4 * c)).mean(1) / c**0.5
        across_B = self.phi((z_BD**2).sum(1) / (2 + 4 * c)) / (c + 0.5) ** 0.5
        return (self.batch_mean(within_B - 2 * across_B) + (1 + c) ** -0.5) / (2 * math.sqrt(math.pi))

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = at_least_float32(self.encoder(x))
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        # rounding or the asymptotic form may make a value near 0 negative
        log_cw = torch.log(self.distance(z_BD).clamp(min=1e-8))
        return {"loss": nll + self.cw_weight * log_cw, "nll": nll, "log_cw": log_cw}
