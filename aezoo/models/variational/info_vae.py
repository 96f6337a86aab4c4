"""InfoVAE with the maximum mean discrepancy (Zhao et al. 2017), https://arxiv.org/abs/1706.02262

    L = E_q[-log p(x|z)] + (1 - alpha) KL(q(z|x) || p(z)) + (alpha + lam - 1) MMD(q(z), p(z))
    MMD = E[k(z, z')] + E[k(p, p')] - 2 E[k(z, p)]     z, z' ~ q(z), p, p' ~ p(z)
    k(a, b) = sum_c 1 / (1 + t / c) or sum_c exp(-t / c)     t = ||a - b||^2 / (2 D s^2)

in nats per sample. q(z), the aggregate posterior over all data, is kept close to the prior, while a single code may
contain more information about its sample. alpha = 0, lam = 1 is the VAE; alpha = 1 is the MMD-VAE.

The MMD is the biased V-statistic (Gretton et al. 2012, https://jmlr.org/papers/v13/gretton12a.html, equation 5) between
the codes sampled for the batch, over all ranks, and the same number of samples from the prior. It is never negative, is
defined for one sample, and does not change if the batch is duplicated. If q(z) = p(z), it is about 2 (1 - E[k]) / B
instead of 0, so values are only comparable at the same batch size. With `unbiased`, it is the U-statistic, which
excludes the pairs of a sample with itself. For two samples from the prior, t is 1 / s^2 on average.

Shapes: B batch on this rank, N samples on all ranks, D code.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.bases.network import LatentArgs
from aezoo.distributions import divergences
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE
from aezoo.training.limits import check_above

KERNELS = ("inverse_multiquadratic", "rbf")


class InfoVAE(VAE, tags=("representation", "generation")):
    """A VAE whose aggregate posterior, instead of each posterior, is matched to the prior.

    Args:
        alpha: preference for informative codes, at most 1: 0 keeps the whole KL term, 1 removes it.
        mmd_weight: lam, weight of the distance between all codes and the prior, 1000 in the paper; the MMD has the
            weight alpha + lam - 1.
        kernel: inverse_multiquadratic or rbf.
        bandwidth: s, width of the kernel, in units of the distance between two samples from the prior.
        kernel_scales: c, relative squared widths of the summed kernels.
        unbiased: use the U-statistic instead of the V-statistic.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        alpha: float = 0.0,
        mmd_weight: float = 500.0,
        kernel: str = "inverse_multiquadratic",
        bandwidth: float = 1.0,
        kernel_scales: tuple[float, ...] = (1.0,),
        unbiased: bool = False,
        **kwargs: Unpack[LatentArgs],
    ) -> None:
        if not -math.inf < alpha <= 1:
            raise AezooError(f"alpha must be at most 1 and finite, got {alpha}")
        if not 0 <= alpha + mmd_weight - 1 < math.inf:
            raise AezooError(f"mmd_weight must be at least 1 - alpha = {1 - alpha:g} and finite, got {mmd_weight}")
        if kernel not in KERNELS:
            raise AezooError(f"kernel takes {' or '.join(KERNELS)}, got {kernel!r}")
        check_above(0, bandwidth=bandwidth)
        if not kernel_scales or not all(0 < c < math.inf for c in kernel_scales):
            raise AezooError(f"kernel_scales must be one or more numbers above 0, got {tuple(kernel_scales)}")
        super().__init__(input_shape, beta=1 - alpha, **kwargs)
        self.alpha = alpha
        self.mmd_weight = mmd_weight
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.kernel_scales = tuple(kernel_scales)
        self.unbiased = unbiased

    def k(self, squared: Tensor) -> Tensor:
        """Return the kernel at squared distances, elementwise."""
        widths = [2 * self.code_shape[0] * c * self.bandwidth**2 for c in self.kernel_scales]
        t_C = torch.stack([squared / width for width in widths])
        return (1 / (1 + t_C) if self.kernel == "inverse_multiquadratic" else torch.exp(-t_C)).sum(0)

    def mmd(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        """MMD of codes and samples of the prior, (B, D), (B, D) -> (); its mean over ranks is the MMD of all codes."""
        return divergences.mmd(z_BD, prior_BD, self.k, all_gather=self.all_gather_batch, unbiased=self.unbiased)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        mmd = self.mmd(z_BD, torch.randn_like(z_BD))
        kl_term = self.beta * (kl - self.capacity).abs()  # 1 - alpha and 0 unless BetaAnnealing changes them
        loss = nll + kl_term + (self.alpha + self.mmd_weight - 1) * mmd
        return {"loss": loss, "nll": nll, "kl": kl, "elbo": -(nll + kl), "mmd": mmd}
