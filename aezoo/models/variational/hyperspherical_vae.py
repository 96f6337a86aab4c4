"""Hyperspherical VAE (Davidson et al. 2018), https://arxiv.org/abs/1804.00891

Codes are unit vectors, and the prior is uniform on the sphere, so that no code is favoured; in nats per sample:

    L = E_q[-log p(x|z)] + beta KL(q(z|x) || U(S^(D-1)))
    q(z|x) = exp(kappa h(theta)) / (Z |S^(D-2)|)     theta the angle between z and mu(x), kappa(x) the concentration
    h = log((1 + cos theta) / 2)   power_spherical   De Cao & Aziz 2020, https://arxiv.org/abs/2006.04437
    h = cos theta - 1              vmf               von Mises-Fisher, the paper's
    KL = kappa E_q[h] - log Z + log Z_0     Z = integral of exp(kappa h) sin(theta)^(D-2) over theta     Z_0: kappa = 0

A draw is the quantile of theta at uniform noise, reflected to lie about mu. Its gradient in kappa is therefore exact
for both families: see `manifolds.sphere`, which also computes E_q[h] and Z.

power_spherical has density 0 opposite mu, so the variance of importance weights may not exist: use vmf to report
log p(x).

Shapes: B batch, D code, K importance samples.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.manifolds.sphere import FAMILIES
from aezoo.models.variational.vae import VAE


class HypersphericalVAE(VAE):
    """Unit vectors as codes with a uniform prior.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, length of a code, at least 2; the paper found gains over the VAE up to about 10, not at 40.
        posterior: the family of q(z|x): power_spherical or vmf.
        beta: weight of the KL term.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, vit, mixer, lstm or transformer.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    normal_prior = False

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 5,
        posterior: str = "power_spherical",
        beta: float = 1.0,
        net: str = "mlp",
        hidden_dims: tuple[int, ...] = (400,),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            input_shape,
            latent_dim=latent_dim,
            beta=beta,
            net=net,
            hidden_dims=hidden_dims,
            activation=activation,
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()
        if latent_dim < 2:
            raise AezooError(f"latent_dim must be at least 2, the plane that a circle lies in, got {latent_dim}")
        if posterior not in FAMILIES:
            raise AezooError(f"unknown posterior {posterior!r}: take one of {', '.join(FAMILIES)}")
        self.family = FAMILIES[posterior](latent_dim)
        self.encoder = nets.encoder(net, self.input_shape, (latent_dim + 1,), hidden_dims, activation)

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean direction of q(z|x), and its concentration repeated D times: (B, *input_shape) -> (B, D), (B, D)."""
        out_BE = at_least_float32(self.encoder(x))
        # in units of D, so that draws tend towards mu from the start in any dimension
        kappa_B1 = self.code_shape[0] * F.softplus(out_BE[:, -1:])
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
        kappa_B = kappa_BD[:, 0].double()  # differences of large logarithms
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
