"""Backbones of timm as encoders, with a decoder of aezoo: net="timm:NAME,OPTION,..".

`aezoo.nets.blocks.timm_backbone` describes NAME and OPTION.
The encoder is the backbone up to its last feature map, or to the feature map that `out_indices` selects, followed by a
linear layer (for a vector) or a 1x1 convolution (for a map) to the code. The decoder is that of net conv, or with
`decoder=KIND` that of resnet, convnext or mlp; `hidden_dims` are its widths, ordered from the sample to the code as for
other networks. By default, it has as many stages as there are halvings between the sample's grid and the feature map's.
If a grid cannot be reached by halving the sample's grid, the map is resized before the first stage.
"""

import importlib
from functools import partial
from types import ModuleType, SimpleNamespace

from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets import conv
from aezoo.nets.blocks.timm_backbone import Backbone, Description, parse, plan
from aezoo.nets.build import activation

_STAGED = ("conv", "resnet", "convnext")
_DECODERS = (*_STAGED, "mlp")


def described(text: str) -> SimpleNamespace:
    """Return what the file of a network defines, for the backbone that a text describes.

    Raises:
        AezooError: the text is invalid.
    """
    description = parse(text)
    if description.decoder not in _DECODERS or len(description.out_indices) > 1:
        raise AezooError(f"net {text!r}: decoder takes {', '.join(_DECODERS)}, and out_indices one number")
    return SimpleNamespace(
        Encoder=partial(Encoder, description),
        Decoder=partial(decoder, description),
        map_shape=partial(map_shape, description),
        default_hidden_dims=partial(default_hidden_dims, description),
    )


def _decoder(description: Description) -> ModuleType:
    return importlib.import_module(f"aezoo.nets.{description.decoder}")


def default_hidden_dims(description: Description, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """See `nets.default_hidden_dims`."""
    grid, stages = map_shape(description, input_shape, (), 1)[1:], 1
    module = _decoder(description)
    usual: tuple[int, ...] = module.default_hidden_dims(input_shape)
    if description.decoder == "mlp":
        narrowed: tuple[int, ...] = module.narrowed(usual, input_shape)
        return narrowed
    while any(own > theirs for own, theirs in zip(conv.grids(input_shape, stages)[-1], grid, strict=True)):
        stages += 1
    return (usual + usual[-1:] * stages)[:stages]


def map_shape(
    description: Description, input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], channels: int
) -> tuple[int, ...]:
    """Return (channels, *grid) for the grid of the backbone's last map."""
    return (channels, *plan(description, tuple(input_shape), last_only=True).shapes[-1][1:])


class Encoder(nn.Module):
    """(B, C, H, W) -> (B, *code_shape); `hidden_dims` and the activation are the decoder's."""

    def __init__(
        self,
        description: Description,
        input_shape: tuple[int, ...],
        code_shape: tuple[int, ...],
        hidden_dims: tuple[int, ...],
        act: str,
    ) -> None:
        super().__init__()
        activation(act)  # raises an error for an unknown name
        self.backbone = Backbone(description, tuple(input_shape), last_only=True)
        self.head = conv.head(code_shape, self.backbone.shapes[-1], 2)[0]

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.backbone(x)[-1])
        return z


def decoder(
    description: Description,
    code_shape: tuple[int, ...],
    input_shape: tuple[int, ...],
    hidden_dims: tuple[int, ...],
    act: str,
) -> nn.Module:
    """(B, *code_shape) -> (B, *input_shape); `hidden_dims` from the code to the sample."""
    module, before = _decoder(description), []
    if description.decoder in _STAGED and len(code_shape) > 1:
        grid = conv.grids(input_shape, len(hidden_dims))[-1]
        if tuple(code_shape[1:]) != grid:
            before = [nn.Upsample(size=grid, mode="bilinear")]
        code_shape = (code_shape[0], *grid)
    layers: nn.Module = module.Decoder(code_shape, input_shape, hidden_dims, act)
    return nn.Sequential(*before, *layers.children())
