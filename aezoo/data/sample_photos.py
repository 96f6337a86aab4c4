"""sample_photos: square crops of seven photographs that are part of scikit-image and scikit-learn.

    train   astronaut, coffee, rocket, motorcycle (scikit-image), china (scikit-learn)
    val     chelsea, a cat (scikit-image)
    test    flower (scikit-learn)

Each photograph is cut at its own size and at half of it into squares of --data.size pixels (64 by default), which begin
every quarter of their side in training and every half of it in val and test. No photograph is in two splits. Five
photographs have few colours: training crops have their channels in each of the six orders in turn, and every other six
of them are mirrored.
"""

from importlib.resources import files
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aezoo.data.images import ImageArgs, read_image
from aezoo.data.in_memory import InMemory, LabelledArrays
from aezoo.data.source import Options, Stage, accepts
from aezoo.errors import AezooError, install_hint

PHOTOGRAPHS: dict[Stage, tuple[str, ...]] = {
    "train": ("skimage/astronaut.png", "skimage/coffee.png", "skimage/rocket.jpg", "skimage/motorcycle_left.png",
              "sklearn/china.jpg"),
    "val": ("skimage/chelsea.png",),
    "test": ("sklearn/flower.jpg",),
}  # fmt: skip
_FOLDERS = {"skimage": "skimage.data", "sklearn": "sklearn.datasets.images"}
_SIZE, _MAX_SIZE = 64, 256
# a square begins every size / n pixels
_PARTS: dict[Stage, int] = {"train": 4, "val": 2, "test": 2}


@accepts(ImageArgs)
class SamplePhotos(InMemory):
    """Crops of photographs without labels."""

    def __init__(self, options: Options) -> None:
        self.size = options.size or _SIZE
        if self.size > _MAX_SIZE:
            raise AezooError(
                f"sample_photos has crops of at most {_MAX_SIZE} pixels per side, got --data.size {self.size}"
            )
        if find_spec("skimage") is None:
            raise AezooError(f"the data sample_photos needs the photographs of scikit-image: {install_hint('images')}")
        super().__init__(options, (3, self.size, self.size), None)

    def load(self) -> dict[Stage, LabelledArrays]:
        found = {
            stage: torch.cat([crops(read_photograph(name), self.size, _PARTS[stage]) for name in names])
            for stage, names in PHOTOGRAPHS.items()
        }
        return {stage: LabelledArrays(varied(x) if stage == "train" else x) for stage, x in found.items()}


def read_photograph(name: str) -> Tensor:
    """One of `PHOTOGRAPHS`, (3, H, W) in bytes."""
    package, _, file = name.partition("/")
    return read_image(Path(str(files(_FOLDERS[package]) / file)), None, 3, 10**7)


def varied(x: Tensor) -> Tensor:
    """Crops (N, 3, size, size) with their channels in other orders, and half of them mirrored."""
    x = x.clone()
    for i, order in enumerate(permutations(range(3))):
        x[i::6] = x[i::6][:, order]
        x[i + 6 :: 12] = x[i + 6 :: 12].flip(3)
    return x


def crops(photograph: Tensor, size: int, parts: int) -> Tensor:
    """Squares at every size / parts pixels of a photograph and of its half: (3, H, W) -> (N, 3, size, size)."""
    half = F.avg_pool2d(photograph[None].float(), 2)[0].round().to(torch.uint8)
    step, found = max(1, size // parts), []
    for image in (photograph, half):
        if min(image.shape[1:]) >= size:
            squares = image.unfold(1, size, step).unfold(2, size, step)
            found.append(squares.permute(1, 2, 0, 3, 4).reshape(-1, len(image), size, size))
    return torch.cat(found)
