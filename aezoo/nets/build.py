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
# networks whose output is a single vector
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
    """Whether a network is a backbone of timm, see `aezoo.nets.timm`."""
    return name.startswith(TIMM)


def without_weights(name: str) -> str:
    """The same network, without asking for pretrained weights, since they come from elsewhere."""
    parts = name.split(",")
    return ",".join(part for part in parts if not is_timm(name) or part.partition("=")[0].strip() != "pretrained")


def activation(name: str) -> nn.Module:
    """A fresh activation module by name.

    Raises:
        AezooError: the name is not in `ACTIVATIONS`.
    """
    if name == "gated":
        raise AezooError("activation 'gated' is one of layers in net='mlp' alone: take another, such as relu or silu")
    if name not in ACTIVATIONS:
        raise AezooError(f"unknown activation {name!r}: take one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def initialise(net: nn.Module, weight_init: str) -> None:
    """Draw the initial weights of a network's linear layers and convolutions.

    Args:
        net: changed in place.
        weight_init: default leaves them as they are, from torch's own rule, U(-1/sqrt(n_in), 1/sqrt(n_in)). glorot is
            Keras' rule: weights from U(-a, a) with a = sqrt(6 / (n_in + n_out)) (Glorot and Bengio 2010,
            https://proceedings.mlr.press/v9/glorot10a.html), biases 0.

    Raises:
        AezooError: an unknown rule.
    """
    if weight_init not in WEIGHT_INITS:
        raise AezooError(f"unknown weight_init {weight_init!r}: take one of {', '.join(WEIGHT_INITS)}")
    if weight_init == "default":
        return
    for layer in net.modules():
        if isinstance(layer, _WITH_FANS):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _net(name: str, hidden_dims: tuple[int, ...]) -> ModuleType | SimpleNamespace:
    if name not in NETS and not is_timm(name):
        raise AezooError(f"unknown net {name!r}: take one of {', '.join(NETS)}, or timm:NAME")
    if any(int(width) != width or width < 1 for width in hidden_dims):
        raise AezooError(f"hidden_dims must be whole numbers above 0, got {tuple(hidden_dims)}")
    return import_module("aezoo.nets.timm").described(name) if is_timm(name) else import_module(f"aezoo.nets.{name}")


def default_hidden_dims(
    name: str, input_shape: tuple[int, ...], of_paper: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    """Widths or channels with which a network of samples of this shape trains at the cost that docs/networks.md states.

    Args:
        name: a network's name.
        input_shape: shape of one sample.
        of_paper: those of a model's paper for this network, if it has any. They are kept, but for mlp and samples of
            so many values that its first layer would have more than 8 million weights.

    Raises:
        AezooError: an unknown name, or a shape that the network cannot take.
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
    """A network that maps (B, *input_shape) to (B, *code_shape).

    Args:
        name: `mlp`, `lstm` and `transformer` take any shape, the last two as steps; `conv`, `resnet`, `convnext`,
            `conv_keras`, `unet`, `gdn`, `dc`, `ldm`, `vit` and `mixer` take (C, L), (C, H, W) or (C, D, H, W) of
            any size; `timm:NAME`, see `aezoo.nets.timm`, takes images.
        input_shape: shape of one sample.
        code_shape: (D,) for a vector; for all but mlp, lstm and transformer also a feature map, see `map_shape`.
        hidden_dims: widths of the layers (mlp, lstm), of the blocks (transformer, vit, mixer) or channels of the
            stages, of stride 2 (the others).
        act: an activation's name; gated for mlp only.

    Raises:
        AezooError: an unknown name, or shapes that the network cannot take.
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
    """The mirror of `encoder`: (B, *code_shape) to (B, *input_shape), `hidden_dims` in the decoder's own order."""
    module: nn.Module = _net(name, hidden_dims).Decoder(code_shape, input_shape, hidden_dims, act)
    return module


def map_shape(name: str, input_shape: tuple[int, ...], hidden_dims: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Shape of a code that is a feature map: `channels` on the encoder's smallest grid.

    Raises:
        AezooError: the network has no grid (mlp), or its input has none.
    """
    shape: tuple[int, ...] = _net(name, hidden_dims).map_shape(input_shape, hidden_dims, channels)
    return shape
