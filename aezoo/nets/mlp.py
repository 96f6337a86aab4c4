"""Multi-layer perceptron: linear layers on flattened samples, with an activation between them.

Activation `gated`: each hidden layer is (W x + b) sigmoid(V x + c), the gated linear unit (Dauphin et al. 2016,
https://arxiv.org/abs/1612.08083), as in the networks of the VampPrior paper.
"""

import math
from itertools import pairwise

from torch import nn

from aezoo.errors import AezooError
from aezoo.nets.build import activation

# of the first layer of the encoder and the last layer of the decoder
_MOST_WEIGHTS = 2**23


def default_hidden_dims(input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `nets.default_hidden_dims`: the width in the VAE paper's experiments on images of MNIST's size."""
    return (400,)


def narrowed(hidden_dims: tuple[int, ...], input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Reduce the first width such that its layer has at most 2^23 weights, about 8 million."""
    most = max(1, _MOST_WEIGHTS // math.prod(input_shape))
    return (*(min(width, most) for width in hidden_dims[:1]), *hidden_dims[1:])


def _layers(dims: tuple[int, ...], act: str) -> list[nn.Module]:
    if act != "gated":
        activation(act)  # raises an error for an unknown name even if there is no hidden layer
    layers: list[nn.Module] = []
    *hidden, last = pairwise(dims)
    for n_in, n_out in hidden:
        if act == "gated":
            layers += [nn.Linear(n_in, 2 * n_out), nn.GLU(1)]
        else:
            layers += [nn.Linear(n_in, n_out), activation(act)]
    return [*layers, nn.Linear(*last)]


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
    """Raise an error, because an mlp has no grid."""
    raise AezooError("an mlp has no feature map: use net='conv' or net='resnet', or leave latent_map off")
