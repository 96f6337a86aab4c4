"""Learned compression with mixtures and attention (Cheng et al. 2020), https://arxiv.org/abs/2001.01568

The distribution of each number is a mixture of Gaussians (section 3.2). Side information and earlier places give its
weights, means and scales, as in `joint_ar_hyperprior`. With K = 1 only the transforms differ from that model:

    w_t, mu_t, s_t = p(g_h(z^)_t, (W * y^)_t)    m_t = sum_k w_tk mu_tk    y^_t = m_t + round(y_t - m_t)
    P(y^_t | y^_<t, z^) = sum_k w_tk N(mu_tk, s_tk^2) * U(-1/2, 1/2)    sum_k w_tk = 1

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2    R = -log P(z^) - sum_t log P(y^_t | y^_<t, z^)

in nats per sample, C channels of x; in training noise replaces rounding, as in `factorized_prior`. The paper counts
integers from 0 and not from m. f and g are residual blocks with attention (section 3.3), and g upsamples by sub-pixel
convolutions, see `aezoo.nets.blocks.subpixel`.

Shapes: B batch, K Gaussians of a mixture, M channels of the code, N of the side information, T places.
"""

import torch
from torch import Tensor

from aezoo.autoencoder import at_least_float32
from aezoo.bases.entropy_coded import Distribution, Mixtures, scale_of
from aezoo.models.compression.joint_ar_hyperprior import JointARHyperprior
from aezoo.nets.blocks.context import Context
from aezoo.nets.blocks.subpixel import Decoder, Encoder
from aezoo.training.limits import at_least


class Cheng2020(JointARHyperprior):
    """Rounded codes; side information and earlier places give a mixture of Gaussians for each number.

    Args:
        input_shape: shape of one sample, (C, L), (C, H, W) or (C, D, H, W).
        latent_dim: M, channels of the code.
        mixtures: K, Gaussians in the distribution of a number.
        attention: whether to use attention in the middle of the stages and at the code.
        lam: weight of the distortion.
        hyper_dim: N, channels of the side information.
        hyper_hidden_dims: channels of the stages between y and z; mirrored on the way back.
        reach: number of places that W sees to each side.
        hidden_dims: channels of the encoder's stages; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
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
        mixtures: int = 3,
        attention: bool = True,
        lam: float = 0.01,
        hyper_dim: int = 16,
        hyper_hidden_dims: tuple[int, ...] = (64,),
        reach: int = 2,
        hidden_dims: tuple[int, ...] = (64, 64),
        activation: str = "leaky_relu",
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
            reach=reach,
            net="gdn",
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
        at_least(1, mixtures=mixtures)
        self.mixtures, code = mixtures, self.code_shape
        # these replace the encoder and decoder of net gdn, with the same grids
        self.encoder = Encoder(self.input_shape, code, hidden_dims, activation, attention)
        self.decoder = Decoder(code, self.input_shape, hidden_dims[::-1], activation, attention)
        if mixtures > 1:
            self.context = Context(latent_dim, 2 * latent_dim, self.context.kernel_mask, 3 * mixtures)

    def distribution(self, *numbers: Tensor) -> Distribution:
        if self.mixtures == 1:
            return super().distribution(*numbers)
        k = self.mixtures
        means, raw_scales, logits = (torch.stack(numbers[i : i + k]) for i in (0, k, 2 * k))
        return Mixtures(at_least_float32(means), scale_of(raw_scales), at_least_float32(logits))
