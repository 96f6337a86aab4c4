"""Multi-layer perceptron: flatten, linear layers with an activation between them, unflatten."""

import math
from itertools import pairwise

from torch import nn

from aezoo.errors import AezooError
from aezoo.nets.build import activation


def _layers(dims: tuple[int, ...], act: str) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(dims):
        layers += [nn.Linear(n_in, n_out), activation(act)]
    return layers[:-1]


class Encoder(nn.Sequential):
    """(B, *input_shape) -> (B, *code_shape) through `hidden_dims`; no activation after the last layer."""

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        dims = (math.prod(input_shape), *hidden_dims, math.prod(code_shape))
        super().__init__(nn.Flatten(), *_layers(dims, act), nn.Unflatten(1, code_shape))


class Decoder(nn.Sequential):
    """(B, *code_shape) -> (B, *input_shape) through `hidden_dims`; no activation after the last layer."""

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        dims = (math.prod(code_shape), *hidden_dims, math.prod(input_shape))
        super().__init__(nn.Flatten(), *_layers(dims, act), nn.Unflatten(1, input_shape))


def map_shape(input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """An mlp has no grid."""
    raise AezooError("an mlp has no feature map: take net='conv' or net='resnet', or leave latent_map off")
