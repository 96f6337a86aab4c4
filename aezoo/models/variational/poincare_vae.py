"""Poincare VAE (Mathieu et al. 2019), https://arxiv.org/abs/1901.06033

Codes are in hyperbolic space, the ball |z| < 1 / sqrt(c) of curvature -c. Its volume grows with the radius like the
number of a tree's leaves with the tree's depth. In nats per sample, with densities in Riemannian volume:

    L = E_q[-log p(x|z)] + beta E_q[log q(z|x) - log p(z)]     q(z|x) = N_W(mu(x), diag sigma(x)^2)     p(z) = N_W(0, I)
    z ~ N_W(mu, Sigma):   z = exp_mu(v / lambda_mu),   v ~ N(0, Sigma)     lambda_mu = 2 / (1 - c |mu|^2)
    log N_W(z) = log N(v; 0, Sigma) - (D - 1) log(sinh(s) / s)     s = sqrt(c) |v|,   v = lambda_mu log_mu(z)
    exp_mu(v / lambda_mu) = mu + tanh(s / 2) v / s in Moebius addition

The encoder returns mu as 2 log_0(mu), and the decoder's input is 2 log_0(z) instead of the paper's gyroplanes: both are
normal coordinates at the origin, in which c -> 0 is the VAE. float32 is not precise enough near the boundary, so
float64 is used for all of this, and codes are kept 4 roundings inside the boundary. The KL is evaluated at the sample,
as in the paper.

Shapes: B batch, D code, K importance samples.
"""

import math
from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.manifolds.poincare import Ball
from aezoo.models.variational.vae import VAE, VAEArgs

_MOST_CURVED = 1e6


class PoincareVAE(VAE, normal_prior=False, tags=("representation", "generation")):
    """Codes that are points of the Poincare ball, with wrapped normals as posterior and prior.

    Args:
        curvature: c; the space has curvature -c and the ball has radius 1 / sqrt(c); near 0 this is the VAE.
        **kwargs: see `VAE`.
    """

    decoder: nn.Sequential

    def __init__(self, input_shape: tuple[int, ...], *, curvature: float = 1.0, **kwargs: Unpack[VAEArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        del self.capacity  # the sampled KL may be negative, so its distance from a capacity would be meaningless
        if not 1 / _MOST_CURVED <= curvature <= _MOST_CURVED:
            raise AezooError(f"curvature must be from 1e-6 to 1e6, got {curvature}: near 0 take vae")
        self.ball = Ball(float(curvature))
        self.code_radius = 1 / math.sqrt(curvature)
        self.decoder = nn.Sequential(self.ball, self.build_decoder(self.code_shape))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean as 2 log_0(mu), and the log-variance of v: (B, *input_shape) -> (B, D), (B, D)."""
        return super().posterior(x)

    def encode(self, x: Tensor) -> Tensor:
        return self.ball.from_normal(self.posterior(x)[0], x.dtype)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mean_BD, log_var_BD = (part.double() for part in self.posterior(x))
        z_BD, v_BD = self.draw(mean_BD, log_var_BD)
        at_0_BD = self.ball(z_BD)
        nll_B = self.nll(self.decoder[1](at_0_BD.to(x.dtype)), x)
        kl_B = self.ball.log_density(v_BD, log_var_BD) - self.ball.log_density(at_0_BD, torch.zeros_like(at_0_BD))
        nll, kl = nll_B.mean(), kl_B.to(nll_B.dtype).mean()
        return {"loss": nll + self.beta * kl, "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def draw(self, mean_BD: Tensor, log_var_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Draw z ~ q(z|x), and return z and v: (..., D), (..., D) -> (..., D), (..., D)."""
        v_BD = torch.exp(0.5 * log_var_BD) * torch.randn_like(mean_BD)
        return self.ball.exp(self.ball.from_normal(mean_BD), v_BD), v_BD

    def kl(self, mean_BD: Tensor, log_var_BD: Tensor) -> Tensor:  # type: ignore[override]
        """KL(q(z|x) || p(z)) in nats without noise, for scores: (B, D), (B, D) -> (B,).

        The 2 D points +-sqrt(D) sigma_d on the axes replace the draw of v in `loss` (cubature of degree 3, Arasaratnam
        & Haykin 2009, https://doi.org/10.1109/TAC.2009.2019800). It is exact for q = p, and for all q as c -> 0.
        """
        d = mean_BD.shape[1]
        points_PD = math.sqrt(d) * torch.cat([torch.eye(d), -torch.eye(d)]).to(mean_BD.device, torch.float64)
        rows = max(1, 2**20 // (2 * d * d))
        found = []
        for mean, log_var in zip(mean_BD.double().split(rows), log_var_BD.double().split(rows), strict=True):
            v_PBD = points_PD[:, None] * torch.exp(0.5 * log_var)
            z_PBD = self.ball.exp(self.ball.from_normal(mean), v_PBD)
            found.append((self.ball.log_density(v_PBD, log_var) - self.log_prior(z_PBD)).mean(0))
        return torch.cat(found).to(mean_BD.dtype)

    @torch.no_grad()
    def score(self, x: Tensor) -> Tensor:
        """Return -log p(x | mu) + KL in nats, both without noise: (B, *input_shape) -> (B,)."""
        mean_BD, log_var_BD = self.posterior(x)
        return self.nll(self.decoder[1](mean_BD.to(x.dtype)), x) + self.kl(mean_BD, log_var_BD)

    def log_prior(self, z: Tensor) -> Tensor:
        """The density log p(z) in Riemannian volume, in nats: (..., D) -> (...)."""
        at_0 = self.ball(z).double()
        return self.ball.log_density(at_0, torch.zeros_like(at_0)).to(z.dtype)

    def sample_prior(self, n: int) -> Tensor:
        return self.ball.from_normal(super().sample_prior(n))

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        mean_BD, log_var_BD = self.posterior(x)
        z_KBD, v_KBD = self.draw(mean_BD.double().expand(n, *mean_BD.shape), log_var_BD.double())
        log_q_KB = self.ball.log_density(v_KBD, log_var_BD.double()).to(mean_BD.dtype)
        return self.ball.project(z_KBD, self.ball.limit(mean_BD.dtype)).to(mean_BD.dtype), log_q_KB
