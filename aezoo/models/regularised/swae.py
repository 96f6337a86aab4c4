"""Sliced Wasserstein autoencoder (Kolouri et al. 2018), https://arxiv.org/abs/1804.01947

    L = E[-log p(x | g(z))] + lam SW(q(z), p(z))     z = f(x), p(z) = N(0, I)
    SW = E_v[ W(v'z, v'p) ]     |v| = 1, p ~ p(z)     W = 1/N sum_n ((v'z)_(n) - (v'p)_(n))^2

L is in nats per sample. In one dimension, the squared 2-Wasserstein distance of two sets pairs the n-th smallest value
of one with the n-th smallest of the other. SW is its mean over random directions v (algorithm 1). Between N(m, I) and
N(0, I), it is ||m||^2 / D. The codes are those of the batch, over all ranks. They are compared with the same number of
draws from the prior, in the same directions on every rank. The distance of two finite sets from the same distribution
is above 0 and decreases with N.

Shapes: B batch on this rank, N samples on all ranks, D code, V directions.
"""

from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import normalize

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import LatentArgs
from aezoo.errors import AezooError
from aezoo.models.regularised.wae_mmd import WAEMMD
from aezoo.training.limits import check_at_least


class SWAE(WAEMMD, compares_samples=False, tags=("generation",)):
    """Deterministic codes, matched to a standard normal prior by the Wasserstein distance along random lines.

    Args:
        sw_weight: lam, weight of the distance between all codes and the prior.
        n_projections: V, number of random directions.
        **kwargs: see `WAEMMD`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        sw_weight: float = 10.0,
        n_projections: int = 50,
        **kwargs: Unpack[LatentArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, sw_weight=sw_weight)
        if not 1 <= n_projections <= 100_000:
            raise AezooError(f"n_projections must lie between 1 and 100000, got {n_projections}")
        del self.mmd_weight, self.kernel, self.kernel_scales, self.unbiased
        self.sw_weight = sw_weight
        self.n_projections = n_projections

    def sliced_wasserstein(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        """Return SW between the codes and prior samples, over all ranks and equal on each, (B, D), (B, D) -> ()."""
        v_VD = torch.randn(self.n_projections, z_BD.shape[1], device=z_BD.device, dtype=z_BD.dtype)
        v_VD = normalize(self.all_gather_batch(v_VD)[: self.n_projections])  # use the directions of the first rank
        z_ND, prior_ND = self.all_gather_batch(z_BD), self.all_gather_batch(prior_BD)
        with torch.autocast(z_BD.device.type, enabled=False):  # autocast would round the products to half precision
            along_VN, prior_VN = v_VD @ z_ND.T, v_VD @ prior_ND.T
        return (along_VN.sort().values - prior_VN.sort().values).square().mean()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = at_least_float32(self.encoder(x))
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        sw = self.sliced_wasserstein(z_BD, torch.randn_like(z_BD))
        return {"loss": nll + self.sw_weight * sw, "nll": nll, "sw": sw}
