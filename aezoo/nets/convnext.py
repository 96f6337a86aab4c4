"""ConvNeXt stages (Liu et al. 2022, https://arxiv.org/abs/2201.03545): each is a stride-2 convolution and a block.

A block has a depthwise convolution of size 7, a normalisation over the channels at each position, and two pointwise
layers with four times as many channels between them; its output is added to its input. It works in 1, 2 or 3
dimensions, for any size.
"""

from torch import Tensor, nn

from aezoo.nets import resnet
from aezoo.nets.build import activation
from aezoo.nets.conv import CONVS, map_shape
from aezoo.nets.resnet import default_hidden_dims

__all__ = ["ConvNeXtBlock", "Decoder", "Encoder", "default_hidden_dims", "map_shape"]


class ConvNeXtBlock(nn.Module):
    """x + pointwise(act(pointwise(norm(depthwise(x))))), channels and grid unchanged.

    Args:
        rank: 1, 2 or 3 grid dimensions.
        channels: number of input and output channels.
        act: an activation's name; GELU in the paper.
    """

    def __init__(self, rank: int, channels: int, act: str) -> None:
        super().__init__()
        self.depthwise = CONVS[rank](channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pointwise = nn.Sequential(
            nn.Linear(channels, 4 * channels), activation(act), nn.Linear(4 * channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        # pointwise layers are linear layers over the channels
        h = self.pointwise(self.norm(self.depthwise(x).movedim(1, -1)))
        return x + h.movedim(-1, 1)


class Encoder(resnet.Encoder):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the channels of the stride-2 stages."""

    block = ConvNeXtBlock


class Decoder(resnet.Decoder):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the smallest map to the largest."""

    block = ConvNeXtBlock
