"""WAE-MMD, Wasserstein autoencoder (Tolstikhin et al. 2018), https://arxiv.org/abs/1711.01558

    L = E[-log p(x | g(z))] + lam MMD(q(z), p(z))     z = f(x), p(z) = N(0, I)     (algorithm 2)
    MMD = E[k(z, z')] + E[k(p, p')] - 2 E[k(z, p)]     z, z' ~ q(z), p, p' ~ p(z)
    k(a, b) = sum_s C / (C + ||a - b||^2) or sum_s exp(-||a - b||^2 / C)     C = 2 D s

L is in nats per sample. Codes have no noise; only their aggregate distribution is matched to the prior. With likelihood
gaussian, -log p is the paper's squared error plus a constant. 2 D is the expected squared distance of two draws from
the prior, and the seven scales s are those of the authors' code, https://github.com/tolstikhin/wae.

The MMD is computed between the codes of the batch, over all ranks, and the same number of draws from the prior, see
`aezoo.distributions.divergences.mmd`. It is the U-statistic, as in algorithm 2, without the pairs of a sample with
itself, so it may be negative. With `unbiased` off, it is the V-statistic, which is never negative.

Shapes: B batch on this rank, N samples on all ranks, D code.
"""

import math
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.distributions import divergences
from aezoo.errors import AezooError
from aezoo.training.limits import check_at_least

KERNELS = ("inverse_multiquadratic", "rbf")


class WAEMMD(
    NetworkAutoencoder, defaults={"likelihood": "gaussian"}, has_prior=True, compares_samples=True, tags=("generation",)
):
    """Deterministic codes whose distribution is matched to a standard normal prior by the maximum mean discrepancy.

    Args:
        latent_dim: D, size of the code.
        mmd_weight: lam, weight of the distance between all codes and the prior.
        kernel: inverse_multiquadratic or rbf.
        kernel_scales: s, widths of the summed kernels, in units of the expected squared distance between two draws.
        unbiased: use the U-statistic; off uses the V-statistic.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        mmd_weight: float = 10.0,
        kernel: str = "inverse_multiquadratic",
        kernel_scales: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
        unbiased: bool = True,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.latent_dim = latent_dim
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, mmd_weight=mmd_weight)
        if kernel not in KERNELS:
            raise AezooError(f"kernel takes {' or '.join(KERNELS)}, got {kernel!r}")
        if not kernel_scales or not all(0 < s < math.inf for s in kernel_scales):
            raise AezooError(f"kernel_scales must be one or more numbers above 0, got {tuple(kernel_scales)}")
        self.mmd_weight = mmd_weight
        self.kernel = kernel
        self.unbiased = unbiased
        self.kernel_scales = tuple(kernel_scales)
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)

    def k(self, squared: Tensor) -> Tensor:
        """Return the kernel at squared distances, elementwise."""
        widths = [2 * self.code_shape[0] * s for s in self.kernel_scales]
        if self.kernel == "rbf":
            return torch.stack([torch.exp(-squared / c) for c in widths]).sum(0)
        return torch.stack([c / (c + squared) for c in widths]).sum(0)

    def mmd(self, z_BD: Tensor, prior_BD: Tensor) -> Tensor:
        """Return the MMD of codes and prior samples, (B, D), (B, D) -> (); its mean over ranks is the MMD of all."""
        return divergences.mmd(z_BD, prior_BD, self.k, all_gather=self.all_gather_batch, unbiased=self.unbiased)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = at_least_float32(self.encoder(x))
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        mmd = self.mmd(z_BD, torch.randn_like(z_BD))
        return {"loss": nll + self.mmd_weight * mmd, "nll": nll, "mmd": mmd}

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        weight = next(self.decoder.parameters())
        return self.decode(torch.randn(n, *self.code_shape, device=weight.device, dtype=weight.dtype))
