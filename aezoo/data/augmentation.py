"""Random flips, crops and changes of colour of training images, with the operations of torchvision.transforms.v2.

    hflip         mirrored left to right, with this probability
    vflip         mirrored top to bottom, with this probability
    crop_padding  p: padded by p pixels on each side by reflection, and cropped to its size at a random position
    color_jitter  j: brightness, contrast and saturation, in this order, by factors from [max(0, 1 - j), 1 + j]

The random values for a sample are a function of (seed, epoch, index), with its index in the training split. So they do
not depend on the batch size, the number of workers and processes, and interruptions of a run. They are independent for
each setting: one setting does not change the values of another one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from aezoo.data.loaders import EpochSampler
from aezoo.data.source import Batch
from aezoo.errors import AezooError
from aezoo.training.seeding import uniform

SETTINGS = ("hflip", "vflip", "crop_padding", "color_jitter")
# random numbers for each setting
_HFLIP, _VFLIP, _TOP, _LEFT, _BRIGHTNESS, _CONTRAST, _SATURATION = range(7)
# values of images that are processed together on a CPU
_CACHED = 2**17


class Augmentation:
    """Transforms the batches of an epoch; see the module for the arguments.

    Args:
        hflip: from 0 to 1.
        vflip: from 0 to 1.
        crop_padding: pixels.
        color_jitter: at least 0.
        device: on which images are augmented; by default the one they are on.
    """

    def __init__(
        self,
        hflip: float = 0.0,
        vflip: float = 0.0,
        crop_padding: int = 0,
        color_jitter: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        self.hflip, self.vflip, self.crop_padding, self.color_jitter = hflip, vflip, crop_padding, color_jitter
        self.device = device

    def __call__(self, batches: Iterator[Batch], sampler: EpochSampler) -> Iterator[Batch]:
        place, rows, epoch = 0, torch.empty(0), -1
        for x, *y in batches:
            if not place:  # Lightning sets the epoch between iter() and the first next()
                rows, epoch = sampler.current, sampler.epoch
            chosen = rows[place : place + len(x)]
            place += len(x)
            x = x if self.device is None else x.to(self.device, non_blocking=True)
            yield (self.augment(x, chosen, sampler.seed, epoch), *y)  # type: ignore[misc]

    def augment(self, x: Tensor, rows: Tensor, seed: int, epoch: int) -> Tensor:
        """Augmented images of the same type: (B, C, H, W), uint8 or floats; for color_jitter from 0 to 1.

        Args:
            x: the images.
            rows: (B,) the index of each in the training split.
            seed: of the data.
            epoch: of the training.
        """
        draws = uniform(rows, 7, seed, epoch)
        if p := self.crop_padding:
            x = _crop(x, p, (draws[:, [_TOP, _LEFT]] * (2 * p + 1)).long())
        x = _where(draws[:, _HFLIP] < self.hflip, F.horizontal_flip, x) if self.hflip else x
        x = _where(draws[:, _VFLIP] < self.vflip, F.vertical_flip, x) if self.vflip else x
        if j := self.color_jitter:
            low, high = max(0.0, 1 - j), 1 + j
            factors = low + (high - low) * draws[:, [_BRIGHTNESS, _CONTRAST, _SATURATION], None, None, None]
            x = jitter(x, *factors.to(x.device, torch.float32).unbind(1))
        return x


def _crop(x: Tensor, padding: int, corners_B2: Tensor) -> Tensor:
    """Crops of padded images, each at a different position."""
    height, width = x.shape[2:]
    padded = _reflect(_reflect(x, padding, 2), padding, 3)
    corners = corners_B2.tolist()
    return torch.stack(
        [image[:, top : top + height, left : left + width] for image, (top, left) in zip(padded, corners, strict=True)]
    )


def _reflect(x: Tensor, padding: int, dim: int) -> Tensor:
    """F.pad with padding_mode reflect on both ends of a dimension, without its conversion of bytes to floats."""
    first, last = x.narrow(dim, 1, padding), x.narrow(dim, x.shape[dim] - 1 - padding, padding)
    return torch.cat([first.flip(dim), x, last.flip(dim)], dim)


def _where(chosen: Tensor, change: Any, x: Tensor) -> Tensor:
    """The images, some of them changed."""
    rows = chosen.nonzero()[:, 0].to(x.device)
    return x.index_copy(0, rows, change(x.index_select(0, rows)))


def jitter(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Torchvision's adjust_brightness, adjust_contrast and adjust_saturation, with different factors for each image.

    Bytes are computed in floats and rounded once, at the end.

    Args:
        x: (B, 1 or 3, H, W), uint8 or floats from 0 to 1.
        brightness: (B, 1, 1, 1), at least 0; 1 changes nothing.
        contrast: the same.
        saturation: the same; does not change grey images.
    """
    # parts that fit into a CPU's cache; a GPU processes all at once
    n = max(1, _CACHED // x[0].numel()) if x.device.type == "cpu" else len(x)
    parts = zip(*(values.split(n) for values in (x, brightness, contrast, saturation)), strict=True)
    return torch.cat([_jitter(*part) for part in parts])


def _jitter(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    white = 255 if x.dtype == torch.uint8 else 1
    v = x.to(torch.float32, copy=True)
    v.mul_(brightness).clamp_(0, white)
    mean = F.rgb_to_grayscale(v.mean((2, 3), keepdim=True), 1)  # of the grey image, which is linear in its channels
    v.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, white)
    if x.shape[1] == 3:
        grey = F.rgb_to_grayscale(v, 1)
        v.mul_(saturation).add_(grey.mul_(1 - saturation)).clamp_(0, white)
    return v.round_().to(x.dtype) if x.dtype == torch.uint8 else v


def check(given: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Refuse settings that cannot work.

    Args:
        given: the settings of the DataModule.
        shape: of a sample.

    Raises:
        AezooError: names the first setting that is wrong, and what to give.
    """
    for key in ("hflip", "vflip"):
        if not 0 <= given[key] <= 1:
            raise AezooError(f"--data.{key} is {given[key]!r}: give a probability from 0 to 1, such as 0.5")
    if not 0 <= given["color_jitter"] <= 1:
        raise AezooError(f"--data.color_jitter is {given['color_jitter']!r}: give a number from 0 to 1, such as 0.4")
    if given["crop_padding"] < 0:
        raise AezooError(f"--data.crop_padding is {given['crop_padding']}: give pixels, such as 4, or 0 for no crops")
    if not (chosen := [key for key in SETTINGS if given[key]]):
        return
    key = chosen[0]
    if len(shape) != 3:
        raise AezooError(f"--data.{key} is for images, and a sample of {given['name']} has shape {shape}: drop it")
    if given["missing"] == "keep":
        raise AezooError(f"--data.missing keep and --data.{key} contradict each other: drop one, as an augmented image "
                         "would lack other parts")  # fmt: skip
    if given["crop_padding"] >= min(shape[1:]):
        raise AezooError(f"--data.crop_padding is {given['crop_padding']}: an image of {shape[1]}x{shape[2]} can be "
                         f"reflected by at most {min(shape[1:]) - 1} pixels")  # fmt: skip
    if given["color_jitter"] and shape[0] not in (1, 3):
        raise AezooError(f"--data.color_jitter is for grey or coloured images, and a sample has {shape[0]} channels: "
                         "drop it, or give --data.channels 3")  # fmt: skip
    if given["color_jitter"] and given["binarise"] != "none":
        raise AezooError(f"--data.color_jitter and --data.binarise {given['binarise']} contradict each other: drop one")


def check_values(x: Tensor, value_range: tuple[float, float] | None, name: str) -> None:
    """Refuse color_jitter for samples without known values of black and white.

    Args:
        x: a sample.
        value_range: the range of training values, see `Source`.
        name: the set, for the message.

    Raises:
        AezooError: x has neither bytes nor values from 0 to 1.
    """
    if x.dtype != torch.uint8 and value_range != (0.0, 1.0):
        raise AezooError(f"{name}: --data.color_jitter needs values from 0 to 1: set --data.scale unit, or drop it")
