"""Frozen networks whose activations are compared in feature losses."""

import math
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets.blocks.pretrained import cached_weights
from aezoo.nets.build import ACTIVATIONS, encoder
from aezoo.nets.resnet import ResidualBlock
from aezoo.training.precision import at_least_float32

VGG = ("vgg16", "vgg19")
RANDOM_WIDTHS = {"conv": (16, 32, 64), "mlp": (512, 512)}


class FeatureDistance:
    """The distance of two batches in the features of a network that is not part of the model.

    The model holds it as a plain object, so it is not saved, trained or synchronised between ranks. It moves to the
    device of the data.

    Args:
        features: random, vgg16, vgg19 or the path of a file of VGG weights (.pth); with none, all distances are 0.
        input_shape: shape of one sample.
        argument: the network's name in the model's arguments.

    Raises:
        AezooError: no such network.
    """

    def __init__(self, features: str, input_shape: tuple[int, ...], argument: str = "features") -> None:
        if features not in ("none", "random", *VGG) and not features.endswith(".pth"):
            raise AezooError(
                f"{argument} takes none, random, {', '.join(VGG)} or the path of a .pth file, got {features!r}"
            )
        self.features, self.input_shape = features, input_shape
        self.net = random_features(input_shape) if features == "random" else None

    @property
    def channels(self) -> int:
        """Channels of the last feature layer, for samples with a grid."""
        return RANDOM_WIDTHS["conv"][-1] if self.features == "random" else 256

    def read(self) -> "FeatureNet | None":
        """The network, loaded from its file on the first call, so that a model can be loaded without the file.

        Raises:
            AezooError: there is no such file, or it does not fit the data.
        """
        if self.net is None and self.features != "none":
            self.net = vgg_features(self.features, self.input_shape)
        return self.net

    def move_to(self, x: Tensor) -> Self:
        """Return self, with the network on the device and in the precision of the data, at least float32.

        Call this before a transform of torch.func, inside which a module cannot be moved.
        """
        net, x = self.read(), at_least_float32(x)
        if net is not None and (net.mean.device != x.device or net.mean.dtype != x.dtype):
            net.to(x)
        return self

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Sum over layers l of ||F_l(x_hat) - F_l(x)||^2 / (2 n_l), (B, *shape), (B, *shape) -> (B,)."""
        x_hat, x = at_least_float32(x_hat), at_least_float32(x)
        net = self.move_to(x).read()
        if net is None:
            return x.new_zeros(len(x))
        with torch.autocast(x.device.type, enabled=False):
            pairs = zip(net(x_hat), net(x), strict=True)
            return torch.stack([((a - b) ** 2).flatten(1).mean(1) / 2 for a, b in pairs]).sum(0)


class FeatureNet(nn.Module):
    """A sequence of layers, the outputs of some of which are features.

    Args:
        layers: the network up to its last feature layer.
        layer_indices: indices of the feature layers; by default activations and residual blocks.
        imagenet: convert data in [0, 1] to three channels and ImageNet's scale.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: list[nn.Module], layer_indices: tuple[int, ...] = (), imagenet: bool = False) -> None:
        super().__init__()
        kinds = (*ACTIVATIONS.values(), ResidualBlock)
        self.read = layer_indices or tuple(i for i, layer in enumerate(layers) if isinstance(layer, kinds))
        self.layers = nn.ModuleList(layers[: max(self.read, default=-1) + 1])
        self.imagenet = imagenet
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """The outputs of the feature layers, (B, ...) each."""
        x = x.to(next(self.parameters()).dtype)
        if self.imagenet:
            x = (x - self.mean) / self.std
        features = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.read:
                features.append(x.float() if x.dtype in (torch.bfloat16, torch.float16) else x)
        return features


def random_features(input_shape: tuple[int, ...]) -> FeatureNet:
    """Strided convolutions for data with a grid, else an MLP, with He-normal weights from a fixed seed."""
    rng = np.random.RandomState(0)  # NumPy guarantees its stream (NEP 19)
    kind = "conv" if len(input_shape) > 1 else "mlp"
    with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced, must not use up random numbers
        net = FeatureNet([*encoder(kind, input_shape, (1,), RANDOM_WIDTHS[kind]).children()])
    for p in net.parameters():
        fan_in = p[0].numel()
        drawn = rng.standard_normal(tuple(p.shape)) * math.sqrt(2 / fan_in) if p.ndim > 1 else np.zeros(tuple(p.shape))
        p.copy_(torch.from_numpy(drawn))
    return net


def vgg_features(name: str, input_shape: tuple[int, ...]) -> FeatureNet:
    """The first layers of VGG-16 or VGG-19, which differ only in their weights."""
    if len(input_shape) != 3 or input_shape[0] not in (1, 3) or min(input_shape[1:]) < 4:
        raise AezooError(f"{name} takes images of 1 or 3 channels and at least 4 x 4, got {input_shape}: take random")
    layers: list[nn.Module] = []
    for width, before in ((64, 3), (64, 64), (0, 0), (128, 64), (128, 128), (0, 0), (256, 128)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
    net = FeatureNet(layers, layer_indices=(1, 6, 11), imagenet=True)
    known, file = (name, None) if name in VGG else ("a VGG network", Path(name))
    with cached_weights(known, "take features random", file) as state:
        for i, layer in enumerate(layers):
            layer.load_state_dict({key: state[f"features.{i}.{key}"] for key in layer.state_dict()})
    return net
