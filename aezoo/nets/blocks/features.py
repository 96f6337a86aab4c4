"""Frozen networks whose activations are compared in feature losses."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets.blocks.pretrained import cached_file, cached_weights
from aezoo.nets.build import ACTIVATIONS, encoder
from aezoo.nets.resnet import ResidualBlock
from aezoo.training.precision import at_least_float32

VGG = ("vgg16", "vgg19")
# 4 poolings
_LPIPS_SIDE = 16
RANDOM_WIDTHS = {"conv": (16, 32, 64), "mlp": (512, 512)}


class FeatureDistance:
    """The distance of two batches in the features of a network that is not part of the model.

    The model holds it as a plain object, so it is not saved, trained or synchronised between ranks. It moves to the
    device of the data.

    Args:
        features: random, lpips, vgg16, vgg19 or the path of a file of VGG weights (.pth); with none, all distances
            are 0.
        input_shape: shape of one sample.
        argument: the network's name in the model's arguments.

    Raises:
        AezooError: no such network.
    """

    def __init__(self, features: str, input_shape: tuple[int, ...], argument: str = "features") -> None:
        if features not in ("none", "random", "lpips", *VGG) and not features.endswith(".pth"):
            raise AezooError(
                f"{argument} takes none, random, lpips, {', '.join(VGG)} or the path of a .pth file, got {features!r}"
            )
        self.features, self.input_shape = features, input_shape
        self.net = random_features(input_shape) if features == "random" else None

    @property
    def channels(self) -> int:
        """Channels of the last feature layer, for samples with a grid."""
        return {"random": RANDOM_WIDTHS["conv"][-1], "lpips": 512}.get(self.features, 256)

    def read(self) -> "FeatureNet | None":
        """The network, loaded from its file on the first call, so that a model can be loaded without the file.

        Raises:
            AezooError: there is no such file, or it does not fit the data.
        """
        if self.net is None and self.features != "none":
            lpips = self.features == "lpips"
            self.net = lpips_features(self.input_shape) if lpips else vgg_features(self.features, self.input_shape)
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
        """The network's distance, 0 without one: (B, *shape), (B, *shape) -> (B,)."""
        x_hat, x = at_least_float32(x_hat), at_least_float32(x)
        net = self.move_to(x).read()
        if net is None:
            return x.new_zeros(len(x))
        with torch.autocast(x.device.type, enabled=False):
            return net.distance(net(x_hat), net(x))


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

    def distance(self, features: list[Tensor], others: list[Tensor]) -> Tensor:
        """Sum over layers l of ||F_l - F'_l||^2 / (2 n_l), (B, ...) each -> (B,)."""
        pairs = zip(features, others, strict=True)
        return torch.stack([((a - b) ** 2).flatten(1).mean(1) / 2 for a, b in pairs]).sum(0)


class LPIPS(FeatureNet):
    """Learned perceptual similarity (Zhang et al. 2018), https://arxiv.org/abs/1801.03924

    Features have length 1 at each place, and weights of their channels agree with human judgements.

    Args:
        layers: those of VGG-16.
        channel_weights: w_l, the weights of the channels of each feature layer.
    """

    def __init__(self, layers: list[nn.Module], channel_weights: Sequence[Tensor]) -> None:
        super().__init__(layers, layer_indices=(3, 8, 15, 22, 29), imagenet=True)
        for i, weight in enumerate(channel_weights):
            self.register_buffer(f"weight_{i}", weight.flatten()[:, None, None])

    def distance(self, features: list[Tensor], others: list[Tensor]) -> Tensor:
        """Sum over layers of the mean over places of sum_c w_c (F_c / ||F|| - F'_c / ||F'||)^2."""
        total = []
        for i, pair in enumerate(zip(features, others, strict=True)):
            # 1e-8 as in torchmetrics: where all activations are 0, the root has no slope
            a, b = (f / (f.square().sum(1, keepdim=True) + 1e-8).sqrt() for f in pair)
            total.append((self.get_buffer(f"weight_{i}") * (a - b).square()).sum(1).mean((1, 2)))
        return torch.stack(total).sum(0)


def default_features(input_shape: tuple[int, ...]) -> str:
    """What `features=auto` means: lpips for its images if torch.hub has VGG-16's weights here, else random."""
    fits = len(input_shape) == 3 and input_shape[0] in (1, 3) and min(input_shape[1:]) >= _LPIPS_SIDE
    # only then import torchvision
    stored = fits and any(Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth"))
    return "lpips" if stored and cached_file("vgg16").is_file() else "random"


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
    layers = _vgg_layers(64, 64, 0, 128, 128, 0, 256)
    net = FeatureNet(layers, layer_indices=(1, 6, 11), imagenet=True)
    known, file = (name, None) if name in VGG else ("a VGG network", Path(name))
    _load_vgg(layers, known, file)
    return net


def lpips_features(input_shape: tuple[int, ...]) -> LPIPS:
    """VGG-16 with the channels' weights that torchmetrics has."""
    if len(input_shape) != 3 or input_shape[0] not in (1, 3) or min(input_shape[1:]) < _LPIPS_SIDE:
        raise AezooError(f"lpips takes images of 1 or 3 channels and at least 16 x 16, got {input_shape}: take random")
    file = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / "vgg.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    layers = _vgg_layers(64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
    net = LPIPS(layers, [state[f"lin{i}.model.1.weight"] for i in range(5)])
    _load_vgg(layers, "vgg16", None)
    return net


def _vgg_layers(*widths: int) -> list[nn.Module]:
    """Convolutions of these widths, and a pooling for each 0."""
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        before = width or before
    return layers


def _load_vgg(layers: list[nn.Module], known: str, file: Path | None) -> None:
    with cached_weights(known, "take features random", file) as state:
        for i, layer in enumerate(layers):
            layer.load_state_dict({key: state[f"features.{i}.{key}"] for key in layer.state_dict()})
