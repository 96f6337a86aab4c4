"""Learned compression with a checkerboard context (He et al. 2021), https://arxiv.org/abs/2103.15306

Positions of one colour of a checkerboard, the anchors, are coded first. With the side information, they predict the
other positions (section 3.2). This takes two passes instead of one pass per position:

    mu_t, s_t = p(g_h(z^)_t, 0) of anchors,    p(g_h(z^)_t, (W * y^)_t) of the others, W masked to anchors
    y^_t = mu_t + round(y_t - mu_t)    P(y^_t | ...) = N(mu_t, s_t^2) * U(-1/2, 1/2)

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2    R = -log P(z^) - sum_t log P(y^_t | ...)

in nats per sample, for C channels of x; in training, noise replaces rounding, as in `factorized_prior`.

Shapes: B batch, M channels of the code, N of the side information, T positions.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.bases.entropy_coded import Coder
from aezoo.errors import AezooError
from aezoo.models.compression.mean_scale_hyperprior import MeanScaleHyperprior
from aezoo.models.compression.scale_hyperprior import ScaleHyperpriorArgs
from aezoo.nets.blocks.context import Context, tap_offsets


class Checkerboard(MeanScaleHyperprior, tags=("compression",)):
    """Learns rounded codes, half of them predicted from side information, the other half also from the first half.

    Args:
        input_shape: shape of one sample, (C, L), (C, H, W) or (C, D, H, W).
        hyper_hidden_dims: channels of the stages between y and z; mirrored on the way back.
        reach: number of positions that W covers on each side.
        net: gdn, conv, resnet, convnext, unet, dc, ldm, vit or mixer.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers;
            with net gdn, only in the networks of the side information.
        **kwargs: see `MeanScaleHyperprior`.
    """

    anchors: Tensor
    others: Tensor

    def __init__(self, input_shape: tuple[int, ...], *, reach: int = 2, **kwargs: Unpack[ScaleHyperpriorArgs]) -> None:
        super().__init__(input_shape, **kwargs)
        self.reach = reach
        self.grid = self.code_shape[1:]
        if not self.grid:
            raise AezooError(f"net {self.net!r} gives a code without a grid: use gdn or conv, or mean_scale_hyperprior")
        colour = torch.stack(torch.meshgrid(*map(torch.arange, self.grid), indexing="ij")).sum(0).flatten() % 2
        for name, number in (("anchors", 0), ("others", 1)):
            self.register_buffer(name, (colour == number).nonzero()[:, 0], persistent=False)
        self.contexts = nn.ModuleList([Context(self.latent_dim, 2 * self.latent_dim, self.kernel_mask(reach))])

    def kernel_mask(self, reach: int) -> Tensor:
        """Return which taps of a kernel lie on the other colour, (2 reach + 1, ...), bool."""
        return tap_offsets(reach, len(self.grid)).sum(0) % 2 == 1

    def two_passes(self, coder: Coder, y: Tensor | None, side: Tensor, group: int) -> Tensor:
        """Code a group of channels, anchors first, (B, C, *grid) or None, (B, S, *grid) -> (B, C, *grid)."""
        context = self.contexts[group]
        assert isinstance(context, Context)
        y_BCT, side_BST = None if y is None else y.flatten(2), side.flatten(2)
        n, _, t = side_BST.shape
        y_hat, seen = side.new_zeros(n, context.channels, t), side.new_zeros(n, 2 * context.channels, t)
        for places in (self.anchors, self.others):
            distribution = self.distribution(*context(side_BST[..., places], seen[..., places]))
            y_hat = y_hat.index_copy(2, places, coder(None if y_BCT is None else y_BCT[..., places], distribution))
            if places is self.anchors:
                seen = context.masked_conv(y_hat.unflatten(2, self.grid)).flatten(2)
        return y_hat.unflatten(2, self.grid)

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        return self.two_passes(coder, y, self.code_side(coder, y, n), 0)
