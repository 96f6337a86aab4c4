"""MINE-VAE, a VAE with a neural estimate of mutual information (Belghazi et al. 2018), https://arxiv.org/abs/1801.04062

    L = E_q[-log p(x|z)] + beta |KL(q(z|x) || p(z)) - C| - mi_weight I(x; z)
    I(x; z) >= E_q(x,z)[T(x, z)] - log E_q(x)q(z)[exp T(x, z)]     (Donsker & Varadhan, equations 10 and 11)

in nats per sample. The statistics network T maximises the bound, which is tight if T is log q(z|x) / q(z) plus a
constant. Since KL = I + KL(q(z) || p(z)), mi_weight = beta leaves only the second term, and a larger weight rewards
codes with more information about their samples (InfoMax VAE, Rezaabad & Vishwanath 2020,
https://arxiv.org/abs/1912.13361). mi_weight = 0 is the beta-VAE with an estimate of the mutual information.

Pairs from q(x) q(z) combine each sample with the code of the next sample in the batch of all ranks, and the last sample
with the code of the first. In a random batch these are independent; a random permutation would leave some samples with
their codes. The gradient of the logarithm is the gradient of exp(T) divided by the moving average M of its mean,
instead of by the mean over the batch, whose error biases it (section 3.2). T is named `discriminator` because it
distinguishes the two kinds of pairs.

Shapes: B batch on this rank, N samples on all ranks, D code, X data dimensions.
"""

import math
from itertools import pairwise
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.errors import AezooError
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.nets.blocks.adversarial import check_discriminator, discriminator_parameter_groups, gradient_only
from aezoo.training.limits import check_at_least


class MineVAE(VAE, tags=("representation",)):
    """A VAE that maximises an estimate of the mutual information between samples and codes.

    Args:
        mi_weight: weight of the mutual information; from beta on, information in the code has no cost except the
            distance from the prior.
        decay: decay of the moving average M, below 1; 0 uses only the batch mean, which gives the gradient of the
            bound.
        discriminator_dims: widths of the hidden layers of the statistics network T.
        discriminator_lr: learning rate of T.
        lr: learning rate of encoder and decoder.
        **kwargs: see `VAE`.
    """

    log_average: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        mi_weight: float = 0.5,
        decay: float = 0.99,
        discriminator_dims: tuple[int, ...] = (256, 256),
        discriminator_lr: float = 1e-3,
        **kwargs: Unpack[VAEArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, mi_weight=mi_weight)
        if not 0 <= decay < 1:
            raise AezooError(f"decay must be at least 0 and below 1, got {decay}")
        check_discriminator(discriminator_dims, discriminator_lr)
        self.mi_weight = mi_weight
        self.decay = decay
        self.discriminator_lr = discriminator_lr
        layers: list[nn.Module] = []
        dims = (math.prod(self.input_shape) + self.latent_dim, *discriminator_dims)
        for n_in, n_out in pairwise(dims):
            layers += [nn.Linear(n_in, n_out), nn.ELU()]
        self.discriminator = nn.Sequential(*layers, nn.Linear(dims[-1], 1))
        self.register_buffer("log_average", torch.zeros(()))  # log M; M is 1 where T is 0

    def parameter_groups(self) -> list[dict[str, Any]]:
        return discriminator_parameter_groups(self, betas=(0.9, 0.999))

    def mutual_information(self, x_BX: Tensor, z_BD: Tensor) -> Tensor:
        """The bound on I(x; z), with the gradient of E[T] - E[exp T] / M: (B, X), (B, D) -> ()."""
        other_BD = self.all_gather_batch(z_BD).roll(-1, 0)[self.local_rows(z_BD)]
        pairs = torch.cat([torch.cat([x_BX, x_BX]), torch.cat([z_BD, other_BD]).to(x_BX.dtype)], dim=1)
        t_joint_B, t_product_B = at_least_float32(self.discriminator(pairs))[:, 0].chunk(2)
        t_B = t_product_B.detach()
        peak = self.all_gather_batch(t_B.amax(0, keepdim=True)).amax()
        from_peak = self.batch_mean(torch.expm1(t_B - peak)).log1p()  # avoids rounding errors in a small bound
        log_mean = log_average = peak + from_peak
        if self.training and self.decay:
            # since M includes this batch, no exp(T) / M exceeds N / (1 - decay)
            old, new = self.log_average + math.log(self.decay), log_mean + math.log1p(-self.decay)
            log_average = torch.logaddexp(old.to(new), new)
            self.log_average.copy_(log_average)
        value = (t_joint_B - peak).mean() - from_peak
        return value - gradient_only(torch.exp(t_product_B - log_average).mean())

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        # T maximises the bound, and the encoder mi_weight times the bound, in one pass: this is z with its gradient
        # scaled
        weighted_BD = z_BD.detach() + self.mi_weight * gradient_only(z_BD)
        mi = self.mutual_information(x.flatten(1), weighted_BD)
        elbo_loss = nll + self.beta * (kl - self.capacity).abs()
        return {
            "loss": elbo_loss - self.mi_weight * mi.detach() - gradient_only(mi),
            "nll": nll,
            "kl": kl,
            "elbo": -(nll + kl),
            "mi": mi.detach(),
        }
