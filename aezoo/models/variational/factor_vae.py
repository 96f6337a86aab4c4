"""FactorVAE (Kim & Mnih 2018), https://arxiv.org/abs/1802.05983

    L = E_q[-log p(x|z)] + KL(q(z|x) || p(z)) + gamma TC     TC = KL(q(z) || prod_i q(z_i))     (equation 2)
    TC ~ E_q(z)[log D(z) / (1 - D(z))] = E_q(z)[t(z)]        D(z) = sigmoid(t(z))               (equation 3)
    L_D = -1/2 E_q(z)[log D(z)] - 1/2 E_prod[log(1 - D(z'))]

in nats per sample. The discriminator D distinguishes the codes z of a batch from z', the same codes with each dimension
permuted separately over the batch. The z' are samples from the product of the marginals (algorithm 1). For the optimal
D, t is the log ratio of the two densities, and L_D is log 2 if they are equal. gamma = 0 is the VAE.

Each of the two losses trains only its own parameters. Both are minimised together on the same batch, as in
https://github.com/google-research/disentanglement_lib; in algorithm 2, z' comes from a second batch. L is the value of
`loss`; L_D is the term `discriminator`.

Shapes: B batch on this rank, N samples on all ranks, D code.
"""

from itertools import pairwise
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import LatentArgs
from aezoo.models.variational.vae import VAE
from aezoo.nets.blocks.adversarial import (
    call_frozen,
    check_discriminator,
    discriminator_parameter_groups,
    gradient_only,
)
from aezoo.training.limits import check_at_least


class FactorVAE(VAE, tags=("disentanglement",)):
    """A VAE whose aggregate posterior is trained to have independent dimensions.

    Args:
        gamma: weight of the total correlation; usually 6 to 40.
        discriminator_dims: widths of the discriminator's hidden layers, six of 1000 in the paper.
        discriminator_lr: learning rate of the discriminator, whose betas are 0.5 and 0.9 unless optimizer sets them.
        lr: learning rate of encoder and decoder.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        gamma: float = 10.0,
        discriminator_dims: tuple[int, ...] = (256, 256),
        discriminator_lr: float = 1e-4,
        **kwargs: Unpack[LatentArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, gamma=gamma)
        check_discriminator(discriminator_dims, discriminator_lr)
        self.gamma = gamma
        self.discriminator_lr = discriminator_lr
        layers: list[nn.Module] = []
        dims = (self.latent_dim, *discriminator_dims)
        for n_in, n_out in pairwise(dims):
            layers += [nn.Linear(n_in, n_out), nn.LeakyReLU(0.2)]  # appendix A
        self.discriminator = nn.Sequential(*layers, nn.Linear(dims[-1], 1))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return discriminator_parameter_groups(self, betas=(0.5, 0.9))  # appendix A

    def permute_dims(self, z_BD: Tensor) -> Tensor:
        """Return this rank's codes after permuting each dimension separately over all ranks (algorithm 1)."""
        z_ND, keys_ND = self.all_gather_batch(z_BD), self.all_gather_batch(torch.rand_like(z_BD))
        return z_ND.gather(0, keys_ND.argsort(0))[self.local_rows(z_BD)]

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        # the VAE's step treats the discriminator as constant, and the discriminator's step treats the codes as
        # constant
        tc = at_least_float32(call_frozen(self.discriminator, z_BD.to(x.dtype))).mean()
        codes = torch.cat([z_BD.detach(), self.permute_dims(z_BD.detach())])
        t_joint, t_product = at_least_float32(self.discriminator(codes.to(x.dtype))).chunk(2)
        discriminator = 0.5 * (F.softplus(-t_joint).mean() + F.softplus(t_product).mean())
        elbo_loss = nll + self.beta * (kl - self.capacity).abs()  # 1 and 0 unless BetaAnnealing changes them
        return {
            "loss": elbo_loss + self.gamma * tc + gradient_only(discriminator),
            "nll": nll,
            "kl": kl,
            "elbo": -(nll + kl),
            "tc": tc,
            "discriminator": discriminator,
        }
