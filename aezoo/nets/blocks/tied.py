"""A decoder whose weight is the transpose of the encoder's, with one shared parameter.

Shapes: B batch, X data dimensions, N units.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Transposed(nn.Module):
    """z -> W' z + c, where W_NX is the weight of another layer.

    Args:
        layer: the layer with the weight W, (N, X).
        input_shape: shape of a sample, which is the output shape.
    """

    def __init__(self, layer: nn.Linear, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.weight = layer.weight
        self.bias = nn.Parameter(torch.zeros(math.prod(input_shape)))

    def forward(self, z_BN: Tensor) -> Tensor:
        """(B, N) -> (B, *input_shape)."""
        return F.linear(z_BN, self.weight.T, self.bias).unflatten(1, self.input_shape)
