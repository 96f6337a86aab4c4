"""ELIC, learned compression with channel groups of different sizes (He et al. 2022), https://arxiv.org/abs/2203.10886

Channels are coded group by group. The first groups are small, since they contain most of the information. Within a
group, positions of one colour of a checkerboard come first (section 3.3, SCCTX):

    mu_kt, s_kt = p_k(g_h(z^)_t, h_k(y^_<k)_t, (W_k * y^_k)_t)    without the last term for anchors
    y^_kt = mu_kt + round(y_kt - mu_kt)    P(y^_kt | ...) = N(mu_kt, s_kt^2) * U(-1/2, 1/2)

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2    R = -log P(z^) - sum_kt log P(y^_kt | ...)

in nats per sample, for C channels of x; in training, noise replaces rounding, as in `factorized_prior`. The paper's
transforms are residual blocks without divisive normalisation: net resnet.

Shapes: B batch, M channels of the code in groups k, N of the side information, T positions.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.bases.entropy_coded import Coder
from aezoo.models.compression.checkerboard import Checkerboard
from aezoo.models.compression.scale_hyperprior import HyperArgs
from aezoo.nets.blocks.context import Context
from aezoo.nets.conv import CONVS
from aezoo.training.limits import check_at_least


class Elic(Checkerboard, hidden_dims={"resnet": (64, 64)}, defaults={"net": "resnet"}, tags=("compression",)):
    """Learns rounded codes, coded by groups of channels with two passes over the positions of each group.

    Args:
        groups: channels of each group of the code, M in total.
        lam: weight of the distortion.
        reach: number of positions that W covers on each side.
        net: resnet, gdn, conv, convnext, unet, dc, ldm, vit or mixer.
        **kwargs: see `Checkerboard`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        groups: tuple[int, ...] = (2, 2, 4, 8, 16),
        lam: float = 0.01,
        reach: int = 2,
        **kwargs: Unpack[HyperArgs],
    ) -> None:
        super().__init__(input_shape, latent_dim=sum(groups), lam=lam, reach=reach, **kwargs)
        check_at_least(1, **{f"groups[{i}]": size for i, size in enumerate(groups)})
        self.groups = tuple(groups)
        before = [sum(groups[:k]) for k in range(len(groups))]
        rank, known = len(self.grid), 2 * sum(groups)
        self.contexts = nn.ModuleList()
        self.across = nn.ModuleList()
        for n, size in zip(before, groups, strict=True):
            self.contexts.append(Context(size, known + (2 * size if n else 0), self.kernel_mask(reach)))
            if n:
                wide, narrow = (CONVS[rank](inner, 2 * size, 5, padding=2) for inner in (n, 2 * size))
                self.across.append(nn.Sequential(wide, nn.ReLU(), narrow))

    def code_latents(self, coder: Coder, y: Tensor | None, n: int) -> Tensor:
        hyper = self.code_side(coder, y, n)
        parts = [None] * len(self.groups) if y is None else y.split(self.groups, 1)
        done: list[Tensor] = []
        for k, part in enumerate(parts):
            side = [hyper, self.across[k - 1](torch.cat(done, 1).to(self.density.median_C))] if k else [hyper]
            done.append(self.two_passes(coder, part, torch.cat(side, 1), k))
        return torch.cat(done, 1)
