"""The convolutional network of Keras' VAE (Chollet 2020), https://keras.io/examples/generative/vae/

The encoder has stride-2 convolutions, a dense layer of 16 units, and a dense layer to the code. The decoder has a dense
layer to the smallest map, then one transposed convolution of stride 2 per stage, from the smallest map to the largest,
with the channels of that stage, and finally a convolution of stride 1 to the channels of the data. The activation
follows every layer except the last layer of the encoder and of the decoder. If the code is a map, as in
https://keras.io/examples/generative/vq_vae/, a 1x1 convolution replaces the encoder's dense layers, and the decoder has
no dense layer.

For 1x28x28, channels (32, 64) and two codes (mean and variance), it has 69,076 and 65,089 parameters, as in Keras; for
a map of 16 channels, it has 19,856 and 28,033, as Keras' VQ-VAE. Initial weights are also those of Keras: the rule of
Glorot and Bengio (2010), with biases of 0. Keras pads strided convolutions only at the far side; here both sides are
padded, as in `conv`, so that every size is restored exactly.
"""

from torch import nn

from aezoo.errors import AezooError
from aezoo.nets.build import activation, initialise
from aezoo.nets.conv import CONVS, TRANSPOSED, default_hidden_dims, grids, head, map_shape, rank_of

__all__ = ["Decoder", "Encoder", "default_hidden_dims", "map_shape"]

_DENSE = 16


class Encoder(nn.Sequential):
    """(B, C, *grid) -> (B, *code_shape); `hidden_dims` are the channels of the stride-2 stages."""

    def __init__(
        self, input_shape: tuple[int, ...], code_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        rank = rank_of(input_shape)
        layers: list[nn.Module] = []
        channels = input_shape[0]
        for width in hidden_dims:
            layers += [CONVS[rank](channels, width, 3, stride=2, padding=1), activation(act)]
            channels = width
        smallest = (channels, *grids(input_shape, len(hidden_dims))[-1])
        if len(code_shape) > 1:
            super().__init__(*layers, head(code_shape, smallest, rank)[0])
        else:
            down = head((_DENSE,), smallest, rank)[0]
            super().__init__(*layers, down, activation(act), nn.Linear(_DENSE, code_shape[0]))
        initialise(self, "glorot")


class Decoder(nn.Sequential):
    """(B, *code_shape) -> (B, C, *grid); `hidden_dims` from the smallest map to the largest."""

    def __init__(
        self, code_shape: tuple[int, ...], input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], act: str
    ) -> None:
        rank = rank_of(input_shape)
        sizes = grids(input_shape, len(hidden_dims))[::-1]
        channels = hidden_dims[0] if hidden_dims else input_shape[0]
        layers: list[nn.Module] = []
        if len(code_shape) == 1:
            layers += [head(code_shape, (channels, *sizes[0]), rank)[1], activation(act)]
        elif tuple(code_shape[1:]) == sizes[0]:
            channels = code_shape[0]
        else:
            raise AezooError(
                f"a code of shape {tuple(code_shape)} does not fit: these stages leave a grid of {sizes[0]}"
            )
        for width, larger in zip(hidden_dims, sizes[1:], strict=True):
            padding = tuple(1 - n % 2 for n in larger)
            up = TRANSPOSED[rank](channels, width, 3, stride=2, padding=1, output_padding=padding)
            layers += [up, activation(act)]
            channels = width
        super().__init__(*layers, CONVS[rank](channels, input_shape[0], 3, padding=1))
        initialise(self, "glorot")
