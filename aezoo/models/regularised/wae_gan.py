"""WAE-GAN, Wasserstein autoencoder (Tolstikhin et al. 2018), https://arxiv.org/abs/1711.01558

    L = E[-log p(x | g(z))] - lam E[log D(z)]     z = f(x), or z ~ N(mu(x), diag sigma(x)^2)
    L_D = -E[log D(p)] - E[log(1 - D(z))]     p ~ p(z) = N(0, I), D = sigmoid(t)     (algorithm 1)

L is in nats per sample. The discriminator D is trained to distinguish codes from draws from the prior, and the encoder
is trained to produce codes that D classifies as draws from the prior. If both have the same distribution, the best D is
1/2 everywhere, L_D is 2 log 2 and -log D(z) is log 2.

Each loss trains only its own parameters, and all networks are updated in the same step. L is the value of `loss`,
-E[log D(z)] is the term `adversarial`, and L_D is the term `discriminator`. With likelihood gaussian, -log p is the
paper's squared error plus a constant.

Shapes: B batch, D code.
"""

from itertools import pairwise
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.nets.blocks.adversarial import (
    call_frozen,
    check_discriminator,
    discriminator_parameter_groups,
    gradient_only,
)
from aezoo.training.limits import check_at_least


class WAEGAN(NetworkAutoencoder, defaults={"likelihood": "gaussian"}, has_prior=True, tags=("generation",)):
    """Codes that a discriminator cannot distinguish from draws from a standard normal prior.

    Args:
        latent_dim: D, size of the code.
        adversarial_weight: lam, weight of the adversarial loss on the codes.
        gaussian_posterior: draw codes from N(mu(x), diag sigma(x)^2) in training, instead of z = f(x).
        discriminator_dims: widths of the discriminator's hidden layers, four of 512 in the paper.
        discriminator_lr: learning rate of the discriminator; 5e-4 in the authors' code for MNIST. All betas
            are 0.5 and 0.999 unless optimizer sets them.
        lr: learning rate of encoder and decoder.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        adversarial_weight: float = 10.0,
        gaussian_posterior: bool = False,
        discriminator_dims: tuple[int, ...] = (256, 256),
        discriminator_lr: float = 1e-4,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, adversarial_weight=adversarial_weight)
        check_discriminator(discriminator_dims, discriminator_lr)
        self.adversarial_weight = adversarial_weight
        self.gaussian_posterior = gaussian_posterior
        self.discriminator_lr = discriminator_lr
        self.code_shape = (latent_dim,)
        code_dim = 2 * latent_dim if gaussian_posterior else latent_dim
        self.encoder = self.build_encoder((code_dim,))
        self.decoder = self.build_decoder(self.code_shape)
        layers: list[nn.Module] = []
        dims = (latent_dim, *discriminator_dims)
        for n_in, n_out in pairwise(dims):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        self.discriminator = nn.Sequential(*layers, nn.Linear(dims[-1], 1))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return discriminator_parameter_groups(self, betas=(0.5, 0.999), for_all=True)  # as in the authors' code

    def encode(self, x: Tensor) -> Tensor:
        mu_BD: Tensor = self.encoder(x)[:, : self.code_shape[0]]
        return mu_BD

    def draw(self, x: Tensor) -> Tensor:
        """Return a code for each sample, drawn from the posterior if there is one, (B, *input_shape) -> (B, D)."""
        z_BD = at_least_float32(self.encoder(x))
        if not self.gaussian_posterior:
            return z_BD
        mu_BD, log_var_BD = z_BD.chunk(2, dim=1)
        return mu_BD + torch.exp(0.5 * log_var_BD.clamp(-30, 20)) * torch.randn_like(mu_BD)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = self.draw(x)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        # the discriminator is constant in the encoder's loss, and the codes are constant in the discriminator's loss
        t_z = at_least_float32(call_frozen(self.discriminator, z_BD.to(x.dtype)))
        adversarial = F.softplus(-t_z).mean()
        codes = torch.cat([torch.randn_like(z_BD), z_BD.detach()])
        t_prior, t_code = at_least_float32(self.discriminator(codes.to(x.dtype))).chunk(2)
        discriminator = F.softplus(-t_prior).mean() + F.softplus(t_code).mean()
        return {
            "loss": nll + self.adversarial_weight * adversarial + gradient_only(discriminator),
            "nll": nll,
            "adversarial": adversarial,
            "discriminator": discriminator,
        }

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        weight = next(self.decoder.parameters())
        return self.decode(torch.randn(n, *self.code_shape, device=weight.device, dtype=weight.dtype))
