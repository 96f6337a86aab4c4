"""Denoising VAE (Im et al. 2015), https://arxiv.org/abs/1511.06406

    L = E_C[ E_q[-log p(x|z)] + beta KL(q(z|x~) || p(z)) ]     x~ ~ C(x~|x), z ~ q(z|x~)

in nats per sample. The code is computed from a corrupted sample, and the likelihood from the clean one. The posterior
is in effect the mixture q~(z|x) = E_C[q(z|x~)], which is richer than a Gaussian. For it, L at beta = 1 is an upper
bound of the negative ELBO (section 3). Without corruption this is the VAE.

Noise is drawn anew for every training batch, and once, from a fixed seed, for evaluation. Samples that are encoded or
scored are not corrupted: the q(z|x) of log_likelihood is the encoder's.
"""

import torch
from torch import Tensor

from aezoo import corruptions
from aezoo.models.variational.vae import VAE


class DenoisingVAE(VAE):
    """A VAE that learns to undo a corruption; reconstructions and metrics in evaluation start from corrupted input too.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        corruption: gaussian:STD, masking:SHARE, salt_and_pepper:SHARE or none.
        latent_dim: D, size of the code.
        beta: weight of the KL term.
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
        corruption: str = "gaussian:0.3",
        latent_dim: int = 16,
        beta: float = 1.0,
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
            beta=beta,
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
        self.corruption = corruptions.corruption(corruption)

    def loss(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        noisy = x if self.corruption is None else self.corruption(x)
        mu_BD, log_var_BD = self.posterior(noisy)
        z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * torch.randn_like(mu_BD)
        nll = self.nll(self.decoder(z_BD.to(x.dtype)), x).mean()
        kl = self.mean_kl(self.kl(mu_BD, log_var_BD))
        loss = nll + self.beta * (kl - self.capacity).abs()
        return {"loss": loss, "nll": nll, "kl": kl, "elbo": -(nll + kl)}
