"""Learned compression with a mean and scale hyperprior (Minnen et al. 2018), https://arxiv.org/abs/1809.02736

Side information z also gives the expected value of the code, and the code is rounded relative to it (table 1):

    y = f(x)    z = h(y)    z^ = m + round(z - m)    mu, s = g_h(z^)    y^ = mu + round(y - mu)

    P(z^) factorised, learned    P(y^ | z^) = N(mu, s^2) * U(-1/2, 1/2)    R = -log P(z^) - log P(y^ | z^)

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2

in nats per sample, C channels of x; in training noise replaces rounding, as in `factorized_prior`.

Shapes: B batch, M channels of the code, N of the side information.
"""

from torch import Tensor

from aezoo.bases.entropy_coded import Coder
from aezoo.models.compression.scale_hyperprior import ScaleHyperprior


class MeanScaleHyperprior(ScaleHyperprior):
    """Rounded codes, Gaussian with means and scales from side information.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: M, channels of the code.
        lam: weight of the distortion.
        hyper_dim: N, channels of the side information.
        hyper_hidden_dims: channels of the stages between y and z (net mlp: widths of layers); mirrored on the way back.
        net: gdn, conv, resnet, convnext, conv_keras, unet, dc, vit, mixer, mlp, lstm or transformer.
        hidden_dims: channels of the encoder's stages (mlp: widths of its layers); the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers;
            of net gdn, between those of the side information alone.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    per_channel = 2

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        lam: float = 0.01,
        hyper_dim: int = 16,
        hyper_hidden_dims: tuple[int, ...] = (64,),
        net: str = "gdn",
        hidden_dims: tuple[int, ...] = (64, 64),
        activation: str = "relu",
        likelihood: str = "gaussian",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            input_shape,
            latent_dim=latent_dim,
            lam=lam,
            hyper_dim=hyper_dim,
            hyper_hidden_dims=hyper_hidden_dims,
            net=net,
            hidden_dims=hidden_dims,
            activation=activation,
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()

    def side(self, y: Tensor) -> Tensor:
        z: Tensor = self.hyper_encoder(y)
        return z

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        return coder(y, self.distribution(*self.said(coder, y, n).chunk(2, 1)))
