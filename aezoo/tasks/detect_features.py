"""Features of a frozen, pretrained network, for the detector fre.

    random           a network with random weights, the same everywhere
    resnet18, resnet50, wide_resnet50_2     the third stage of torchvision's weights, if torch.hub has them
    vgg16, vgg19     relu3_1 of torchvision's weights, if torch.hub has them
    torchvision:NAME, timm:NAME     the last of the feature maps that the name chooses, such as
                     timm:resnet50.a1_in1k,pretrained,out_indices=3
    a path           of VGG weights (.pth), or of a run, checkpoint or saved model of the zoo: its encoder's last hidden
                     layer

Images for a ResNet are enlarged until their shorter side has 224 values. Maps are averaged over 2 x 2 values until they
have at most 65,536, as many as FRE has in https://github.com/open-edge-platform/anomalib.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo.errors import AezooError
from aezoo.models.variational.perceptual_vae import zoo_features
from aezoo.nets.blocks.features import (
    VGG,
    FeatureNet,
    named_features,
)
from aezoo.nets.blocks.pretrained import cached_weights

RESNETS = ("resnet18", "resnet50", "wide_resnet50_2")
_SIDE = 224
_MAX_FEATURES = 2**16
_POOLS: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class FrozenFeatures(nn.Module):
    """The last activations of a network as vectors, (B, *shape) -> (B, M).

    Args:
        name: random, resnet18, resnet50, wide_resnet50_2, vgg16, vgg19 or a path, see above.
        input_shape: shape of one sample.

    Raises:
        AezooError: missing weights, or samples that the network cannot take.
    """

    def __init__(self, name: str, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.enlarge = name in RESNETS
        if self.enlarge:
            self.net = resnet_features(name, input_shape)
        elif (net := named_features(name, input_shape)) is not None:
            self.net = net
        elif name and Path(name).exists():
            self.net = zoo_features(name, input_shape)
        else:
            known = ", ".join(("random", *RESNETS, *VGG, "torchvision:NAME", "timm:NAME"))
            raise AezooError(f"features takes {known} or a path to an existing model, got {name!r}")

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        if self.enlarge and min(x.shape[2:]) < _SIDE:
            sides = [math.ceil(side * _SIDE / min(x.shape[2:])) for side in x.shape[2:]]
            x = F.interpolate(x, sides, mode="bilinear", antialias=True)
        found: Tensor = self.net(x)[-1]
        while found[0].numel() > _MAX_FEATURES and max(found.shape[2:], default=1) > 1:
            found = _POOLS[found.ndim - 2](found, [math.ceil(side / 2) for side in found.shape[2:]])
        return found.flatten(1)


def resnet_features(name: str, input_shape: tuple[int, ...]) -> FeatureNet:
    """A ResNet up to its third stage, which shows defects better than the last (also anomalib's choice)."""
    from torchvision import models

    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise AezooError(f"{name} takes images of 1 or 3 channels, got {input_shape}: use features random")
    with cached_weights(name, "use features random") as state:
        with torch.random.fork_rng(devices=[]):  # initial weights are replaced
            net = models.get_model(name, weights=None)
        net.load_state_dict(state)
    stages = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    return FeatureNet([getattr(net, stage) for stage in stages], layer_indices=(len(stages) - 1,), imagenet=True)
