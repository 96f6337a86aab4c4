"""Learned compression with a factorised prior (Ballé et al. 2017), https://arxiv.org/abs/1611.01704

The code is rounded. A learned distribution for each channel determines how many bits its integers take:

    y = f(x)    y^ = m + round(y - m)    R = -sum log P(y^)    D = ||x - g(y^)||^2

    L = R + lam 255^2 log 2 / C  D     in nats per sample, C channels of x

This is the paper's R + lam 255^2 MSE, in bits per pixel, times pixels and log 2. In training y~ = y + u replaces y^,
u ~ U(-1/2, 1/2). Then R is -log of the density of y~, and L is the negative ELBO of a VAE with a uniform posterior.
The prior is that of Ballé et al. 2018, https://arxiv.org/abs/1802.01436, appendix 6.1.

`aezoo compress` writes these integers. With likelihood gaussian, the term `nll` is D up to a constant.

Shapes: B batch, M channels of the code.
"""

from torch import Tensor

from aezoo.bases.entropy_coded import AdditiveNoise, Coder, EntropyCoded, Factorised, Rounding, Table


class FactorizedPrior(EntropyCoded):
    """Rounded codes with a learned distribution for each channel.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: M, channels of the code.
        lam: weight of the distortion.
        net: gdn, conv, resnet, convnext, conv_keras, unet, dc, vit, mixer, mlp, lstm or transformer.
        hidden_dims: channels of the encoder's stages (mlp: widths of its layers); the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        lam: float = 0.01,
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
            likelihood=likelihood,
            lr=lr,
            optimizer=optimizer,
            weight_decay=weight_decay,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
        )
        self.save_hyperparameters()
        self.build_nets(net, latent_dim, hidden_dims, activation, lam)
        self.density = Factorised(latent_dim)

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        return coder(y, self.density.distribution((n, *self.code_shape)))

    def tables(self) -> list[Table]:
        return self.density.tables()

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        nll_B, rate_B = self.code_with_rate(x, AdditiveNoise() if self.training else Rounding())
        nll, rate = nll_B.mean(), rate_B.mean()
        return {"loss": rate + self.weight * nll, "nll": nll, "rate": rate, "bpp": self.bits_per_place(rate)}
