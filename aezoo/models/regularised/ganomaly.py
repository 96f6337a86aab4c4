"""GANomaly (Akcay et al. 2018), https://arxiv.org/abs/1805.06725

    L_G = -log p(x | xhat) + w_adv X ||f(x) - f(xhat)||^2 / F + w_enc X ||z - zhat||^2 / D
    z = G_E(x)     xhat = G_D(z)     zhat = E(xhat)
    L_D = -log D(x) - log(1 - D(xhat))              f the last hidden layer of D

L_G is in nats per sample. With the Laplace likelihood, -log p is ||x - xhat||_1 plus a constant. The authors' code uses
means over values instead of norms, with weights 50, 1, 1. L_G is X / 50 times their loss, so w_adv = w_enc = 1/50
corresponds to their weights. The F features of f are normalised to mean 0 and variance 1, instead of by batch
normalisation; without normalisation, the discriminator would choose the scale of the second term.

L_G trains the generator (G_E, G_D and E), and L_D trains the discriminator D; neither loss passes a gradient to the
parameters trained by the other. L_G is the value of `loss`, and L_D is the term `discriminator`, which is 2 log 2 if x
and xhat cannot be distinguished.

The score is ||z - zhat||^2 / D of each sample, as in the authors' code (the paper uses the 1-norm). The authors also
scale it to [0, 1] by the extremes of a test set; it would then depend on the other samples, and a threshold would not
be valid for new samples. On industrial photographs, frozen features detect anomalies much better, see `aezoo detect
--features`.

Shapes: B batch, X data dimensions, D code, F features.
"""

import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import at_least_float32
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.nets.blocks.adversarial import (
    call_frozen,
    check_discriminator,
    discriminator_parameter_groups,
    gradient_only,
)
from aezoo.training.limits import check_at_least


class Discriminator(nn.Module):
    """Features of each sample, with mean 0 and variance 1, and the log-odds that it is real: (B, F), (B, 1)."""

    def __init__(self, body: nn.Module, n_features: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(nn.LeakyReLU(0.2), nn.Linear(n_features, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(x)
        f_BF = F.layer_norm(found, found.shape[1:])
        return f_BF, at_least_float32(self.head(f_BF))


class GANomaly(
    NetworkAutoencoder,
    hidden_dims={"mlp": (256,)},
    defaults={"activation": "leaky_relu", "likelihood": "laplace"},
    tags=("anomaly",),
):
    """An autoencoder with a second encoder; samples whose code it cannot recover are anomalous.

    Args:
        latent_dim: D, size of the code.
        adv_weight: weight of the discriminator's features.
        enc_weight: weight of the distance between codes.
        discriminator_dims: widths of the discriminator's hidden layers (mlp) or channels of its stages; the last one is
            the number of its features. Empty: hidden_dims, or 64.
        discriminator_lr: learning rate of the discriminator. All betas are 0.5 and 0.999 unless optimizer sets them.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, ldm, vit, mixer, lstm or transformer, of all
            networks.
        lr: learning rate of the generator.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        adv_weight: float = 0.02,
        enc_weight: float = 0.02,
        discriminator_dims: tuple[int, ...] = (),
        discriminator_lr: float = 1e-4,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(0, adv_weight=adv_weight, enc_weight=enc_weight)
        check_discriminator(discriminator_dims, discriminator_lr)
        self.adv_weight = adv_weight
        self.enc_weight = enc_weight
        self.discriminator_lr = discriminator_lr
        self.code_shape = (latent_dim,)
        self.encoder, self.second_encoder = (self.build_encoder(self.code_shape) for _ in range(2))
        self.decoder = self.build_decoder(self.code_shape)
        dims = tuple(discriminator_dims) or tuple(self.hidden_dims) or (64,)
        stages = dims[:-1] if self.net == "mlp" else dims
        body = nets.encoder(self.net, self.input_shape, dims[-1:], stages, self.activation)
        self.discriminator = Discriminator(body, dims[-1])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return discriminator_parameter_groups(self, betas=(0.5, 0.999), for_all=True)  # section 4

    def latent_distance(self, z_BD: Tensor, x_hat: Tensor) -> Tensor:
        """Return ||z - zhat||^2, (B, D), (B, *shape) -> (B,)."""
        return at_least_float32(z_BD - self.second_encoder(x_hat)).square().sum(1)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BD = self.encode(x)
        params = self.decoder(z_BD)
        x_hat = self.likelihood.mean(params).to(x.dtype)

        # for the discriminator's step
        both, t = self.discriminator(torch.cat([x, x_hat.detach()]))
        t_real, t_fake = t.chunk(2)
        discriminator = F.softplus(-t_real).mean() + F.softplus(t_fake).mean()

        # for the generator's step, which treats the discriminator as a constant
        f_hat_BF, _ = call_frozen(self.discriminator, x_hat)
        f_BF = both[: len(x)].detach()
        nll = self.nll(params, x).mean()
        x_dim = math.prod(self.input_shape)
        adversarial = x_dim * at_least_float32(f_BF - f_hat_BF).square().mean()
        encoding = x_dim * self.latent_distance(z_BD, x_hat).mean() / self.code_shape[0]
        generator = nll + self.adv_weight * adversarial + self.enc_weight * encoding
        return {
            "loss": generator + gradient_only(discriminator),
            "nll": nll,
            "adversarial": adversarial,
            "encoding": encoding,
            "discriminator": discriminator,
        }

    def score(self, x: Tensor) -> Tensor:
        """Return ||z - zhat||^2 / D, (B, *input_shape) -> (B,)."""
        z_BD = self.encode(x)
        return self.latent_distance(z_BD, self.decode(z_BD).to(x.dtype)) / self.code_shape[0]
