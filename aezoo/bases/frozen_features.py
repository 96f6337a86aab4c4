"""Anomaly detection on the features of a frozen network.

The network's weights are part of the model: a saved model or a checkpoint contains them, and loading it needs no other
file. A small decoder is trained together with the detector, on codes without their gradient. It only visualises what
information codes contain: it changes no code, map or score.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aezoo import nets
from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError
from aezoo.nets import conv
from aezoo.nets.blocks.features import TORCHVISION, FeatureNet, has_feature_maps, named_features, without_weights
from aezoo.nets.blocks.timm_backbone import parse
from aezoo.nets.build import TIMM
from aezoo.security.weights import separate_limit
from aezoo.training.arguments import TrainingArgs
from aezoo.training.precision import buffers_kept_in_float32

# limit on the parameters of a network that a library builds by name, 800 MB, while a file is loaded; with other
# arguments, only networks of the size in the file are built
_LARGEST = 2 * 10**8


class FrozenFeatureArgs(TrainingArgs, total=False):
    """Arguments of `FrozenFeatureAutoencoder`."""

    features: str


class FrozenFeatureAutoencoder(Autoencoder, defaults={"likelihood": "gaussian"}):
    """A model on the feature maps of a frozen network.

    A subclass sets `code_shape`, calls `build_image_decoder` and defines `anomaly_map`.

    Attributes:
        backbone: the network, always in evaluation mode.
        map_shapes: (C', H', W') of each map, from the largest to the smallest.

    Args:
        input_shape: (C, H, W), supported by the network.
        features: random, small strided convolutions with fixed random weights; timm:NAME, such as
            timm:wide_resnet50_2.tv2_in1k,pretrained,out_indices=2:3; or torchvision:NAME, such as
            torchvision:resnet18,out_indices=1:2:3, with weights that torch.hub has stored or, with
            pretrained=FILE, weights from a file. See docs/networks.md.
    """

    # statistics that a model in bfloat16 keeps in float32
    exact_buffers: ClassVar[tuple[str, ...]] = ()
    # whether further epochs would only train the decoder, which no score depends on
    one_epoch: ClassVar[bool] = False

    def __init__(
        self, input_shape: tuple[int, ...], *, features: str = "random", **kwargs: Unpack[TrainingArgs]
    ) -> None:
        super().__init__(input_shape, **kwargs)
        if len(self.input_shape) != 3:
            raise AezooError(f"frozen features need images, (C, H, W), got {self.input_shape}")
        net = None
        if features == "random" or (has_feature_maps(features) and parse(features).arguments):
            net = named_features(features, self.input_shape)
        elif has_feature_maps(features):
            with separate_limit(_LARGEST):
                net = named_features(features, self.input_shape)
        if net is None:
            raise AezooError(f"features takes random, {TIMM}NAME or {TORCHVISION}NAME, got {features!r}")
        self.features = features
        self.backbone: FeatureNet = net
        if "features" in self.hparams:
            self.update_hyperparameters(features=without_weights(features))  # a checkpoint has the weights
        with torch.no_grad():
            self.map_shapes = [tuple(found.shape[1:]) for found in net(torch.zeros(1, *self.input_shape))]

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.backbone.eval()
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        with buffers_kept_in_float32(self, self.exact_buffers):
            super()._apply(fn, recurse)
        return self

    def on_fit_start(self) -> None:
        super().on_fit_start()
        # Lightning warns about the backbone, which is meant to be in eval mode
        warnings.filterwarnings("ignore", message=r".*module\(s\) in eval mode at the start")

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def build_image_decoder(self) -> nn.Module:
        """Create a network from codes to samples, (B, *code_shape) -> (B, *input_shape)."""
        dims = nets.default_hidden_dims("conv", self.input_shape)
        grid = conv.grids(self.input_shape, len(dims))[-1]
        # codes may be of any scale; GroupNorm of torch 2.13 crashes on channels_last codes without a gradient
        before: list[nn.Module] = [nn.LayerNorm(self.code_shape, elementwise_affine=False)]
        shape = self.code_shape
        if len(shape) > 1:
            before += [nn.Upsample(size=grid, mode="bilinear")] if shape[1:] != grid else []
            shape = (shape[0], *grid)
        return nn.Sequential(*before, *nets.decoder("conv", shape, self.input_shape, dims[::-1], "silu").children())

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the feature maps, (B, *input_shape) -> (B, C', H', W') each, at least float32."""
        with torch.autocast(x.device.type, enabled=False):
            found: list[Tensor] = self.backbone(at_least_float32(x))
        return [at_least_float32(each) for each in found]

    def decoder_nll(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the mean -log p(x | z) of the decoder, without gradient in z: (B, *code_shape) -> ()."""
        return self.nll(self.decoder(z.detach().to(x.dtype)), x).mean()

    def anomaly_map(self, x: Tensor) -> Tensor:
        """Return the anomaly score of each pixel, (B, C, H, W) -> (B, H, W)."""
        raise NotImplementedError

    def score(self, x: Tensor) -> Tensor:
        """Return the maximum of `anomaly_map`, (B, *input_shape) -> (B,)."""
        return self.anomaly_map(x).amax((1, 2))

    def enlarged(self, values: Tensor, align_corners: bool = False) -> Tensor:
        """Interpolate values of positions to pixels, bilinearly: (B, H', W') -> (B, H, W)."""
        return F.interpolate(values[:, None], self.input_shape[1:], mode="bilinear", align_corners=align_corners)[:, 0]


def stacked(maps: list[Tensor], mode: str) -> Tensor:
    """Resize maps to the grid of the first and concatenate channels: (B, C_l, H_l, W_l) each -> (B, C, H', W')."""
    grid = maps[0].shape[2:]
    return torch.cat([maps[0], *(F.interpolate(each, grid, mode=mode) for each in maps[1:])], 1)


def smoothed(values: Tensor, sigma: float) -> Tensor:
    """Apply a Gaussian filter with reflection padding: (B, H, W) -> (B, H, W); sigma in pixels, 0 for none.

    The window reaches 4 sigma, or the largest possible reflection padding.
    """
    if not sigma:
        return values
    for _ in range(2):  # along the last axis, then along the other
        reach = min(int(4 * sigma + 0.5), values.shape[-1] - 1)
        steps = torch.arange(-reach, reach + 1, device=values.device, dtype=values.dtype)
        weights = torch.exp(-(steps**2) / (2 * sigma**2))
        padded = F.pad(values, (reach, reach), mode="reflect")
        n_rows = padded.shape[1]
        filtered = F.conv1d(padded.flatten(0, 1)[:, None], (weights / weights.sum())[None, None])
        values = filtered[:, 0].unflatten(0, (-1, n_rows)).mT
    return values
