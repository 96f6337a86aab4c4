"""Learned compression with a checkerboard context (He et al. 2021), https://arxiv.org/abs/2103.15306

The places of one colour of a checkerboard, the anchors, are coded first. With the side information, they predict the
other places (section 3.2). This takes two passes instead of one pass per place:

    mu_t, s_t = p(g_h(z^)_t, 0) of anchors,    p(g_h(z^)_t, (W * y^)_t) of the others, W seeing anchors alone
    y^_t = mu_t + round(y_t - mu_t)    P(y^_t | ...) = N(mu_t, s_t^2) * U(-1/2, 1/2)

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2    R = -log P(z^) - sum_t log P(y^_t | ...)

in nats per sample, C channels of x; in training noise replaces rounding, as in `factorized_prior`.

Shapes: B batch, M channels of the code, N of the side information, T places.
"""

import torch
from torch import Tensor, nn

from aezoo.bases.entropy_coded import Coder
from aezoo.errors import AezooError
from aezoo.models.compression.mean_scale_hyperprior import MeanScaleHyperprior
from aezoo.nets.blocks.context import Context, tap_offsets


class Checkerboard(MeanScaleHyperprior):
    """Rounded codes: half of the places are predicted from side information, the other half also from the first half.

    Args:
        input_shape: shape of one sample, (C, L), (C, H, W) or (C, D, H, W).
        latent_dim: M, channels of the code.
        lam: weight of the distortion.
        hyper_dim: N, channels of the side information.
        hyper_hidden_dims: channels of the stages between y and z; mirrored on the way back.
        reach: number of places that W sees to each side.
        net: gdn, conv, resnet, convnext, unet, dc, vit or mixer.
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

    anchors: Tensor
    others: Tensor

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        latent_dim: int = 32,
        lam: float = 0.01,
        hyper_dim: int = 16,
        hyper_hidden_dims: tuple[int, ...] = (64,),
        reach: int = 2,
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
        self.grid = self.code_shape[1:]
        if not self.grid:
            raise AezooError(f"net {net!r} gives a code without places: take gdn or conv, or mean_scale_hyperprior")
        colour = torch.stack(torch.meshgrid(*map(torch.arange, self.grid), indexing="ij")).sum(0).flatten() % 2
        for name, number in (("anchors", 0), ("others", 1)):
            self.register_buffer(name, (colour == number).nonzero()[:, 0], persistent=False)
        self.contexts = nn.ModuleList([Context(latent_dim, 2 * latent_dim, self.kernel_mask(reach))])

    def kernel_mask(self, reach: int) -> Tensor:
        """The taps of a kernel that lie on the other colour, (2 reach + 1, ...), bool."""
        return tap_offsets(reach, len(self.grid)).sum(0) % 2 == 1

    def two_passes(self, coder: Coder, y: Tensor | None, besides: Tensor, group: int) -> Tensor:
        """Code maps of a group of channels, anchors first: (B, C, *grid) or None, (B, S, *grid) -> (B, C, *grid)."""
        context = self.contexts[group]
        assert isinstance(context, Context)
        y_BCT, besides_BST = None if y is None else y.flatten(2), besides.flatten(2)
        n, _, t = besides_BST.shape
        y_hat, seen = besides.new_zeros(n, context.channels, t), besides.new_zeros(n, 2 * context.channels, t)
        for places in (self.anchors, self.others):
            distribution = self.distribution(*context(besides_BST[..., places], seen[..., places]))
            y_hat = y_hat.index_copy(2, places, coder(None if y_BCT is None else y_BCT[..., places], distribution))
            if places is self.anchors:
                seen = context.masked_conv(y_hat.unflatten(2, self.grid)).flatten(2)
        return y_hat.unflatten(2, self.grid)

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        return self.two_passes(coder, y, self.said(coder, y, n), 0)
