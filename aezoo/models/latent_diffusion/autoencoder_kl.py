"""AutoencoderKL of latent diffusion (Rombach et al. 2021), https://arxiv.org/abs/2112.10752

The code is a feature map, on which a diffusion model can be trained; in nats per sample:

    L = R + beta KL(q(z|x) || p(z)) + w_D lambda L_G     R = E_q[-log p(x|z)] + w_P X P(x, xhat)
    q(z|x) = N(mu(x), diag sigma(x)^2)     p(z) = N(0, I)     KL and -log p are sums over all values
    P = sum_l mean_i sum_c w_lc (u_lic(x) - u_lic(xhat))^2     LPIPS, u_li = F_li / ||F_li||: features at position i
    L_G = -E[D(xhat)]     L_D = 1/2 E[(1 - D(x))^+] + 1/2 E[(1 + D(xhat))^+]     D classifies patches
    lambda = ||dR / dW|| / (||dL_G / dW|| + 1e-4), at most 1e4     W the weight of the decoder's last layer

From step discriminator_start on, L_G and L_D enter the loss, through their gradients only: lambda changes from batch to
batch, and L_D is the loss of the discriminator. F are activations of a trained VGG-16 and w the weights of LPIPS (Zhang
et al. 2018, https://arxiv.org/abs/1801.03924). If VGG-16's weights are not on this machine, or do not fit the data, P
is the distance of perceptual_vae in a network with random weights; `features` selects the network.

Without L_G, L_D and P, and with beta = 1, L is -ELBO. beta = 1e-6 is meant for sums over values, as in
https://github.com/CompVis/latent-diffusion, where P is added to each of the X values, hence counts X times, and is
divided by the likelihood's scale. With such a small beta, q(z) is far from p(z), which `elbo` and `log_likelihood` use.
`standardiser` stores the mean and standard deviation of each channel over about 100 batches; `sample` rescales draws by
them.

The authors' optimiser does not train the scale b of the Laplace density (`logvar`), which stays at 1, as with
likelihood laplace. laplace:learned trains it: as b falls towards the mean absolute error, -log p gets 1 / b times the
weight relative to P and KL. In 400 steps on mnist5k (hidden_dims 8 and 16, no discriminator, means of three seeds; see
`python -m benchmarks.deviations`), b fell to 0.67; absolute errors per value were 0.0496 instead of 0.0514 with b = 1,
w_P X P 11.3 instead of 11.2, and the KL 1,107 nats instead of 1,118.

Shapes: B batch, C channels of a code, K importance samples, D all values of a code.
"""

from typing import Unpack

import torch
from torch import Tensor

from aezoo import nets
from aezoo.bases.perceptual_adversarial import AdversarialArgs, PerceptualAdversarial
from aezoo.distributions import gaussians
from aezoo.models.variational.vae import VAE, VAEArgs
from aezoo.nets.blocks.channel_stats import Standardiser


class AutoencoderKLArgs(VAEArgs, AdversarialArgs, total=False):
    """Arguments of `AutoencoderKL`."""


class AutoencoderKL(
    PerceptualAdversarial,
    VAE,
    hidden_dims={"resnet": (32, 64)},
    defaults={
        "latent_dim": 4,
        "beta": 1e-6,
        "discriminator_weight": 0.5,
        "net": "resnet",
        "activation": "silu",
        "likelihood": "laplace:learned",
    },
    tags=("latent diffusion",),
):
    """Learns a Gaussian feature map, with a small KL weight and perceptual and adversarial losses for sharp outputs.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), of any size.
        latent_dim: C, channels of the code.
        discriminator_start: optimiser steps before the adversarial loss is used; 50001 in the authors' settings.
        net: resnet, conv, convnext, conv_keras, unet, gdn, dc, ldm, vit or mixer; ldm is that of the authors.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        likelihood: how outputs are compared with data, see vae; laplace is the authors' absolute error, and
            laplace:learned also trains its scale.
        lr: learning rate of encoder and decoder.
        **kwargs: see `VAE` and `PerceptualAdversarial`.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Unpack[AutoencoderKLArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        self.build_adversarial_losses(self.hidden_dims)
        self.standardiser = Standardiser(self.latent_dim)

    def build_networks(self) -> None:
        self.code_shape, both = (
            nets.map_shape(self.net, self.input_shape, self.hidden_dims, n * self.latent_dim) for n in (1, 2)
        )
        self.encoder = self.build_encoder(both)
        self.decoder = self.build_decoder(self.code_shape)

    @staticmethod
    def kl(mu_BD: Tensor, log_var_BD: Tensor) -> Tensor:
        return VAE.kl(mu_BD.flatten(1), log_var_BD.flatten(1))

    def log_prior(self, z: Tensor) -> Tensor:
        return super().log_prior(z.flatten(-len(self.code_shape)))

    def sample_posterior(self, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
        mu_BD, log_var_BD = (part.flatten(1) for part in self.posterior(x))
        z_KBD, log_q_KB = gaussians.rsample(mu_BD, log_var_BD, n)
        return z_KBD.unflatten(2, self.code_shape), log_q_KB

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        mu, log_var = self.posterior(x)
        z = mu + torch.exp(0.5 * log_var) * gaussians.standard_normal_like(mu)
        if self.training:
            self.standardiser.observe(z.detach(), self.batch_mean)
        x, z, *seen = self.decoder_inputs(x, z)
        loss, terms, g_R = self.adversarial_objective(x, z.to(x.dtype), *seen)
        kl = self.mean_kl(self.kl(mu, log_var))
        extra, own = self.extra_terms(x, z, mu, g_R)
        loss = loss + self.beta * (kl - self.capacity).abs() + extra
        return {"loss": loss, "kl": kl, "elbo": -(terms["nll"] + kl), **terms, **own}

    def decoder_inputs(self, x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """Return the samples that a step compares and the decoder's inputs for them: codes and any further ones."""
        return x, z

    def extra_terms(self, x: Tensor, z: Tensor, mu: Tensor, g_R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss that a subclass adds, and its terms; g_R is the gradient of R at the decoder's output."""
        return g_R.new_zeros(()), {}

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return self.decode(self.standardiser.restore(self.sample_prior(n)))
