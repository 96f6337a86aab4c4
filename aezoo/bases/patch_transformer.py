"""Models with vision transformers on the patches of a sample, as encoder or as encoder and decoder."""

from typing import Any

from aezoo.autoencoder import Autoencoder
from aezoo.training.arguments import TrainingArgs
from aezoo.training.limits import check_at_least


class PatchEncoderArgs(TrainingArgs, total=False):
    """Arguments of `PatchEncoder`."""

    patch_size: int
    width: int
    depth: int
    activation: str


class PatchTransformerArgs(PatchEncoderArgs, total=False):
    """Arguments of `PatchTransformer`."""

    decoder_width: int
    decoder_depth: int


class PatchEncoder(Autoencoder):
    """A model whose encoder is a transformer on patches; its constructor builds it.

    Args:
        input_shape: (C, L), (C, H, W) or (C, D, H, W), of any size.
        patch_size: side of a patch; 0 selects it such that a sample has at most 64 patches, with a side of at most 16.
        width: size of a token in the encoder.
        depth: number of blocks of the encoder.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.

    Attributes:
        widths: width of each block of the encoder.
    """

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        patch_size: int = 0,
        width: int = 64,
        depth: int = 4,
        activation: str = "gelu",
        **kwargs: Any,
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, width=width, depth=depth)
        self.patch_size = patch_size
        self.width = width
        self.widths = (width,) * depth
        self.activation = activation


class PatchTransformer(PatchEncoder):
    """A `PatchEncoder` whose decoder is also a transformer.

    Args:
        decoder_width: size of a token in the decoder.
        decoder_depth: number of blocks of the decoder.

    Attributes:
        decoder_widths: width of each block of the decoder.
    """

    def __init__(
        self, input_shape: tuple[int, ...], *, decoder_width: int = 64, decoder_depth: int = 2, **kwargs: Any
    ) -> None:
        super().__init__(input_shape, **kwargs)
        check_at_least(1, decoder_width=decoder_width, decoder_depth=decoder_depth)
        self.decoder_width = decoder_width
        self.decoder_widths = (decoder_width,) * decoder_depth
