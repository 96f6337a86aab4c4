"""Networks: encoders (data -> code) and decoders (code -> data), one file per network, chosen by name.

The file `aezoo/nets/<name>.py` of a network defines a class `Encoder(input_shape, code_shape, hidden_dims, activation)`
and a class `Decoder(code_shape, input_shape, hidden_dims, activation)`, modules that map batches of the first shape to
batches of the second. It also defines the functions `map_shape(input_shape, hidden_dims, channels)`, which returns the
shape of a code that is a feature map, and `default_hidden_dims(input_shape)`.

Code that several networks or models share is in `aezoo.nets.blocks`.
"""

from aezoo.nets.build import (
    ACTIVATIONS,
    NETS,
    WITHOUT_GRID,
    activation,
    decoder,
    default_hidden_dims,
    encoder,
    initialise,
    is_timm,
    map_shape,
    without_weights,
)

__all__ = [
    "ACTIVATIONS",
    "NETS",
    "WITHOUT_GRID",
    "activation",
    "decoder",
    "default_hidden_dims",
    "encoder",
    "initialise",
    "is_timm",
    "map_shape",
    "without_weights",
]
