"""Multiply importance weighted autoencoder (Rainforth et al. 2018), https://arxiv.org/abs/1802.04537

Maximises the mean of M importance weighted bounds of K samples each, in nats per sample:

    log p(x) >= E[1/M sum_m log 1/K sum_k w_mk]     w_mk = p(x|z_mk) p(z_mk) / q(z_mk|x)     z_mk ~ q(z|x) independently

M averages noise out of the encoder's gradient, and K tightens the bound. M = 1 is the IWAE; K = 1 is a VAE with M
samples. The estimators are those of the IWAE, applied in each group of K samples.

Shapes: B batch, D code, M groups, K importance samples in a group.
"""

import math

import torch
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.models.variational.iwae import IWAE, MOST_SAMPLES


class MIWAE(IWAE):
    """Gaussian code with a standard normal prior, trained on a mean of importance weighted bounds.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, size of the code.
        n_groups: M, bounds that are averaged; M K codes are decoded for each data sample.
        n_samples: K, importance samples of each bound.
        estimator: the encoder's gradient: reparam, stl or dreg; the last two are less noisy.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, vit, mixer, lstm or transformer.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them.
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
        latent_dim: int = 16,
        n_groups: int = 8,
        n_samples: int = 8,
        estimator: str = "reparam",
        net: str = "mlp",
        hidden_dims: tuple[int, ...] = (400,),
        activation: str = "relu",
        likelihood: str = "bernoulli",
        lr: float = 1e-3,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(
            input_shape,
            latent_dim=latent_dim,
            n_samples=n_samples,
            estimator=estimator,
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
        if not 1 <= n_groups <= MOST_SAMPLES // n_samples:
            raise AezooError(
                f"n_groups must be at least 1 and n_groups n_samples at most {MOST_SAMPLES}, got {n_groups}"
            )
        self.n_groups = n_groups

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        z_BND, nll_BN, kl_BN = self.draw(x, self.n_groups * self.n_samples)
        log_w_BMK = -(nll_BN + kl_BN).unflatten(1, (self.n_groups, self.n_samples))
        if self.estimator == "dreg":
            self.scale_gradient(z_BND, log_w_BMK.detach().softmax(2).flatten(1))
        bound = (torch.logsumexp(log_w_BMK, 2) - math.log(self.n_samples)).mean()
        return {"loss": -bound, "nll": nll_BN.mean(), "kl": kl_BN.mean(), "elbo": bound}
