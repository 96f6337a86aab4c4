"""AAE, adversarial autoencoder (Makhzani et al. 2015), https://arxiv.org/abs/1511.05644

    L = E[-log p(x | g(z))] - E[log D(z)]     z = f(x), or z ~ N(mu(x), diag sigma(x)^2)
    L_D = -E[log D(p)] - E[log(1 - D(z))]     p ~ p(z) = N(0, I)

L is in nats per sample. This is the WAE-GAN of weight 1, with the paper's networks. The paper goes through each batch
twice: a reconstruction phase trains the encoder and decoder, and a regularisation phase trains first the discriminator
and then the encoder. Here the encoder's two gradients are added, and all networks step at once. Codes are f(x) or, with
`gaussian_posterior`, drawn from the Gaussian of section 2. The third posterior of that section, that of a noisy
network, is left out.
"""

from typing import Any

from aezoo.models.regularised.wae_gan import WAEGAN
from aezoo.nets.blocks.adversarial import discriminator_parameter_groups


class AAE(WAEGAN):
    """An autoencoder whose encoder is also the generator of a GAN: its codes look like draws from the prior.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        latent_dim: D, size of the code.
        adversarial_weight: weight of the adversarial loss on the codes.
        gaussian_posterior: draw codes from N(mu(x), diag sigma(x)^2) in training, instead of z = f(x).
        discriminator_dims: widths of the discriminator's hidden layers, two of 1000 in the paper.
        discriminator_lr: learning rate of the discriminator, whose betas are 0.5 and 0.999 unless optimizer sets them.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, vit, mixer, lstm or transformer.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
        likelihood: how outputs are compared with data: bernoulli, continuous_bernoulli, gaussian, gaussian:0.1,
            gaussian:learned, laplace, discretised_logistic, beta_binomial, logcosh, logit_laplace.
        lr: learning rate of encoder and decoder.
        optimizer: adam, adamw, adamax, nadam, radam, rmsprop, adagrad, adadelta or sgd; also adam:beta1=0.5,eps=1e-4.
        weight_decay: the optimiser's weight decay.
        lr_schedule: constant, cosine, linear, exponential, step or multistep:FACTOR@P,P, from warm-up to the last step.
        warmup_steps: optimiser steps over which the learning rate rises linearly.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 8,
        adversarial_weight: float = 1.0,
        gaussian_posterior: bool = False,
        discriminator_dims: tuple[int, ...] = (1000, 1000),
        discriminator_lr: float = 5e-4,
        net: str = "mlp",
        hidden_dims: tuple[int, ...] = (1000, 1000),
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
            adversarial_weight=adversarial_weight,
            gaussian_posterior=gaussian_posterior,
            discriminator_dims=discriminator_dims,
            discriminator_lr=discriminator_lr,
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

    def parameter_groups(self) -> list[dict[str, Any]]:
        return discriminator_parameter_groups(self, betas=(0.5, 0.999))
