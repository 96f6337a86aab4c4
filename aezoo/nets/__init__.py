"""Networks: encoders (data -> code) and decoders (code -> data), one builder a file, chosen by name.

Every file `aezoo/nets/<name>.py` has a class `Encoder(input_shape, code_shape, hidden_dims, activation)` and a class
`Decoder(code_shape, input_shape, hidden_dims, activation)`, both modules that map batches of the one shape to batches
of the other, and a function `map_shape(input_shape, hidden_dims, channels)`: the feature map that a code can be.
"""

from aezoo.nets.build import ACTIVATIONS, NETS, activation, decoder, encoder, map_shape

__all__ = ["ACTIVATIONS", "NETS", "activation", "decoder", "encoder", "map_shape"]
