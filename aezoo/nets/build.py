"""Networks and activations by name."""

from importlib import import_module
from types import ModuleType, SimpleNamespace

from torch import nn

from aezoo.errors import AezooError

NETS = (
    "mlp",
    "conv",
    "resnet",
    "conv_keras",
    "vit",
    "mixer",
    "convnext",
    "unet",
    "gdn",
    "dc",
    "ldm",
    "lstm",
    "transformer",
)
TIMM = "timm:"
WEIGHT_INITS = ("default", "glorot")
_WITH_FANS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# networks whose code is always a vector
WITHOUT_GRID = ("mlp", "lstm", "transformer")
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "identity": nn.Identity,
}


def is_timm(name: str) -> bool:
    """Return whether a name is that of a timm backbone, see `aezoo.nets.timm`."""
    return name.startswith(TIMM)


def without_weights(name: str) -> str:
    """Remove the option `pretrained` from a network's name, for models whose weights are loaded afterwards."""
    parts = name.split(",")
    return ",".join(part for part in parts if not is_timm(name) or part.partition("=")[0].strip() != "pretrained")


def activation(name: str) -> nn.Module:
    """Create an activation module by name.

    Raises:
        AezooError: the name is not in `ACTIVATIONS`.
    """
    if name == "gated":
        raise AezooError("activation 'gated' is only available with net='mlp': use another, such as relu or silu")
    if name not in ACTIVATIONS:
        raise AezooError(f"unknown activation {name!r}: choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def initialise(net: nn.Module, weight_init: str) -> None:
    """Draw the initial weights of a network's linear layers and convolutions.

    Args:
        net: the network, changed in place.
        weight_init: default keeps torch's initial weights, U(-1/sqrt(n_in), 1/sqrt(n_in)). glorot is
            Keras' rule: weights from U(-a, a) with a = sqrt(6 / (n_in + n_out)) (Glorot and Bengio 2010,
            https://proceedings.mlr.press/v9/glorot10a.html), biases 0.

    Raises:
        AezooError: the rule is unknown.
    """
    if weight_init not in WEIGHT_INITS:
        raise AezooError(f"unknown weight_init {weight_init!r}: choose from {', '.join(WEIGHT_INITS)}")
    if weight_init == "default":
        return
    for layer in net.modules():
        if isinstance(layer, _WITH_FANS):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _net(name: str, hidden_dims: tuple[int, ...]) -> ModuleType | SimpleNamespace:
    if name not in NETS and not is_timm(name):
        raise AezooError(f"unknown net {name!r}: choose from {', '.join(NETS)}, or timm:NAME")
    if any(int(width) != width or width < 1 for width in hidden_dims):
        raise AezooError(f"hidden_dims must be whole numbers above 0, got {tuple(hidden_dims)}")
    return import_module("aezoo.nets.timm").described(name) if is_timm(name) else import_module(f"aezoo.nets.{name}")


def default_hidden_dims(
    name: str, input_shape: tuple[int, ...], of_paper: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Return widths or channels for samples of this shape, with the training cost stated in docs/networks.md.

    Args:
        name: a network's name.
        input_shape: shape of one sample.
        of_paper: the values in the paper of a model for this network, if it has any. They are used unchanged, except in
            an mlp whose first layer would have more than 8 million weights.

    Raises:
        AezooError: the name is unknown, or the network does not support the shape.
    """
    module = _net(name, of_paper or ())
    dims: tuple[int, ...] = module.default_hidden_dims(input_shape) if of_paper is None else of_paper
    return module.narrowed(dims, input_shape) if name == "mlp" else dims


def encoder(
    name: str,
    input_shape: tuple[int, ...],
    code_shape: tuple[int, ...],
    hidden_dims: tuple[int, ...],
    act: str = "relu",
) -> nn.Module:
    """Create a network that maps (B, *input_shape) to (B, *code_shape).

    Args:
        name: `mlp`, `lstm` and `transformer` take any shape, the last two as a sequence of steps; `conv`, `resnet`,
            `convnext`, `conv_keras`, `unet`, `gdn`, `dc`, `ldm`, `vit` and `mixer` take (C, L), (C, H, W) or (C, D, H,
            W) of any size; `timm:NAME`, see `aezoo.nets.timm`, takes images.
        input_shape: shape of one sample.
        code_shape: (D,) for a vector; networks other than mlp, lstm and transformer also support feature maps, see
            `map_shape`.
        hidden_dims: widths of the layers (mlp, lstm) or blocks (transformer, vit, mixer), or channels of the stride-2
            stages (all others).
        act: an activation's name; gated for mlp only.

    Raises:
        AezooError: the name is unknown, or the network does not support the shapes.
    """
    module: nn.Module = _net(name, hidden_dims).Encoder(input_shape, code_shape, hidden_dims, act)
    return module


def decoder(
    name: str,
    code_shape: tuple[int, ...],
    input_shape: tuple[int, ...],
    hidden_dims: tuple[int, ...],
    act: str = "relu",
) -> nn.Module:
    """Create the decoder for `encoder`, (B, *code_shape) to (B, *input_shape); `hidden_dims` in decoder order."""
    module: nn.Module = _net(name, hidden_dims).Decoder(code_shape, input_shape, hidden_dims, act)
    return module


def map_shape(name: str, input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Return the shape of a code that is a feature map, with `channels` channels on the encoder's smallest grid.

    Raises:
        AezooError: the network or its input has no grid.
    """
    shape: tuple[int, ...] = _net(name, hidden_dims).map_shape(input_shape, hidden_dims, channels)
    return shape
