"""Networks of learned compression in the layout of the library CompressAI (Bégaint et al. 2020).

Layers and operations have the same order as in https://github.com/InterDigitalInc/CompressAI, so that its weights give
bitwise equal results. The networks have these names there: encoder g_a, decoder g_s, hyper-encoder h_a, hyper-decoder
h_s, context context_prediction, entropy parameters entropy_parameters.

Shapes: B batch, C channels of a sample, N channels of layers, M of the code, (H, W) positions.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets import gdn

ARCHITECTURES = (
    "bmshj2018-factorized", "bmshj2018-factorized-relu", "bmshj2018-hyperprior", "mbt2018-mean", "mbt2018",
    "cheng2020-anchor", "cheng2020-attn",
)  # fmt: skip
# sides are padded to a multiple of this: four halvings for the code, two more for its side information
MULTIPLE = 64
CODE_STRIDE, SIDE_STRIDE = 16, 64
# number of positions on each side that the context covers
REACH = 2
PEDESTAL = 2.0**-36
LEAST_BETA = 1e-6
_LEAST_ROOT_BETA, _LEAST_ROOT_GAMMA = (LEAST_BETA + PEDESTAL) ** 0.5, PEDESTAL**0.5

Padding = tuple[int, int, int, int]


def passes_bound(x: Tensor, gradient: Tensor, bound: float) -> Tensor:
    """Return where the gradient passes: for values not below the bound, and where it moves values up."""
    return (x >= bound) | (gradient < 0)


class _LowerBound(torch.autograd.Function):
    """max(x, bound); the gradient also reaches values below the bound if it moves them up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,), (gradient,) = ctx.saved_tensors, gradients
        return gradient * passes_bound(x, gradient, ctx.bound), None


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """Return max(x, bound), elementwise, with a gradient that moves values below the bound up but not down."""
    bounded: Tensor = _LowerBound.apply(x, bound) if x.requires_grad else x.clamp_min(bound)
    return bounded


class _Bounded(torch.autograd.Function):
    """max(x, bound), with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        return x.clamp_min(bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class GDN(gdn.GDN):
    """`aezoo.nets.gdn.GDN` whose beta and gamma are squares of bounded parameters, minus a small constant."""

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__(channels, inverse)
        with torch.no_grad():
            self.root_beta_C.fill_((1 + PEDESTAL) ** 0.5)
            self.root_gamma_CC.copy_((0.1 * torch.eye(channels) + PEDESTAL).sqrt())

    def _weights(self, root_beta_C: Tensor, root_gamma_CC: Tensor) -> tuple[Tensor, Tensor]:
        beta_C = _Bounded.apply(root_beta_C, _LEAST_ROOT_BETA) ** 2 - PEDESTAL
        return beta_C, _Bounded.apply(root_gamma_CC, _LEAST_ROOT_GAMMA) ** 2 - PEDESTAL

    def bounded(self) -> tuple[tuple[nn.Parameter, float], ...]:
        """Return the parameters with their lower bounds."""
        return (self.root_beta_C, _LEAST_ROOT_BETA), (self.root_gamma_CC, _LEAST_ROOT_GAMMA)

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """Drop gradients that would move parameters below their bound further down.

        `lower_bound` drops them in each process, where their sign may differ from that of the mean over processes.
        """
        for root, bound in self.bounded():
            if root.grad is not None:
                root.grad.mul_(passes_bound(root, root.grad, bound))


class Padded(nn.Sequential):
    """Layers whose input is padded with zeros, or whose output is cropped.

    Args:
        layers: the layers.
        before: zeros to add to the left, right, top and bottom of the input.
        after: the same for the output; negative numbers crop it.
    """

    def __init__(self, layers: Iterable[nn.Module], before: Padding = (0,) * 4, after: Padding = (0,) * 4) -> None:
        super().__init__(*layers)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(super().forward(F.pad(x, self.before)), self.after)


class MaskedConv(nn.Conv2d):
    """A convolution over the previous positions in row-major order: (B, M, H, W) -> (B, 2 M, H, W)."""

    mask: Tensor

    def __init__(self, channels: int) -> None:
        side = 2 * REACH + 1
        super().__init__(channels, 2 * channels, side, padding=REACH)
        mask = (torch.arange(side * side) < side * side // 2).view(side, side)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.masked_weight(), self.bias, padding=REACH)

    def masked_weight(self) -> Tensor:
        """Return the masked weight, for `at`."""
        return self.weight * self.mask

    def at(self, patch: Tensor, masked_weight: Tensor) -> Tensor:
        """Compute the output at one position from the positions around it: (B, M, 5, 5) -> (B, 2 M, 1, 1)."""
        return F.conv2d(patch, masked_weight, self.bias)


class ResidualBlock(nn.Module):
    """x plus two convolutions: (B, N, H, W) -> (B, N, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3(channels, channels), conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.conv2(F.leaky_relu(self.conv1(x)))) + x


class ResidualBlockWithStride(nn.Module):
    """Two convolutions and GDN plus a parallel 1x1 convolution: (B, C, H, W) -> (B, N, H/2, W/2)."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3(channels, out, 2), conv3(out, out)
        self.gdn, self.skip = GDN(out), nn.Conv2d(channels, out, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.gdn(self.conv2(F.leaky_relu(self.conv1(x))))
        return normalised + self.skip(x)


class ResidualBlockUpsample(nn.Module):
    """Convolutions and inverse GDN plus a parallel sub-pixel convolution: (B, N, H, W) -> (B, N, 2 H, 2 W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.subpel_conv, self.conv = subpixel(channels, channels), conv3(channels, channels)
        self.igdn, self.upsample = GDN(channels, inverse=True), subpixel(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = self.igdn(self.conv(F.leaky_relu(self.subpel_conv(x))))
        return normalised + self.upsample(x)


class ResidualUnit(nn.Module):
    """A bottleneck with a residual connection: (B, N, H, W) -> (B, N, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        first, last = nn.Conv2d(channels, half, 1), nn.Conv2d(half, channels, 1)
        self.conv = nn.Sequential(first, nn.ReLU(), conv3(half, half), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class AttentionBlock(nn.Module):
    """x + a(x) sigmoid(b(x)): (B, N, H, W) -> (B, N, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_a = nn.Sequential(*(ResidualUnit(channels) for _ in range(3)))
        self.conv_b = nn.Sequential(*(ResidualUnit(channels) for _ in range(3)), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        gated: Tensor = self.conv_a(x) * self.conv_b(x).sigmoid()
        return gated + x


def conv3(channels: int, out: int, stride: int = 1) -> nn.Conv2d:
    """Create a convolution of size 3."""
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1)


def conv5(channels: int, out: int) -> nn.Conv2d:
    """Create a convolution of size 5 that halves the grid."""
    return nn.Conv2d(channels, out, 5, stride=2, padding=2)


def deconv5(channels: int, out: int) -> nn.ConvTranspose2d:
    """Create a transposed convolution of size 5 that doubles the grid."""
    return nn.ConvTranspose2d(channels, out, 5, stride=2, padding=2, output_padding=1)


def subpixel(channels: int, out: int) -> nn.Sequential:
    """Create a convolution with pixel shuffle, which doubles the grid."""
    return nn.Sequential(conv3(channels, 4 * out), nn.PixelShuffle(2))


class Networks(NamedTuple):
    """The networks of an architecture; None if it has no such network."""

    encoder: Padded
    decoder: Padded
    hyper_encoder: nn.Sequential | None = None
    hyper_decoder: nn.Sequential | None = None
    context: MaskedConv | None = None
    entropy_parameters: nn.Sequential | None = None


def padding(height: int, width: int) -> Padding:
    """Return the padding on the left, right, top and bottom that makes both sides multiples of `MULTIPLE`."""
    (left, right), (top, bottom) = ((n // 2, n - n // 2) for n in (-width % MULTIPLE, -height % MULTIPLE))
    return left, right, top, bottom


def build(architecture: str, input_shape: tuple[int, ...], n: int, m: int) -> Networks:
    """Create the networks for samples (C, H, W).

    Args:
        architecture: one of `ARCHITECTURES`.
        input_shape: (C, H, W).
        n: N.
        m: M.

    Raises:
        AezooError: the architecture is unknown, or M differs from N with cheng2020.
    """
    if architecture not in ARCHITECTURES:
        raise AezooError(f"unknown architecture {architecture!r}: choose from {', '.join(ARCHITECTURES)}")
    cheng = architecture.startswith("cheng2020")
    if cheng and n != m:
        raise AezooError(f"{architecture} needs a latent_dim equal to width, got width {n} and latent_dim {m}")
    channels, around = input_shape[0], padding(*input_shape[1:])
    layers = _residual_layers if cheng else _plain_layers
    encoder, decoder = layers(architecture, channels, n, m)
    nets = Networks(Padded(encoder, before=around), Padded(decoder, after=tuple(-side for side in around)))  # type: ignore[arg-type]
    if "factorized" in architecture:
        return nets
    hyper = (_hyper_residual if cheng else _hyper_scales if architecture == "bmshj2018-hyperprior" else _hyper)(n, m)
    nets = nets._replace(hyper_encoder=hyper[0], hyper_decoder=hyper[1])
    if not cheng and architecture != "mbt2018":
        return nets
    widths = (4 * m, m * 10 // 3, m * 8 // 3, 2 * m)
    first, second, third = (nn.Conv2d(*pair, 1) for pair in pairwise(widths))
    parameters = nn.Sequential(first, nn.LeakyReLU(), second, nn.LeakyReLU(), third)
    return nets._replace(context=MaskedConv(m), entropy_parameters=parameters)


def _plain_layers(architecture: str, channels: int, n: int, m: int) -> tuple[list[nn.Module], list[nn.Module]]:
    def between(inverse: bool) -> nn.Module:
        return nn.ReLU() if architecture.endswith("-relu") else GDN(n, inverse)

    down, up = list[nn.Module](), list[nn.Module]()
    for before, after in ((channels, n), (n, n), (n, n)):
        down += [conv5(before, after), between(False)]
    for before in (m, n, n):
        up += [deconv5(before, n), between(True)]
    return [*down, conv5(n, m)], [*up, deconv5(n, channels)]


def _residual_layers(architecture: str, channels: int, n: int, m: int) -> tuple[list[nn.Module], list[nn.Module]]:
    def attention() -> list[nn.Module]:
        return [AttentionBlock(n)] if architecture == "cheng2020-attn" else []

    down: list[nn.Module] = [ResidualBlockWithStride(channels, n), ResidualBlock(n)]
    down += [ResidualBlockWithStride(n, n), *attention(), ResidualBlock(n)]
    down += [ResidualBlockWithStride(n, n), ResidualBlock(n), conv3(n, m, 2), *attention()]
    up: list[nn.Module] = [*attention(), ResidualBlock(n), ResidualBlockUpsample(n)]
    up += [ResidualBlock(n), ResidualBlockUpsample(n), *attention()]
    up += [ResidualBlock(n), ResidualBlockUpsample(n), ResidualBlock(n), subpixel(n, channels)]
    return down, up


def _hyper_scales(n: int, m: int) -> tuple[nn.Sequential, nn.Sequential]:
    down = nn.Sequential(conv3(m, n), nn.ReLU(), conv5(n, n), nn.ReLU(), conv5(n, n))
    return down, nn.Sequential(deconv5(n, n), nn.ReLU(), deconv5(n, n), nn.ReLU(), conv3(n, m), nn.ReLU())


def _hyper(n: int, m: int) -> tuple[nn.Sequential, nn.Sequential]:
    down = nn.Sequential(conv3(m, n), nn.LeakyReLU(), conv5(n, n), nn.LeakyReLU(), conv5(n, n))
    wide = m * 3 // 2
    up = nn.Sequential(deconv5(n, m), nn.LeakyReLU(), deconv5(m, wide), nn.LeakyReLU(), conv3(wide, 2 * m))
    return down, up


def _hyper_residual(n: int, m: int) -> tuple[nn.Sequential, nn.Sequential]:
    down = [conv3(m, n), conv3(n, n), conv3(n, n, 2), conv3(n, n), conv3(n, n, 2)]
    wide = n * 3 // 2
    up = [conv3(n, n), subpixel(n, n), conv3(n, wide), subpixel(wide, wide), conv3(wide, 2 * n)]
    return nn.Sequential(*_activated(down)), nn.Sequential(*_activated(up))


def _activated(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Insert leaky ReLU between layers."""
    return [module for layer in layers for module in (layer, nn.LeakyReLU())][:-1]
