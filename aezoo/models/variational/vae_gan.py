"""VAE-GAN (Larsen et al. 2015), https://arxiv.org/abs/1512.09300

The reconstruction error is computed on Dis_l, the last hidden layer of a discriminator; in nats per sample:

    L = L_prior + L_llike + L_GAN     each player minimises some of the terms
    L_prior = KL(q(z|x) || p(z))     L_llike = E_q[-log p(Dis_l(x)|z)]     p(Dis_l(x)|z) = N(Dis_l(x~), s^2 I)
    L_GAN = -log Dis(x) - log(1 - Dis(x~)) - log(1 - Dis(x_p))
    x~ = Dec(z), z ~ q(z|x)     x_p = Dec(z_p), z_p ~ p(z)

Each of the three players minimises its own loss (algorithm 1, whose updates are meant for this sign of L_GAN):

    encoder: L_prior + L_llike     decoder: gamma L_llike - L_GAN     discriminator: L_GAN

No loss passes a gradient to another player's parameters, as in https://github.com/andersbll/autoencoding_beyond_pixels.
In that code s = 1, and batch normalisation keeps the features at variance 1. Here s^2 is the variance of the features
over all images that the discriminator receives, a constant for every player, and no layer compares samples with each
other. L_GAN is 3 log 2 if the three kinds of images cannot be distinguished.

The value of `loss` is the encoder's loss. The term `feature_nll` is L_llike without the density's constant, and
`discriminator` is L_GAN. `nll`, `elbo`, `score` and `log_likelihood` are those of the VAE for the data themselves: they
train nothing except the scale of a likelihood that learns one.

Shapes: B batch, D code, F features.
"""

import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import LatentArgs
from aezoo.models.variational.vae import VAE
from aezoo.nets.blocks.adversarial import Generator, call_frozen, check_discriminator, gradient_only
from aezoo.training import optimizers
from aezoo.training.limits import check_at_least


class VAEGAN(VAE, tags=("generation",)):
    """A VAE that reconstructs the features of a discriminator, and a GAN whose generator is the VAE's decoder.

    Args:
        gamma: weight of the reconstruction relative to the GAN in the decoder's loss.
        discriminator_dims: widths of the discriminator's hidden layers (mlp) or channels of its stages; with fewer
            features than values in a sample, they do not determine a reconstruction. Empty: 1024 for mlp, else
            hidden_dims.
        discriminator_lr: learning rate of the discriminator, whose betas are 0.5 and 0.9 unless optimizer sets them.
        net: mlp, conv or resnet, for encoder, decoder and discriminator.
        lr: learning rate of encoder and decoder.
        **kwargs: see `VAE`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        gamma: float = 0.1,
        discriminator_dims: tuple[int, ...] = (),
        discriminator_lr: float = 1e-4,
        **kwargs: Unpack[LatentArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(0, gamma=gamma)
        check_discriminator(discriminator_dims, discriminator_lr)
        self.gamma = gamma
        self.discriminator_lr = discriminator_lr
        dims = tuple(discriminator_dims) or ((1024,) if self.net == "mlp" else tuple(self.hidden_dims) or (64,))
        shape = dims[-1:] if self.net == "mlp" else nets.map_shape(self.net, self.input_shape, dims, dims[-1])
        stages = dims[:-1] if self.net == "mlp" else dims
        features = nets.encoder(self.net, self.input_shape, shape, stages, self.activation)
        head = nn.Sequential(nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(math.prod(shape), 1))
        # in a tuple, so that its parameters are not registered twice
        self._generator = (Generator(self.decoder, self.likelihood),)
        self.discriminator = nn.ModuleDict({"features": features, "head": head})

    def parameter_groups(self) -> list[dict[str, Any]]:
        betas = optimizers.betas(self.optimizer, (0.5, 0.9))
        discriminator = [*self.discriminator.parameters()]
        discriminator_group = {"params": discriminator, "lr": self.discriminator_lr, "betas": betas}
        decoder = [*self.decoder.parameters(), *self.likelihood.parameters()]
        return [{"params": [*self.encoder.parameters()]}, {"params": decoder}, discriminator_group]

    def variance(self, f_BF: Tensor) -> Tensor:
        """s^2, the variance of the features over real, reconstructed and drawn images of all ranks: (3 B, F) -> ()."""
        f_B3F = f_BF.unflatten(0, (3, -1)).transpose(0, 1)
        centred_B3F = f_B3F - self.batch_mean(f_B3F.mean(1))
        # features that are all equal have no variance
        return self.batch_mean((centred_B3F**2).mean((1, 2))).clamp(min=1e-12)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        features, head = self.discriminator.values()
        mu_BD, log_var_BD = self.posterior(x)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        z_p_BD = torch.randn_like(z_BD)
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))

        # each player gets a gradient only for its parameters; everything else is constant
        x_encoder = call_frozen(self._generator[0], z_BD.to(x.dtype))
        params = self.decoder(torch.cat([z_BD.detach(), z_p_BD]).to(x.dtype))
        x_decoder = self.likelihood.mean(params)

        # for the discriminator's step
        f = features(torch.cat([x, x_decoder.detach()]))
        t_real, t_tilde, t_p = at_least_float32(head(f)).chunk(3)
        discriminator = F.softplus(-t_real).mean() + F.softplus(t_tilde).mean() + F.softplus(t_p).mean()
        f_BF = at_least_float32(f.detach()).flatten(1)
        s2, f_real_BF = self.variance(f_BF), f_BF[: len(x)]

        # for the steps of encoder and decoder
        f = call_frozen(features, torch.cat([x_encoder, x_decoder]))
        f_tilde_BF = at_least_float32(f).flatten(1).chunk(3)[:2]
        feature_nll, decoder_nll = (((f_BF - f_real_BF) ** 2).sum(1).mean() / (2 * s2) for f_BF in f_tilde_BF)
        t_tilde, t_p = at_least_float32(call_frozen(head, f[len(x) :])).chunk(2)
        gan = F.softplus(t_tilde).mean() + F.softplus(t_p).mean()

        nll = self.nll(params[: len(x)].detach(), x).mean()
        others = self.gamma * decoder_nll - gan + discriminator + nll
        loss = feature_nll + self.beta * (kl - self.capacity).abs() + gradient_only(others)
        terms = {"loss": loss, "nll": nll, "kl": kl, "elbo": -(nll + kl)}
        return terms | {"feature_nll": feature_nll, "discriminator": discriminator}
