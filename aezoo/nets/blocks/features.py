"""Frozen networks for feature losses and for anomaly detection on feature maps."""

import copy
import dataclasses
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.nets import build
from aezoo.nets.blocks.channel_norm import IMAGENET
from aezoo.nets.blocks.pretrained import cached_file, cached_weights
from aezoo.nets.blocks.timm_backbone import Backbone, Description, parse, plan
from aezoo.nets.build import ACTIVATIONS, TIMM, encoder
from aezoo.nets.resnet import ResidualBlock
from aezoo.training.precision import at_least_float32
from aezoo.training.seeding import forked_rng

VGG = ("vgg16", "vgg19")
TORCHVISION = "torchvision:"
# torchvision's network, torchmetrics' file of channel weights, indices of the feature layers, the smallest side
_LPIPS: dict[str, tuple[str, str, tuple[int, ...], int]] = {
    "lpips": ("vgg16", "vgg", (3, 8, 15, 22, 29), 16),
    "lpips:alex": ("alexnet", "alex", (1, 4, 7, 9, 11), 31),
    "lpips:squeeze": ("squeezenet1_1", "squeeze", (1, 4, 7, 9, 10, 11, 12), 17),
}
RANDOM_WIDTHS = {"conv": (16, 32, 64), "mlp": (512, 512)}


class FeatureDistance:
    """The distance between two batches in the features of a network that is not part of the model.

    The model stores it as a plain object, so it is not saved, trained or synchronised between ranks. It moves to the
    device of the data.

    Args:
        features: random, lpips, lpips:alex, lpips:squeeze, vgg16, vgg19, the path of a file of VGG weights (.pth), or
            torchvision:NAME or timm:NAME, see `feature_maps`; with none, all distances are 0.
        input_shape: shape of one sample.
        argument: the network's name in the model's arguments.

    Raises:
        AezooError: the network does not exist.
    """

    def __init__(self, features: str, input_shape: tuple[int, ...], argument: str = "features") -> None:
        known = features in ("none", "random", *_LPIPS, *VGG) or has_feature_maps(features)
        if not known and not features.endswith(".pth"):
            raise AezooError(
                f"{argument} takes none, random, {', '.join((*_LPIPS, *VGG))}, torchvision:NAME, timm:NAME or the path "
                f"of a .pth file, got {features!r}"
            )
        self.features, self.input_shape = features, input_shape
        self.net = random_features(input_shape) if features == "random" else None

    @property
    def channels(self) -> int:
        """Return the number of channels of the last feature layer, for samples with a grid."""
        if has_feature_maps(self.features):
            return feature_map_shapes(self.features, self.input_shape)[-1][0]
        known = {"random": RANDOM_WIDTHS["conv"][-1], "lpips": 512, "lpips:squeeze": 512}
        return known.get(self.features, 256)

    def read(self) -> "FeatureNet | None":
        """Return the network, loaded on the first call, so that a model can be loaded without the network's file.

        Raises:
            AezooError: the file does not exist, or the network does not fit the data.
        """
        if self.net is None and self.features != "none":
            if has_feature_maps(self.features):
                self.net = feature_maps(self.features, self.input_shape)
            elif self.features in _LPIPS:
                self.net = lpips_features(self.input_shape, self.features)
            else:
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
        """Return the network's distance, or 0 without a network: (B, *shape), (B, *shape) -> (B,)."""
        x_hat, x = at_least_float32(x_hat), at_least_float32(x)
        net = self.move_to(x).read()
        if net is None:
            return x.new_zeros(len(x))
        with torch.autocast(x.device.type, enabled=False):
            return net.distance(net(x_hat), net(x))


class FeatureNet(nn.Module):
    """A sequence of layers; the outputs of some layers are features.

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
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None])
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the feature layers, (B, ...) each."""
        x = x.to(next(self.parameters()).dtype)
        if self.imagenet:
            x = (x - self.mean) / self.std
        features = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.read:
                features.append(at_least_float32(x))
        return features

    def distance(self, features: list[Tensor], others: list[Tensor]) -> Tensor:
        """Sum over layers l of ||F_l - F'_l||^2 / (2 n_l), (B, ...) each -> (B,)."""
        pairs = zip(features, others, strict=True)
        return torch.stack([((a - b) ** 2).flatten(1).mean(1) / 2 for a, b in pairs]).sum(0)


class BackboneFeatures(FeatureNet):
    """Feature maps of a frozen backbone of timm.

    Args:
        description: the backbone.
        input_shape: (C, H, W).
    """

    def __init__(self, description: Description, input_shape: tuple[int, ...]) -> None:
        super().__init__([])
        self.backbone = Backbone(description, input_shape)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.backbone(x.to(self.mean.dtype))
        return [at_least_float32(found) for found in maps]


class LPIPS(FeatureNet):
    """Learned perceptual similarity (Zhang et al. 2018), https://arxiv.org/abs/1801.03924

    Features are normalised at each position, and the weights of their channels are fitted to human judgements.

    Args:
        layers: the layers of VGG-16, AlexNet or SqueezeNet.
        channel_weights: w_l, the weights of the channels of each feature layer.
        layer_indices: indices of the feature layers.
    """

    def __init__(
        self, layers: list[nn.Module], channel_weights: Sequence[Tensor], layer_indices: tuple[int, ...]
    ) -> None:
        super().__init__(layers, layer_indices, imagenet=True)
        for i, weight in enumerate(channel_weights):
            self.register_buffer(f"weight_{i}", weight.flatten()[:, None, None])

    def distance(self, features: list[Tensor], others: list[Tensor]) -> Tensor:
        """Return the sum over layers of the mean over positions of sum_c w_c (F_c / ||F|| - F'_c / ||F'||)^2."""
        total = []
        for i, pair in enumerate(zip(features, others, strict=True)):
            # 1e-8 as in torchmetrics: the root is not differentiable at 0
            a, b = (f / (f.square().sum(1, keepdim=True) + 1e-8).sqrt() for f in pair)
            total.append((self.get_buffer(f"weight_{i}") * (a - b).square()).sum(1).mean((1, 2)))
        return torch.stack(total).sum(0)


def has_feature_maps(name: str) -> bool:
    """Return whether `feature_maps` accepts a name."""
    return name.startswith((TIMM, TORCHVISION))


def without_weights(name: str) -> str:
    """Remove the option for weights from a name for `feature_maps`, for models whose weights are loaded afterwards."""
    if not name.startswith(TORCHVISION):
        return build.without_weights(name)
    kept = [part for part in name.split(",") if part.partition("=")[0].strip() != "pretrained"]
    return ",".join([*kept, "pretrained=false"])


def feature_maps(name: str, input_shape: tuple[int, ...]) -> FeatureNet:
    """Return a frozen network with feature maps at several depths, from the largest to the smallest.

    Args:
        name: torchvision:NAME, a classifier with the weights that torch.hub has stored, such as resnet50, vgg16_bn,
            convnext_tiny or efficientnet_b0; or timm:NAME,OPTION,.. as in `aezoo.nets.blocks.timm_backbone`. In both,
            the option out_indices=1:2:3 selects maps; by default all are used, one for each size of map. Without the
            option pretrained, a network of timm has fixed random weights, as has a network of torchvision with
            pretrained=false; pretrained=FILE loads weights from a file in both.
        input_shape: (C, H, W), of 1 or 3 channels for torchvision.

    Raises:
        AezooError: the network does not exist, its weights are missing, or it does not support the samples.
    """
    if name.startswith(TIMM):
        with forked_rng(torch.device("cpu")):
            torch.manual_seed(0)  # a loaded model must use the same features
            return BackboneFeatures(dataclasses.replace(parse(name), frozen=True), tuple(input_shape))
    net, stages, chosen = _torchvision(name, tuple(input_shape), "cpu")
    description = parse(name.removeprefix(TORCHVISION))
    if description.pretrained or "pretrained" not in name:
        file = None if description.pretrained in (True, False) else Path(str(description.pretrained))
        with cached_weights(description.name, "use features random", file) as state:
            net.load_state_dict(state)
    return FeatureNet(stages, layer_indices=chosen, imagenet=True)


def feature_map_shapes(name: str, input_shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return (C, H, W) of each map of `feature_maps`, without loading weights."""
    if name.startswith(TIMM):
        return [*plan(dataclasses.replace(parse(name), frozen=True), tuple(input_shape), last_only=False).shapes]
    _, stages, chosen = _torchvision(name, tuple(input_shape), "meta")
    x, shapes = torch.empty(1, 3, *input_shape[1:], device="meta"), []
    for stage in stages:
        x = stage.eval()(x)
        shapes.append(tuple(x.shape[1:]))
    return [shapes[i] for i in chosen]


def _torchvision(
    name: str, input_shape: tuple[int, ...], device: str
) -> tuple[nn.Module, list[nn.Module], tuple[int, ...]]:
    """Return a network, its stages, each of which ends before a smaller map, and the indices of the selected stages."""
    from torchvision import models

    description = parse(name.removeprefix(TORCHVISION))
    known = models.list_models(module=models)
    if description.name not in known:
        near = difflib.get_close_matches(description.name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "torchvision.models.list_models() has all"
        raise AezooError(f"torchvision has no classifier {description.name!r}: {hint}")
    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise AezooError(f"{name} takes images of 1 or 3 channels, got {input_shape}: use random")
    with torch.device(device):
        net = _classifier(description.name)
    if hasattr(net, "layer4"):
        stem = nn.Sequential(net.conv1, net.bn1, net.relu), nn.Sequential(net.maxpool, net.layer1)
        stages = [*stem, net.layer2, net.layer3, net.layer4]
    elif isinstance(getattr(net, "features", None), nn.Sequential):
        stages = _split_before_smaller_maps([*net.features])
    else:
        raise AezooError(
            f"torchvision's {description.name} has no feature maps: use timm:NAME, which has more networks"
        )
    chosen = description.out_indices or tuple(range(len(stages)))
    if not all(-len(stages) <= i < len(stages) for i in chosen):
        raise AezooError(f"{name} has feature maps 0 to {len(stages) - 1}, got out_indices {chosen}")
    return net, stages, tuple(sorted(i % len(stages) for i in chosen))


def _classifier(name: str) -> Any:
    """Return a network of torchvision without in-place layers, which would overwrite maps."""
    from torchvision import models

    with forked_rng(torch.device("cpu")):
        torch.manual_seed(0)  # a loaded model must use the same features
        net = models.get_model(name, weights=None)
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return net


def _split_before_smaller_maps(layers: list[nn.Module]) -> list[nn.Module]:
    x = torch.empty(1, 3, 224, 224, device="meta")
    stages: list[list[nn.Module]] = [[]]
    side = 224
    for layer in layers:
        x = copy.deepcopy(layer).to("meta").eval()(x)
        if x.shape[-1] < side and stages[-1]:
            stages.append([])
        side = x.shape[-1]
        stages[-1].append(layer)
    return [nn.Sequential(*stage) for stage in stages]


def default_features(input_shape: tuple[int, ...]) -> str:
    """Return the value of `features=auto`: lpips for supported images if torch.hub has stored VGG-16, else random."""
    fits = len(input_shape) == 3 and input_shape[0] in (1, 3) and min(input_shape[1:]) >= _LPIPS["lpips"][3]
    # only then import torchvision
    stored = fits and any(Path(torch.hub.get_dir(), "checkpoints").glob("vgg16-*.pth"))
    return "lpips" if stored and cached_file("vgg16").is_file() else "random"


def random_features(input_shape: tuple[int, ...]) -> FeatureNet:
    """Create strided convolutions for data with a grid, else an MLP, with He-normal weights from a fixed seed."""
    rng = np.random.RandomState(0)  # NumPy guarantees its stream (NEP 19)
    kind = "conv" if len(input_shape) > 1 else "mlp"
    with torch.random.fork_rng(devices=[]):  # initial weights, which are replaced, must not consume random numbers
        net = FeatureNet([*encoder(kind, input_shape, (1,), RANDOM_WIDTHS[kind]).children()])
    for p in net.parameters():
        fan_in = p[0].numel()
        drawn = rng.standard_normal(tuple(p.shape)) * math.sqrt(2 / fan_in) if p.ndim > 1 else np.zeros(tuple(p.shape))
        p.copy_(torch.from_numpy(drawn))
    return net


def vgg_features(name: str, input_shape: tuple[int, ...]) -> FeatureNet:
    """Return the first layers of VGG-16 or VGG-19, which differ only in their weights."""
    if len(input_shape) != 3 or input_shape[0] not in (1, 3) or min(input_shape[1:]) < 4:
        raise AezooError(f"{name} takes images of 1 or 3 channels and at least 4 x 4, got {input_shape}: use random")
    layers = _vgg_layers(64, 64, 0, 128, 128, 0, 256)
    net = FeatureNet(layers, layer_indices=(1, 6, 11), imagenet=True)
    known, file = (name, None) if name in VGG else ("a VGG network", Path(name))
    _load_layers(layers, known, file)
    return net


def lpips_features(input_shape: tuple[int, ...], name: str = "lpips") -> LPIPS:
    """Return the network of a name in `_LPIPS`, with the channel weights of torchmetrics."""
    network, weights, indices, side = _LPIPS[name]
    if len(input_shape) != 3 or input_shape[0] not in (1, 3) or min(input_shape[1:]) < side:
        raise AezooError(
            f"{name} takes images of 1 or 3 channels and at least {side} x {side}, got {input_shape}: use random"
        )
    file = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{weights}.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    if network == "vgg16":
        layers = _vgg_layers(64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)
    else:
        layers = [*_classifier(network).features]
    net = LPIPS(layers, [state[f"lin{i}.model.1.weight"] for i in range(len(indices))], indices)
    _load_layers(layers, network, None)
    return net


def _vgg_layers(*widths: int) -> list[nn.Module]:
    """Create convolutions of these widths, and a pooling layer for each 0."""
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        before = width or before
    return layers


def _load_layers(layers: list[nn.Module], known: str, file: Path | None) -> None:
    with cached_weights(known, "use features random", file) as state:
        for i, layer in enumerate(layers):
            layer.load_state_dict({key: state[f"features.{i}.{key}"] for key in layer.state_dict()})


def named_features(name: str, input_shape: tuple[int, ...]) -> FeatureNet | None:
    """Return the network for a value of `features`: random, a VGG, a file, torchvision:NAME or timm:NAME.

    Returns None for any other name, such as the path to a model of aezoo.

    Raises:
        AezooError: as the functions for each kind of network.
    """
    if has_feature_maps(name):
        return feature_maps(name, input_shape)
    if name == "random":
        return random_features(input_shape)
    return vgg_features(name, input_shape) if name in VGG or name.endswith(".pth") else None
