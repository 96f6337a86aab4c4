"""Networks: encoders (data -> code) and decoders (code -> data), one builder a file, chosen by name.

The file `aezoo/nets/<name>.py` of a network has a class `Encoder(input_shape, code_shape, hidden_dims, activation)` and
a class `Decoder(code_shape, input_shape, hidden_dims, activation)`, both modules that map batches of the one shape to
batches of the other, and a function `map_shape(input_shape, hidden_dims, channels)`: the feature map that a code can
be.

The other files are parts that models build on: `dictionary`, `flows`, `levels`, `messages`, `top_down`, `labels`,
`adversarial`, `features`, `tied`, `classifier`, `context`, `denoiser` and `standardise`.
"""

from aezoo.nets.build import ACTIVATIONS, NETS, WITHOUT_GRID, activation, decoder, encoder, map_shape

__all__ = ["ACTIVATIONS", "NETS", "WITHOUT_GRID", "activation", "decoder", "encoder", "map_shape"]
