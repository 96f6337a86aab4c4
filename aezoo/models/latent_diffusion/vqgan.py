"""VQGAN, a codebook of perceptually rich parts (Esser et al. 2020), https://arxiv.org/abs/2012.09841

Each place of the encoder's output is replaced by the nearest of K codes. A transformer can be trained on rows of these
codes (equations 4 to 7); in nats per sample:

    L = R + ||sg(z) - e_k||^2 + beta ||z - sg(e_k)||^2 + w_D lambda L_G     R = -log p(x | g(z_q)) + w_P X P(x, xhat)
    P = sum_l ||F_l(x) - F_l(xhat)||^2 / (2 n_l)     F_l the n_l activations of layer l, see perceptual_vae
    L_G = -E[D(xhat)]     L_D = 1/2 E[(1 - D(x))^+] + 1/2 E[(1 + D(xhat))^+]     D judges patches
    lambda = ||dR / dW|| / (||dL_G / dW|| + 1e-4), at most 1e4     W the weight of the decoder's last layer

summed over places and values. With the Laplace likelihood, -log p is ||x - xhat||_1 plus a constant. P counts once for
each of the X values of a sample, as in https://github.com/CompVis/taming-transformers. There, however, R is a mean over
these values, the codes' terms are means over the codes' values, and beta weights the commitment only with legacy=False.
Without L_G and P this is vq_vae.

L_G and L_D count from discriminator_start steps on. As lambda changes from batch to batch, w_D lambda L_G enters the
loss through its gradient only, and so does L_D, which belongs to the other player.

Shapes: B batch, D channels of a code, K codes.
"""

from typing import Unpack

from torch import Tensor

from aezoo import nets
from aezoo.bases.network import NetworkArgs, NetworkAutoencoder
from aezoo.bases.perceptual_adversarial import PerceptualAdversarial
from aezoo.bases.quantised import DiscreteAutoencoder
from aezoo.quantisers.vq import VQ
from aezoo.training.limits import at_least


class VQGAN(
    PerceptualAdversarial,
    DiscreteAutoencoder,
    NetworkAutoencoder,
    hidden_dims={"resnet": (32, 64)},
    defaults={"net": "resnet", "activation": "silu", "likelihood": "laplace"},
):
    """A map of codes from one codebook, with a perceptual and an adversarial loss for sharp outputs.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), of any size.
        latent_dim: D, channels of a code.
        codebook_size: K.
        beta: weight of the commitment.
        update: how codes learn: ema, moving averages, or gradient.
        decay: of the moving averages.
        dead_below: mean rows a batch below which a code moves to a row, at most rows / 2K where rows <= K; 0 for never.
        estimator: how the gradient passes the quantiser: ste, rotation, gumbel or diveq.
        cosine: compare directions, on the unit sphere.
        data_init: start the codes by k-means on the first batch of training.
        features: none, random, vgg16, vgg19 or the path of a .pth file of VGG weights; VGG takes images alone.
        perceptual_weight: w_P.
        discriminator_weight: w_D.
        discriminator_start: optimiser steps before the discriminator counts; 10000 in a setting of the authors' code.
        discriminator_dims: channels of the discriminator's stages, each of stride 2. Empty: hidden_dims, or 64.
        discriminator_lr: learning rate of the discriminator. All betas are 0.5 and 0.9 unless optimizer sets them.
        net: resnet, conv, convnext, conv_keras, unet, gdn, dc, vit or mixer.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        likelihood: how outputs are compared with data, see vq_vae; laplace is the paper's absolute error.
        lr: learning rate of encoder, decoder and codes.
        **kwargs: see `NetworkAutoencoder`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 16,
        codebook_size: int = 512,
        beta: float = 0.25,
        update: str = "gradient",
        decay: float = 0.99,
        dead_below: float = 1.0,
        estimator: str = "ste",
        cosine: bool = False,
        data_init: bool = True,
        features: str = "random",
        perceptual_weight: float = 1.0,
        discriminator_weight: float = 0.8,
        discriminator_start: int = 0,
        discriminator_dims: tuple[int, ...] = (),
        discriminator_lr: float = 1e-4,
        **kwargs: Unpack[NetworkArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        at_least(0, beta=beta)
        at_least(1, codebook_size=codebook_size)
        self.beta = beta
        nets.map_shape(self.net, self.input_shape, self.hidden_dims, 1)  # refuses nets without a grid
        self.build_nets(self.net, (latent_dim, latent_dim), self.hidden_dims, self.activation, places=1)
        self.quantiser = VQ(
            latent_dim,
            codebook_size,
            update=update,
            decay=decay,
            dead_below=dead_below,
            estimator=estimator,
            cosine=cosine,
        )
        dims = tuple(discriminator_dims) or tuple(self.hidden_dims) or (64,)
        self.build_losses(
            features, perceptual_weight, discriminator_weight, discriminator_start, dims, discriminator_lr
        )
        if data_init:
            self.enable_data_init()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_q, _, terms = self.quantise(x)
        loss, judged, _ = self.adversarial_objective(x, z_q)
        loss = loss + self.beta * terms["commitment"] + terms.get("codebook", 0)
        return {"loss": loss, **judged, **terms}
