"""VQGAN, VQ-VAE with perceptual and adversarial losses (Esser et al. 2020), https://arxiv.org/abs/2012.09841

The encoder's output at each position is replaced by the nearest of K codes. A transformer can be trained on the
sequences of these codes (equations 4 to 7); in nats per sample:

    L = R + ||sg(z) - e_k||^2 + beta ||z - sg(e_k)||^2 + w_D lambda L_G     R = -log p(x | g(z_q)) + w_P X P(x, xhat)
    P = LPIPS(x, xhat)     with the weights of VGG-16, or else a distance in a random network, see autoencoder_kl
    L_G = -E[D(xhat)]     L_D = 1/2 E[(1 - D(x))^+] + 1/2 E[(1 + D(xhat))^+]     D classifies patches
    lambda = ||dR / dW|| / (||dL_G / dW|| + 1e-4), at most 1e4 X   W the weight of the decoder's last layer

summed over positions and values. With the Laplace likelihood, -log p is ||x - xhat||_1 plus a constant. P counts once
for each of the X values of a sample, as in https://github.com/CompVis/taming-transformers. There, however, R is a mean
over these values, so lambda is X times smaller and at most 1e4; the codes' terms are means over the codes' values, and
beta multiplies the commitment loss only with legacy=False. Without L_G and P, this is vq_vae.

L_G and L_D are used from step discriminator_start on. As lambda changes from batch to batch, w_D lambda L_G enters the
loss through its gradient only, and so does L_D, the loss of the discriminator.

Shapes: B batch, D channels of a code, K codes.
"""

from typing import Unpack

from torch import Tensor

from aezoo import nets
from aezoo.bases.network import NetworkAutoencoder
from aezoo.bases.perceptual_adversarial import AdversarialArgs, PerceptualAdversarial
from aezoo.bases.vector_quantised import VQAutoencoder, VQNetworkArgs


class VQGANArgs(VQNetworkArgs, AdversarialArgs, total=False):
    """Arguments of `VQGAN`."""


class VQGAN(
    PerceptualAdversarial,
    VQAutoencoder,
    NetworkAutoencoder,
    hidden_dims={"resnet": (32, 64)},
    defaults={"update": "gradient", "net": "resnet", "activation": "silu", "likelihood": "laplace"},
    tags=("tokenizer", "latent diffusion"),
):
    """Learns a map of codes from one codebook, with perceptual and adversarial losses for sharp outputs.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), of any size.
        discriminator_start: optimiser steps before the adversarial loss is used; 10000 in a setting of the authors'
            code.
        net: resnet, conv, convnext, conv_keras, unet, gdn, dc, ldm, vit or mixer; ldm is that of the authors.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        likelihood: how outputs are compared with data, see vq_vae; laplace is the paper's absolute error.
        lr: learning rate of encoder, decoder and codebook.
        **kwargs: see `VQAutoencoder`, `PerceptualAdversarial` and `NetworkAutoencoder`.
    """

    def __init__(self, input_shape: tuple[int, ...], **kwargs: Unpack[VQGANArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        nets.map_shape(self.net, self.input_shape, self.hidden_dims, 1)  # raises for networks without a grid
        self.build_nets(self.net, (self.latent_dim, self.latent_dim), self.hidden_dims, self.activation, places=1)
        self.quantiser = self.build_vq()
        self.build_adversarial_losses(self.hidden_dims)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        loss, adversarial_terms, _ = self.adversarial_objective(x, z_q, max_weight=1e4 * x[0].numel())
        loss = loss + self.beta * terms["commitment"] + terms.get("codebook", 0)
        return {"loss": loss, **adversarial_terms, **terms}
