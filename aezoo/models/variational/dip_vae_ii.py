"""DIP-VAE-II, disentangled inferred prior (Kumar et al. 2018), https://arxiv.org/abs/1711.00848

    L = E_q[-log p(x|z)] + KL(q(z|x) || p(z)) + l_od sum_{i != j} C_ij^2 + l_d sum_i (C_ii - 1)^2     (equation 7)
    C = Cov[z] = Cov[mu(x)] + E[diag sigma(x)^2]     by the law of total covariance

in nats per sample. The codes themselves, not only the posterior means, should have the prior's covariance. C is the
covariance of the whole batch over all ranks. l_od = l_d = 0 is the VAE.

Shapes: B batch, D code.
"""

import torch
from torch import Tensor

from aezoo.models.variational.dip_vae_i import DIPVAEI


class DIPVAEII(DIPVAEI):
    """A VAE whose codes have the identity as covariance.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, size of the code.
        off_diagonal: l_od, weight of the squared covariances; usually 1 to 50.
        diagonal: l_d, weight of the squared distances of the variances from 1; usually l_od.
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
        off_diagonal: float = 10.0,
        diagonal: float = 10.0,
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
            off_diagonal=off_diagonal,
            diagonal=diagonal,
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

    def covariance(self, mu_BD: Tensor, log_var_BD: Tensor) -> Tensor:
        """Cov[z] over the batch, (B, D), (B, D) -> (D, D)."""
        eye_DD = torch.eye(mu_BD.shape[1], device=mu_BD.device, dtype=mu_BD.dtype)
        return super().covariance(mu_BD, log_var_BD) + self.batch_mean(log_var_BD.exp()) * eye_DD
