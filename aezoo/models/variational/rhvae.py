"""Riemannian Hamiltonian VAE (Chadebec et al. 2022), https://arxiv.org/abs/2105.00026

The Hamiltonian VAE (hvae) in a space with a learned metric G, from which new samples are drawn:

    G(z)^-1 = sum_i L_i L_i' exp(-|z - c_i|^2 / T^2) + lam I     lower triangular L_i = L(c_i) with a positive diagonal
    H(z, v) = -log p(x|z) - log p(z) + 1/2 log det G(z) + 1/2 v' G(z)^-1 v     v_0 ~ N(0, G(z_0)) / sqrt(beta_0)
    L = E[-log p(x|z_K) + KL]
    KL = log q(z_0|x) - log p(z_K) + (v_K' G(z_K)^-1 v_K + log det G(z_K) - log det G(z_0) - |gamma|^2) / 2

z and v are updated by generalised leapfrog steps, two of whose equations are implicit; the bound is exact up to the
error of the fixed-point iteration that solves them. The centroids c_i are the codes of the most recent training
samples; L is a function of them, while the paper's network is a function of the samples themselves. K = 0 is the VAE.
In bounds, p(z) = N(0, I). `sample` follows the paper: Hamiltonian Monte Carlo from the centroids towards sqrt(det
G(z)^-1), which is large near the codes of data.

Shapes: B batch, D code, M centroids, K leapfrog steps or importance samples.
"""

from functools import partial
from typing import Unpack

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.manifolds import hamiltonian
from aezoo.manifolds.riemannian import CentroidMetric, Gram, cholesky_factor, half_log_det, velocity
from aezoo.models.variational.hvae import HVAE, HVAEArgs

_MOST_ITERATIONS = 100
# the chain of `sample`: steps of HMC, leapfrog steps in each, and their size in units of T
_HMC_STEPS, _LEAPFROG_STEPS, _STEP_SIZE = 30, 10, 0.05


class RHVAE(HVAE, defaults={"latent_dim": 8}, not_averaged=("centroids_MD",), tags=("generation",)):
    """Gaussian code whose posterior and samples follow a learned metric.

    Args:
        n_centroids: M, number of codes around which the metric is built.
        temperature: T, the length scale of each centroid's contribution to the metric.
        metric_floor: lam, the inverse metric far from all centroids.
        n_fixed_point: iterations for each implicit equation of a step.
        **kwargs: see `HVAE`.
    """

    centroids_MD: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        n_centroids: int = 100,
        temperature: float = 1.5,
        metric_floor: float = 0.01,
        n_fixed_point: int = 3,
        **kwargs: Unpack[HVAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if not 1 <= n_centroids <= 100_000:
            raise AezooError(f"n_centroids must be from 1 to 100000, got {n_centroids}")
        for name, value in (("temperature", temperature), ("metric_floor", metric_floor)):
            if not 1e-6 <= value <= 1e6:
                raise AezooError(f"{name} must be from 1e-6 to 1e6, got {value}")
        if not 1 <= n_fixed_point <= _MOST_ITERATIONS:
            raise AezooError(f"n_fixed_point must be from 1 to {_MOST_ITERATIONS}, got {n_fixed_point}")
        self.temperature = temperature
        self.metric_floor = metric_floor
        self.n_fixed_point = n_fixed_point
        self.metric = Gram(self.latent_dim)
        self.register_buffer("centroids_MD", torch.randn(n_centroids, self.latent_dim))

    # inductor takes minutes for its thousands of small kernels, and rounds the gradient of eps by 1e-3
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        terms = self.bound(x, mu_BD, log_var_BD)
        if self.training:
            codes_ND = torch.cat([self.centroids_MD, self.all_gather_batch(mu_BD.detach()).to(self.centroids_MD)])
            self.centroids_MD.copy_(codes_ND[-len(self.centroids_MD) :])
        return terms

    def current_metric(self) -> CentroidMetric:
        """Return G for the current centroids."""
        c_MD = self.centroids_MD.clone()
        return CentroidMetric(at_least_float32(c_MD), self.metric(c_MD), self.temperature, self.metric_floor)

    def flow(self, x: Tensor, z_BD: Tensor, gamma_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the code z_K and the momentum's contribution to KL from z_0 and gamma: -> (B, D), (B,)."""
        G_inv = self.current_metric().inverse
        start_BDD = G_inv(z_BD)
        # with G^-1 = A A', the covariance of A'^-1 gamma is G
        v_BD = torch.linalg.solve_triangular(cholesky_factor(start_BDD).mT, gamma_BD[..., None], upper=True)[..., 0]
        z_BD, v_BD = self.integrate(x, z_BD, v_BD / self.cooling[0], G_inv)
        end_BDD = G_inv(z_BD)
        kinetic_B = 0.5 * (v_BD * velocity(end_BDD, v_BD)).sum(1) - 0.5 * (gamma_BD**2).sum(1)
        return z_BD, kinetic_B + half_log_det(end_BDD) - half_log_det(start_BDD)

    def integrate(self, x: Tensor, z_BD: Tensor, v_BD: Tensor, G_inv: hamiltonian.Map) -> tuple[Tensor, Tensor]:
        """Apply K generalised leapfrog steps: -> (B, D), (B, D)."""
        steps = partial(hamiltonian.generalised_leapfrog, inverse_metric=G_inv, n_fixed_point=self.n_fixed_point)
        return self.leapfrog(x, z_BD, v_BD, steps)

    @torch.no_grad()
    def sample_prior(self, n: int) -> Tensor:
        """Draw n codes from the density sqrt(det G^-1) around the centroids, (n, D)."""
        metric, step = self.current_metric(), _STEP_SIZE * self.temperature
        z = metric.c_MD[torch.randint(len(metric.c_MD), (n,), device=metric.c_MD.device)]
        for _ in range(_HMC_STEPS):
            z, _ = hamiltonian.hmc_step(z, lambda at: -half_log_det(metric.inverse(at)), step, _LEAPFROG_STEPS)
        return z.to(next(self.decoder.parameters()).dtype)
