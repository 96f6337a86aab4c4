"""Stages with generalised divisive normalisation (GDN), for learned compression, in 1, 2 or 3 dimensions.

GDN (Ballé et al. 2016, https://arxiv.org/abs/1511.06281) divides each channel by a weighted norm of all channels at the
same position. The corresponding layer of a decoder multiplies by this norm (Ballé et al. 2017,
https://arxiv.org/abs/1611.01704):

    y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)      x_i = y_i sqrt(beta_i + sum_j gamma_ij y_j^2)

The second formula is not the inverse of the first, but one step towards the inverse, which is exact for gamma = 0. A
stage is a convolution of size 5 and stride 2, with GDN between stages. A 1x1 convolution or a linear layer computes the
code; together with the adjacent stage it is one linear map, as in Ballé et al. 2018, https://arxiv.org/abs/1802.01436.
In the 2017 paper, GDN follows each stage. There is no other activation.

Shapes: B batch, C channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.nets.build import activation
from aezoo.nets.conv import CONVS, TRANSPOSED, default_hidden_dims, grids, head, map_shape, rank_of

__all__ = ["GDN", "Decoder", "Encoder", "default_hidden_dims", "map_shape"]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_LEAST_BETA = 1e-6
# weights are squares of parameters, hence never negative; a parameter of 0 would have no gradient
_OFF_DIAGONAL = 1e-2


class GDN(nn.Module):
    """Divide (or multiply) channels by a weighted norm of all channels at a position: (B, C, *grid) -> (B, C, *grid).

    Args:
        channels: C.
        inverse: multiply instead of dividing, for a decoder.
    """

    def __init__(self, channels: int, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.root_beta_C = nn.Parameter(torch.ones(channels))
        self.root_gamma_CC = nn.Parameter(torch.full((channels, channels), _OFF_DIAGONAL).fill_diagonal_(0.1**0.5))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float16:  # squares of values above 256 would overflow
            with torch.autocast(x.device.type, enabled=False):
                return self._scaled(x.float(), self.root_beta_C.float(), self.root_gamma_CC.float()).to(x.dtype)
        return self._scaled(x, self.root_beta_C, self.root_gamma_CC)

    def _scaled(self, x: Tensor, root_beta_C: Tensor, root_gamma_CC: Tensor) -> Tensor:
        beta_C, gamma_CC = self._weights(root_beta_C, root_gamma_CC)
        weighed = _CONV[x.dim() - 2](x**2, gamma_CC[(...,) + (None,) * (x.dim() - 2)], beta_C)
        return x * (weighed.sqrt() if self.inverse else weighed.rsqrt())

    def _weights(self, root_beta_C: Tensor, root_gamma_CC: Tensor) -> tuple[Tensor, Tensor]:
        return root_beta_C**2 + _LEAST_BETA, root_gamma_CC**2


class Encoder(nn.Sequential):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the channels of the stride-2 stages, `act` is not used."""

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        rank = rank_of(input_shape)
        activation(act)  # raises an error for an unknown name
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for width in hidden_dims:
            layers += [CONVS[rank](channels, width, 5, stride=2, padding=2), GDN(width)]
            channels = width
        smallest = (channels, *grids(input_shape, len(hidden_dims))[-1])
        super().__init__(*layers[:-1], head(code_shape, smallest, rank)[0])


class Decoder(nn.Sequential):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the smallest map to the largest, `act` is not used."""

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        rank = rank_of(input_shape)
        activation(act)
        sizes = grids(input_shape, len(hidden_dims))[::-1]
        widths = (*hidden_dims, input_shape[0])
        layers: list[nn.Module] = [head(code_shape, (widths[0], *sizes[0]), rank)[1]]
        for i, larger in enumerate(sizes[1:]):
            padding = tuple(1 - n % 2 for n in larger)
            up = TRANSPOSED[rank](widths[i], widths[i + 1], 5, stride=2, padding=2, output_padding=padding)
            layers += [up, GDN(widths[i + 1], inverse=True)]
        super().__init__(*(layers[:-1] if hidden_dims else layers))
