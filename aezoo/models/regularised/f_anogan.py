"""f-AnoGAN, fast unsupervised anomaly detection (Schlegl et al. 2019), https://doi.org/10.1016/j.media.2019.01.010

A Wasserstein GAN learns to generate samples, and an encoder learns to recover the code of a sample (izi_f of the
paper):

    L_E = -log p(x | xhat) + kappa X ||f(x) - f(xhat)||^2 / F     xhat = G(E(x)), f the input of D's last layer
    L_G = -E[D(G(z))] + alpha L_E     z ~ p(z) = N(0, I)
    L_D = E[D(G(z))] - E[D(x)] + lam E[(||dD(m)/dm|| - 1)^2]     m = a x + (1 - a) G(z), a ~ U[0, 1] for each sample

L_E, in nats, is the value of `loss` and, for one sample, the score. Squared errors are sums over the X values of a
sample; the squared error of the F features is a mean times X. With the Gaussian of variance 1/2, L_E is X times the
paper's loss, which uses means for both, plus a constant. Each loss trains only one network. L_G and L_D, in units of D,
contribute only their gradients to `loss`.

In the paper, alpha is 0, and E is trained after G and D; D is updated five times per step of G. Here, all networks are
updated in the same step, D with a higher learning rate. For alpha = 0, E does not affect G and D, whose weights are
equal to those of a GAN without E. E follows G, which converges as the learning rate decreases, and reconstructions
resemble samples less. The authors' encoder, https://github.com/tSchlegl/f-AnoGAN, ends in tanh, so that its codes lie
in [-1, 1]^D; here they are unbounded.

Shapes: B batch, D code, F features.
"""

import math
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp

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


class Critic(nn.Module):
    """Features of each sample and an unbounded score that is higher for real samples, (B, F), (B,)."""

    def __init__(self, body: nn.Module, n_features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(body, nn.LeakyReLU(0.2))
        self.head = nn.Linear(n_features, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f_BF = self.body(x)
        return f_BF, at_least_float32(self.head(f_BF)).squeeze(1)


class FAnoGAN(
    NetworkAutoencoder,
    hidden_dims={"mlp": (256,)},
    defaults={"activation": "leaky_relu", "likelihood": "gaussian"},
    score_term="features",
    has_prior=True,
    tags=("anomaly",),
):
    """A Wasserstein GAN with an encoder; samples with large errors of values and critic features are anomalous.

    Args:
        latent_dim: D, size of the code.
        generator_weight: alpha, weight of the encoder's loss in the generator's; 0 in the paper.
        feature_weight: kappa, weight of the critic's features.
        penalty_weight: lam, weight of the critic's gradient penalty.
        discriminator_dims: widths or channels of the critic; the last one is F. Empty: hidden_dims, or 64.
        discriminator_lr: learning rate of the critic. All betas are 0 and 0.9 unless optimizer sets them.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, ldm, vit, mixer, lstm or transformer, for all
            networks.
        likelihood: how outputs are compared with data, see wae_gan; gaussian is the paper's squared error.
        lr: learning rate of encoder and generator.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        generator_weight: float = 0.1,
        feature_weight: float = 1.0,
        penalty_weight: float = 10.0,
        discriminator_dims: tuple[int, ...] = (),
        discriminator_lr: float = 3e-3,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, latent_dim=latent_dim)
        check_at_least(
            0, generator_weight=generator_weight, feature_weight=feature_weight, penalty_weight=penalty_weight
        )
        check_discriminator(discriminator_dims, discriminator_lr)
        self.generator_weight = generator_weight
        self.feature_weight = feature_weight
        self.penalty_weight = penalty_weight
        self.discriminator_lr = discriminator_lr
        self.code_shape = (latent_dim,)
        self.encoder = self.build_encoder(self.code_shape)
        self.decoder = self.build_decoder(self.code_shape)
        dims = tuple(discriminator_dims) or tuple(self.hidden_dims) or (64,)
        body = nets.encoder(
            self.net, self.input_shape, dims[-1:], dims[:-1] if self.net == "mlp" else dims, self.activation
        )
        self.discriminator = Critic(body, dims[-1])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return discriminator_parameter_groups(self, betas=(0.0, 0.9), for_all=True)  # as in the authors' code

    def generate(self, e_BD: Tensor) -> Tensor:
        """Return decoder(e), with the gradient of its weights multiplied by alpha, (B, D) -> (B, *input_shape)."""
        alpha, named = self.generator_weight, self.decoder.named_parameters()
        return functional_call(self.decoder, {name: p.detach() + alpha * (p - p.detach()) for name, p in named}, e_BD)

    def feature_error(self, f_BF: Tensor, f_hat_BF: Tensor) -> Tensor:
        """Return X ||f(x) - f(xhat)||^2 / F, (B, F), (B, F) -> (B,)."""
        return math.prod(self.input_shape) * at_least_float32(f_BF - f_hat_BF).square().mean(1)

    def penalty(self, x: Tensor, generated: Tensor) -> Tensor:
        """Return (||dD(m)/dm|| - 1)^2 at a random m between two samples, (B, *shape), (B, *shape) -> (B,)."""
        share_B = torch.rand(len(x), device=x.device, dtype=x.dtype)
        mixed = torch.lerp(generated, x, share_B.view(-1, *[1] * (x.ndim - 1)))
        t_B, pullback, *_ = vjp(lambda m: self.discriminator(m)[1], mixed)
        slope = at_least_float32(pullback(torch.ones_like(t_B))[0]).flatten(1)
        # the norm has no gradient where the gradient of D is 0
        return (slope.square().sum(1).clamp(min=1e-24).sqrt() - 1).square()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        e_BD = self.encode(x)
        params = self.generate(e_BD)
        generated = self.decode(torch.randn_like(at_least_float32(e_BD)).to(e_BD.dtype)).to(x.dtype)

        f_BF, t_B = self.discriminator(torch.cat([x, generated.detach()]))
        critic = t_B[len(x) :].mean() - t_B[: len(x)].mean()
        penalty = self.penalty(x, generated.detach()).mean()
        # the critic is a constant for the other networks
        f_hat_BF, t_hat_B = call_frozen(
            self.discriminator, torch.cat([self.likelihood.mean(params).to(x.dtype), generated])
        )
        adversarial = -t_hat_B[len(x) :].mean()
        nll, features = (
            self.nll(params, x).mean(),
            self.feature_error(f_BF[: len(x)].detach(), f_hat_BF[: len(x)]).mean(),
        )
        players = adversarial + critic + self.penalty_weight * penalty
        loss = nll + self.feature_weight * features + gradient_only(players)
        more = {"adversarial": adversarial, "discriminator": critic, "gradient_penalty": penalty}
        return {"loss": loss, "nll": nll, "features": features, **more}

    def score(self, x: Tensor) -> Tensor:
        """Return -log p(x | xhat) + kappa X ||f(x) - f(xhat)||^2 / F, (B, *input_shape) -> (B,)."""
        params = self.decoder(self.encode(x))
        f_BF, f_hat_BF = (self.discriminator(each)[0] for each in (x, self.likelihood.mean(params).to(x.dtype)))
        return self.nll(params, x) + self.feature_weight * self.feature_error(f_BF, f_hat_BF)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        weight = next(self.decoder.parameters())
        return self.decode(torch.randn(n, *self.code_shape, device=weight.device, dtype=weight.dtype))
