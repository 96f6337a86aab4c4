"""Hyperspherical VAE (Davidson et al. 2018), https://arxiv.org/abs/1804.00891

Codes are unit vectors, and the prior is uniform on the sphere, so that no direction is preferred; in nats per sample:

    L = E_q[-log p(x|z)] + beta KL(q(z|x) || U(S^(D-1)))
    q(z|x) = exp(kappa h(theta)) / (Z |S^(D-2)|)     theta the angle between z and mu(x), kappa(x) the concentration
    h = log((1 + cos theta) / 2)   power_spherical   De Cao & Aziz 2020, https://arxiv.org/abs/2006.04437
    h = cos theta - 1              vmf               von Mises-Fisher, the paper's
    KL = kappa E_q[h] - log Z + log Z_0     Z = integral of exp(kappa h) sin(theta)^(D-2) over theta     Z_0: kappa = 0

A sample is the quantile of theta at uniform noise, reflected so that it is centred at mu. Its gradient in kappa is
therefore exact for both families: see `manifolds.sphere`, which also computes E_q[h] and Z.

kappa = D softplus(a) + 1, where a is an output of the encoder that starts near 8, so that samples are close to mu from
the start in any dimension. Without the 1, kappa can fall to 0 before the decoder has learned to use z. Then z does not
depend on mu, and no gradient increases kappa again. The authors' code (https://github.com/nicola-decao/s-vae-pytorch)
has softplus(a) + 1, where a starts near 0. With vmf and D = 5 (1,000 steps, means of three seeds; `python -m
benchmarks.deviations`) the ELBO on 8x8 digits is -24.4 nats here, -24.5 with the authors' kappa and -27.0 with D
softplus(a) without the 1, whose KL falls to 0.0001 nats; on mnist5k it is -144.5, -145.7 and -145.0. Weights that were
trained with D softplus(a) continue to use it.

power_spherical has density 0 opposite mu, so the variance of importance weights may not exist: use vmf to report
log p(x).

Shapes: B batch, D code, K importance samples.
"""

from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.manifolds.sphere import FAMILIES
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.training.limits import check_above

START = 8.0


def _without_least_kappa(_: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Read weights that were trained when kappa was D softplus(a)."""
    state_dict.setdefault(f"{prefix}least_kappa", torch.zeros(()))


class HypersphericalVAE(VAE, defaults={"latent_dim": 5}, normal_prior=False, tags=("representation", "generation")):
    """Codes that are unit vectors, with a uniform prior.

    Args:
        latent_dim: D, length of a code, at least 2; the paper reports gains over the VAE up to about 10, but not at 40.
        posterior: the family of q(z|x): power_spherical or vmf.
        kappa_scale: factor of the softplus in kappa: None for D, or 1 as in the authors' code.
        **kwargs: see `VAE`.
    """

    least_kappa: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        posterior: str = "power_spherical",
        kappa_scale: float | None = None,
        **kwargs: Unpack[VAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if self.latent_dim < 2:
            raise AezooError(f"latent_dim must be at least 2, got {self.latent_dim}")
        if posterior not in FAMILIES:
            raise AezooError(f"unknown posterior {posterior!r}: choose from {', '.join(FAMILIES)}")
        self.kappa_scale = float(self.latent_dim) if kappa_scale is None else kappa_scale
        check_above(0, kappa_scale=self.kappa_scale)
        self.family = FAMILIES[posterior](self.latent_dim)
        self.encoder = self.build_encoder((self.latent_dim + 1,))
        with torch.no_grad():
            [*self.encoder.parameters()][-1][-1] += START  # the bias of a
        self.register_buffer("least_kappa", torch.ones(()))
        self.register_load_state_dict_pre_hook(_without_least_kappa)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean direction of q(z|x), and its concentration repeated D times: (B, *input_shape) -> (B, D), (B, D)."""
        out_BE = at_least_float32(self.encoder(x))
        kappa_B1 = self.least_kappa + self.kappa_scale * F.softplus(out_BE[:, -1:])
        mu_BD = F.normalize(out_BE[:, :-1], dim=1)
        return mu_BD, kappa_B1.clamp(1e-6, 1e6).expand_as(mu_BD)

    def decode(self, z: Tensor) -> Tensor:
        return super().decode(F.normalize(z, dim=1))  # a code off the sphere represents its direction

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, kappa_BD = self.posterior(x)
        z_BD = self.family.sample(mu_BD, kappa_BD[:, 0])
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, kappa_BD))
        return {"loss": nll + self.beta * (kl - self.capacity).abs(), "nll": nll, "kl": kl, "elbo": -(nll + kl)}

    def kl(self, mu_BD: Tensor, kappa_BD: Tensor) -> Tensor:  # type: ignore[override]
        """KL(q(z|x) || U) in nats: (B, D), (B, D) -> (B,)."""
        kappa_B = kappa_BD[:, 0].double()  # in float64, because of differences of large logarithms
        log_z_B, mean_h_B = self.family.normaliser(kappa_B)
        return (kappa_B * mean_h_B - log_z_B + self.family.log_z_0).to(mu_BD.dtype)

    def log_prior(self, z: Tensor) -> Tensor:
        return torch.full_like(z[..., 0], -self.family.log_area)

    def sample_prior(self, n: int) -> Tensor:
        return F.normalize(super().sample_prior(n), dim=1)

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        mu_BD, kappa_BD = self.posterior(x)
        z_KBD = self.family.sample(mu_BD.expand(n, *mu_BD.shape), kappa_BD[:, 0].expand(n, len(mu_BD)))
        return z_KBD, self.family.log_prob(z_KBD, mu_BD, kappa_BD[:, 0])
