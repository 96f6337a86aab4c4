"""ELIC, learned compression in uneven groups of channels (He et al. 2022), https://arxiv.org/abs/2203.10886

Channels are coded group by group. The first groups are small, since they hold most of the information. Within a group,
the places of one colour of a checkerboard come first (section 3.3, SCCTX):

    mu_kt, s_kt = p_k(g_h(z^)_t, h_k(y^_<k)_t, (W_k * y^_k)_t)    without the last term of anchors
    y^_kt = mu_kt + round(y_kt - mu_kt)    P(y^_kt | ...) = N(mu_kt, s_kt^2) * U(-1/2, 1/2)

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2    R = -log P(z^) - sum_kt log P(y^_kt | ...)

in nats per sample, C channels of x; in training noise replaces rounding, as in `factorized_prior`. The paper's
transforms are residual blocks without divisive normalisation: net resnet.

Shapes: B batch, M channels of the code in groups k, N of the side information, T places.
"""

import torch
from torch import Tensor, nn

from aezoo.bases.entropy_coded import Coder
from aezoo.models.compression.checkerboard import Checkerboard
from aezoo.nets.blocks.context import Context
from aezoo.nets.conv import CONVS
from aezoo.training.limits import at_least


class Elic(Checkerboard):
    """Rounded codes, coded group by group of channels, with two passes over the places of each group.

    Args:
        input_shape: shape of one sample, (C, L), (C, H, W) or (C, D, H, W).
        groups: channels of each group of the code, M in total.
        lam: weight of the distortion.
        hyper_dim: N, channels of the side information.
        hyper_hidden_dims: channels of the stages between y and z; mirrored on the way back.
        reach: number of places that W sees to each side.
        net: resnet, gdn, conv, convnext, unet, dc, vit or mixer.
        hidden_dims: channels of the encoder's stages; the decoder mirrors them.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers;
            of net gdn, between those of the side information alone.
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
        groups: tuple[int, ...] = (2, 2, 4, 8, 16),
        lam: float = 0.01,
        hyper_dim: int = 16,
        hyper_hidden_dims: tuple[int, ...] = (64,),
        reach: int = 2,
        net: str = "resnet",
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
            latent_dim=sum(groups),
            lam=lam,
            hyper_dim=hyper_dim,
            hyper_hidden_dims=hyper_hidden_dims,
            reach=reach,
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
        at_least(1, **{f"groups[{i}]": size for i, size in enumerate(groups)})
        self.groups, before = tuple(groups), [sum(groups[:k]) for k in range(len(groups))]
        rank, known = len(self.grid), 2 * sum(groups)
        self.contexts, self.across = nn.ModuleList(), nn.ModuleList()
        for n, size in zip(before, groups, strict=True):
            self.contexts.append(Context(size, known + (2 * size if n else 0), self.kernel_mask(reach)))
            if n:
                wide, narrow = (CONVS[rank](inner, 2 * size, 5, padding=2) for inner in (n, 2 * size))
                self.across.append(nn.Sequential(wide, nn.ReLU(), narrow))

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        said = self.said(coder, y, n)
        parts = [None] * len(self.groups) if y is None else y.split(self.groups, 1)
        done: list[Tensor] = []
        for k, part in enumerate(parts):
            besides = [said, self.across[k - 1](torch.cat(done, 1).to(self.density.median_C))] if k else [said]
            done.append(self.two_passes(coder, part, torch.cat(besides, 1), k))
        return torch.cat(done, 1)
