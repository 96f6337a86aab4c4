"""Learned compression with mixtures and attention (Cheng et al. 2020), https://arxiv.org/abs/2001.01568

The distribution of each number is a mixture of Gaussians (section 3.2). Its weights, means and scales are computed from
side information and earlier positions, as in `joint_ar_hyperprior`. With K = 1, only the transforms differ from that
model:

    w_t, mu_t, s_t = p(g_h(z^)_t, (W * y^)_t)    m_t = sum_k w_tk mu_tk    y^_t = m_t + round(y_t - m_t)
    P(y^_t | y^_<t, z^) = sum_k w_tk N(mu_tk, s_tk^2) * U(-1/2, 1/2)    sum_k w_tk = 1

    L = R + lam 255^2 log 2 / C  ||x - g(y^)||^2    R = -log P(z^) - sum_t log P(y^_t | y^_<t, z^)

in nats per sample, for C channels of x; in training, noise replaces rounding, as in `factorized_prior`. The paper
counts integers from 0 and not from m. f and g are residual blocks with attention (section 3.3).

Their stages are two residual blocks, one of which halves or doubles the grid and has divisive normalisation as its
second activation (figure 4). g doubles the grid by sub-pixel convolutions: these output 2^R times the channels, which
become positions of a grid with doubled sides (Shi et al. 2016, https://arxiv.org/abs/1609.05158); if a side was odd,
the grid is cropped. The attention is a gate at each position on the output of a second branch,
x + trunk(x) sigmoid(mask(x)), and does not compare positions with each other (figure 5). It is used in the middle of
the stages and at the code, which is always a map here.

Shapes: B batch, K Gaussians of a mixture, M channels of the code, N of the side information, T positions, C channels of
a map, R grid dimensions.
"""

from typing import Unpack

import torch
from torch import Tensor, nn

from aezoo.autoencoder import at_least_float32
from aezoo.bases.entropy_coded import Distribution, Mixtures, scale_of
from aezoo.models.compression.joint_ar_hyperprior import JointARHyperprior
from aezoo.nets.blocks.context import Context
from aezoo.nets.build import activation
from aezoo.nets.conv import CONVS, grids, head, rank_of
from aezoo.nets.dc import shuffle
from aezoo.nets.gdn import GDN
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class Subpixel(nn.Module):
    """Sub-pixel convolution to a grid with doubled sides, (B, C, *grid) -> (B, out, *larger).

    Args:
        channels: C.
        out: number of output channels.
        larger: the output grid, each side 2 n or 2 n - 1.
    """

    def __init__(self, channels: int, out: int, larger: tuple[int, ...]) -> None:
        super().__init__()
        rank = len(larger)
        self.conv = CONVS[rank](channels, out * 2**rank, 3, padding=1)
        self.larger = larger

    def forward(self, x: Tensor) -> Tensor:
        x = shuffle(self.conv(x))
        for axis, side in enumerate(self.larger, start=2):
            x = x.narrow(axis, 0, side)
        return x


class _Residual(nn.Module):
    """Computes skip(x) + body(x)."""

    def __init__(self, body: nn.Module, skip: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.skip = body, nn.Identity() if skip is None else skip

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.skip(x) + self.body(x)
        return found


def _block(rank: int, channels: int, act: str) -> nn.Module:
    first, second = (CONVS[rank](channels, channels, 3, padding=1) for _ in range(2))
    return _Residual(nn.Sequential(first, activation(act), second, activation(act)))


def _down(rank: int, channels: int, out: int, act: str) -> nn.Module:
    first, second = CONVS[rank](channels, out, 3, stride=2, padding=1), CONVS[rank](out, out, 3, padding=1)
    return _Residual(nn.Sequential(first, activation(act), second, GDN(out)), CONVS[rank](channels, out, 1, stride=2))


def _up(channels: int, out: int, larger: tuple[int, ...], act: str) -> nn.Module:
    rank = len(larger)
    body = [Subpixel(channels, out, larger), activation(act), CONVS[rank](out, out, 3, padding=1)]
    return _Residual(nn.Sequential(*body, GDN(out, inverse=True)), Subpixel(channels, out, larger))


class Attention(nn.Module):
    """Computes x + trunk(x) sigmoid(mask(x)), (B, C, *grid) -> (B, C, *grid).

    Args:
        rank: R.
        channels: C.
        act: name of an activation.
    """

    def __init__(self, rank: int, channels: int, act: str) -> None:
        super().__init__()

        def units() -> list[nn.Module]:
            return [self._unit(rank, channels, act) for _ in range(3)]

        self.trunk = nn.Sequential(*units())
        self.mask = nn.Sequential(*units(), CONVS[rank](channels, channels, 1))

    @staticmethod
    def _unit(rank: int, channels: int, act: str) -> nn.Module:
        half = (channels + 1) // 2
        ends = CONVS[rank](channels, half, 1), CONVS[rank](half, channels, 1)
        middle = CONVS[rank](half, half, 3, padding=1)
        return _Residual(nn.Sequential(ends[0], activation(act), middle, activation(act), ends[1]))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.trunk(x) * self.mask(x).sigmoid()
        return found


class Encoder(nn.Sequential):
    """(B, C, *grid) -> (B, *code_shape), a map; `hidden_dims` are the channels of the stages, of stride 2."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        code_shape: tuple[int, ...],
        hidden_dims: tuple[int, ...],
        act: str,
        attention: bool,
    ) -> None:
        rank, layers, channels = rank_of(input_shape), list[nn.Module](), input_shape[0]
        for i, width in enumerate(hidden_dims, start=1):
            layers += [_down(rank, channels, width, act), _block(rank, width, act)]
            channels = width
            if attention and i == len(hidden_dims) // 2:
                layers.append(Attention(rank, width, act))
        layers.append(head(code_shape, (channels, *grids(input_shape, len(hidden_dims))[-1]), rank)[0])
        super().__init__(*layers, *([Attention(rank, code_shape[0], act)] if attention else []))


class Decoder(nn.Sequential):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` are listed from the smallest map."""

    def __init__(
        self,
        code_shape: tuple[int, ...],
        input_shape: tuple[int, ...],
        hidden_dims: tuple[int, ...],
        act: str,
        attention: bool,
    ) -> None:
        rank, widths = rank_of(input_shape), (*hidden_dims, input_shape[0])
        sizes = grids(input_shape, len(hidden_dims))[::-1]
        layers: list[nn.Module] = [Attention(rank, code_shape[0], act)] if attention else []
        layers.append(head(code_shape, (widths[0], *sizes[0]), rank)[1])
        for i, width in enumerate(hidden_dims):
            if attention and i and i == (len(hidden_dims) + 1) // 2:
                layers.append(Attention(rank, width, act))
            layers.append(_block(rank, width, act))
            last = i + 1 == len(hidden_dims)
            up = Subpixel(width, widths[i + 1], sizes[i + 1]) if last else _up(width, widths[i + 1], sizes[i + 1], act)
            layers.append(up)
        super().__init__(*layers)


class Cheng2020Args(TrainingArgs, total=False):
    """Arguments of `JointARHyperprior` without the kind of network."""

    lam: float
    hyper_dim: int
    hyper_hidden_dims: tuple[int, ...]
    reach: int
    latent_dim: int
    hidden_dims: tuple[int, ...] | None
    activation: str


class Cheng2020(JointARHyperprior, defaults={"activation": "leaky_relu"}, tags=("compression",)):
    """Learns rounded codes with a mixture of Gaussians for each number, from side information and earlier positions.

    Args:
        mixtures: K, number of Gaussians in each mixture.
        attention: whether to use attention in the middle of the stages and at the code.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus or identity, between layers.
        **kwargs: see `JointARHyperprior`.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        mixtures: int = 3,
        attention: bool = True,
        **kwargs: Unpack[Cheng2020Args],
    ) -> None:
        super().__init__(input_shape, net="gdn", **kwargs)
        check_at_least(1, mixtures=mixtures)
        self.mixtures = mixtures
        code = self.code_shape
        # replace the encoder and decoder of net gdn by ones with the same grids
        self.encoder = Encoder(self.input_shape, code, self.hidden_dims, self.activation, attention)
        self.decoder = Decoder(code, self.input_shape, self.hidden_dims[::-1], self.activation, attention)
        if mixtures > 1:
            self.context = Context(self.latent_dim, 2 * self.latent_dim, self.context.kernel_mask, 3 * mixtures)

    def distribution(self, *numbers: Tensor) -> Distribution:
        if self.mixtures == 1:
            return super().distribution(*numbers)
        k = self.mixtures
        means, raw_scales, logits = (torch.stack(numbers[i : i + k]) for i in (0, k, 2 * k))
        return Mixtures(at_least_float32(means), scale_of(raw_scales), at_least_float32(logits))
