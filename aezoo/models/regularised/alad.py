"""ALAD, adversarially learned anomaly detection (Zenati et al. 2018), https://arxiv.org/abs/1812.02288

    L = alpha (-log p(x | G(E(x)))) + L_xz + L_xx + L_zz     z ~ p(z) = N(0, I)
    L_xz = -log D_xz(G(z), z) - log(1 - D_xz(x, E(x)))
    L_xx = -log D_xx(x, G(E(x)))     L_zz = -log D_zz(z, E(G(z)))
    L_D = the same sum for discriminators that classify (x, E(x)), (x, x) and (z, z) as real and the others as fake

L, the value of `loss`, is in nats per sample; L_D is the term `discriminator`, which is 6 log 2 if real and fake pairs
cannot be distinguished. D_xz makes this a BiGAN; D_xx and D_zz enforce cycle consistency. alpha is 0 in the paper, with
reconstructions that resemble their samples less. E and G are trained by L, the discriminators by L_D; neither loss
passes a gradient to the parameters trained by the other.

The score is ||f(x, x) - f(x, G(E(x)))||_1, where f is the last hidden layer of D_xx. Features have mean 0 and
variance 1 in each sample, instead of the paper's spectral and batch normalisation; without normalisation, D_xx would
choose the scale of the score.

Shapes: B batch, D code, F features.
"""

import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.deprecated import renamed
from aezoo.nets.blocks.adversarial import (
    call_frozen,
    check_discriminator,
    discriminator_parameter_groups,
    gradient_only,
)
from aezoo.training.limits import check_at_least


class PairDiscriminator(nn.Module):
    """Features of each pair, with mean 0 and variance 1, and the log-odds that the pair is real: (B, F), (B, 1)."""

    def __init__(self, body: nn.Module, n_features: int, lift: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.lift = lift  # maps the second input to the shape of the first
        self.head = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(n_features, 1))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(torch.cat([a, self.lift(b)], 1))
        f_BF = F.layer_norm(features, features.shape[1:])
        return f_BF, at_least_float32(self.head(f_BF))


class ALAD(
    NetworkAutoencoder,
    hidden_dims={"mlp": (256,)},
    defaults={"activation": "leaky_relu", "likelihood": "gaussian"},
    has_prior=True,
    tags=("anomaly",),
):
    """A BiGAN with cycle consistency; the score compares discriminator features of sample and reconstruction.

    Args:
        latent_dim: D, size of the code.
        nll_weight: alpha, weight of the reconstruction; 0 in the paper.
        discriminator_dims: widths of the discriminators' hidden layers (mlp) or channels of their stages; the last one
            is the number of features. Empty: hidden_dims, or 64.
        discriminator_lr: learning rate of the discriminators. All betas are 0.5 and 0.999 unless optimizer sets them.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, ldm, vit, mixer, lstm or transformer, for all
            networks.
        lr: learning rate of encoder and decoder.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        nll_weight: float = 1.0,
        discriminator_dims: tuple[int, ...] = (),
        discriminator_lr: float = 1e-4,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, nll_weight=nll_weight)
        check_discriminator(discriminator_dims, discriminator_lr)
        self.nll_weight = nll_weight
        self.discriminator_lr = discriminator_lr
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)
        dims = tuple(discriminator_dims) or tuple(self.hidden_dims) or (64,)
        stages, twice = dims[:-1] if self.net == "mlp" else dims, (2 * self.input_shape[0], *self.input_shape[1:])
        lift = nn.Sequential(nn.Linear(latent_dim, math.prod(self.input_shape)), nn.Unflatten(1, self.input_shape))
        self.discriminator = nn.ModuleDict()
        for name, second in (("xz", lift), ("xx", nn.Identity()), ("zz", nn.Identity())):
            of_codes = ("mlp", (2 * latent_dim,), dims[-1:], dims[:-1])
            body = nets.encoder(*(of_codes if name == "zz" else (self.net, twice, dims[-1:], stages)), self.activation)
            self.discriminator[name] = PairDiscriminator(body, dims[-1], second)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return discriminator_parameter_groups(self, betas=(0.5, 0.999), for_all=True)  # as in the authors' code

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        e_BD = self.encode(x)
        params = self.decoder(e_BD)
        z_BD = torch.randn_like(at_least_float32(e_BD)).to(e_BD.dtype)
        generated = self.decode(z_BD).to(x.dtype)
        x_hat, z_hat_BD = self.likelihood.mean(params).to(x.dtype), self.encode(generated)
        pairs = {
            "xz": ((x, e_BD), (generated, z_BD)),
            "xx": ((x, x), (x, x_hat)),
            "zz": ((z_BD, z_BD), (z_BD, z_hat_BD)),
        }
        generator_losses, discriminator_losses = {}, []
        for name, (real, fake) in pairs.items():
            discriminator_of_pair = self.discriminator[name]
            generator_losses[name] = F.softplus(-call_frozen(discriminator_of_pair, *fake)[1]).mean()
            t_real, t_fake = discriminator_of_pair(
                *(torch.cat(side).detach() for side in zip(real, fake, strict=True))
            )[1].chunk(2)
            discriminator_losses.append(F.softplus(-t_real).mean() + F.softplus(t_fake).mean())
        adversarial = generator_losses["xz"] + F.softplus(call_frozen(self.discriminator["xz"], x, e_BD)[1]).mean()
        nll, discriminator = self.nll(params, x).mean(), torch.stack(discriminator_losses).sum()
        total = self.nll_weight * nll + adversarial + generator_losses["xx"] + generator_losses["zz"]
        return {
            "loss": total + gradient_only(discriminator),
            "nll": nll,
            "adversarial": adversarial,
            "cycle_x": generator_losses["xx"],
            "cycle_z": generator_losses["zz"],
            "discriminator": discriminator,
        }

    def score(self, x: Tensor) -> Tensor:
        """Return ||f(x, x) - f(x, G(E(x)))||_1, (B, *input_shape) -> (B,)."""
        discriminator = self.discriminator["xx"]
        difference_BF = discriminator(x, x)[0] - discriminator(x, self(x).to(x.dtype))[0]
        return at_least_float32(difference_BF).abs().sum(1)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        weight = next(self.decoder.parameters())
        return self.decode(torch.randn(n, *self.code_shape, device=weight.device, dtype=weight.dtype))


__getattr__ = renamed(__name__)
