"""Models whose encoder and decoder are networks of a kind that an argument selects."""

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from torch import nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder
from aezoo.training.arguments import OptimizerArgs, TrainingArgs


class FixedLikelihoodArgs(OptimizerArgs, total=False):
    """Arguments of `NetworkAutoencoder` for models that choose the likelihood themselves."""

    net: str
    hidden_dims: tuple[int, ...] | None
    activation: str


class NetworkArgs(FixedLikelihoodArgs, TrainingArgs, total=False):
    """Arguments of `NetworkAutoencoder`."""


class LatentArgs(NetworkArgs, total=False):
    """`NetworkArgs` with the size of the code, which the models define."""

    latent_dim: int


class NetworkAutoencoder(Autoencoder):
    """A model with networks of one kind; its constructor builds them with `build_encoder` and `build_decoder`.

    A subclass may set default widths for some kinds: `class MyAE(NetworkAutoencoder, hidden_dims={"mlp": (256,)})`.

    Attributes:
        own_hidden_dims: these widths, including inherited ones.

    Args:
        input_shape: shape of one sample; any for net mlp, (C, L), (C, H, W) or (C, D, H, W) for the others.
        net: mlp, conv, resnet, convnext, conv_keras, unet, gdn, dc, ldm, vit, mixer, lstm or transformer; or
            timm:NAME, a backbone of timm as encoder, such as timm:resnet18.a1_in1k,pretrained,frozen.
        hidden_dims: widths of the encoder's layers (mlp) or channels of its stages; the decoder mirrors them. None
            chooses them by net and sample size; `aezoo info NAME --shape C H W` shows the choice.
        activation: relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus, identity or (mlp) gated, between layers.
    """

    own_hidden_dims: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    # models that build their networks differently do not call this constructor
    net: str = ""

    def __init_subclass__(cls, *, hidden_dims: Mapping[str, tuple[int, ...]] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.own_hidden_dims = {**cls.own_hidden_dims, **(hidden_dims or {})}

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        net: str = "mlp",
        hidden_dims: tuple[int, ...] | None = None,
        activation: str = "relu",
        **kwargs: Unpack[TrainingArgs],
    ) -> None:
        super().__init__(input_shape, **kwargs)
        self.net = net
        if nets.is_timm(net) and "net" in self.hparams:
            self.update_hyperparameters(net=nets.without_weights(net))  # a checkpoint has the weights
        if hidden_dims is None:
            hidden_dims = self.default_hidden_dims
            if "hidden_dims" in self.hparams:
                self.update_hyperparameters(hidden_dims=hidden_dims)
        self.hidden_dims = hidden_dims
        self.activation = activation

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if nets.is_timm(self.net):
            # Lightning warns about this; frozen backbones and BatchNorm are meant to be in eval mode
            warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start")

    @property
    def default_hidden_dims(self) -> tuple[int, ...]:
        """Return the default `hidden_dims` for this net and input_shape."""
        return nets.default_hidden_dims(self.net, self.input_shape, self.own_hidden_dims.get(self.net))

    def build_encoder(self, code_shape: tuple[int, ...]) -> nn.Module:
        """Create a network from samples to codes, (B, *input_shape) -> (B, *code_shape)."""
        return nets.encoder(self.net, self.input_shape, code_shape, self.hidden_dims, self.activation)

    def build_decoder(self, code_shape: tuple[int, ...]) -> nn.Module:
        """Create a network from codes to samples, (B, *code_shape) -> (B, *input_shape)."""
        return nets.decoder(self.net, code_shape, self.input_shape, self.hidden_dims[::-1], self.activation)
