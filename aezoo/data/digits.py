"""digits: scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, values 0 to 16 divided by 16."""

import torch

from aezoo.data.images import ImageArgs
from aezoo.data.in_memory import InMemory, LabelledArrays
from aezoo.data.source import Options, Stage, accepts


@accepts(ImageArgs)
class Digits(InMemory):
    """Optical recognition of handwritten digits (Alpaydin and Kaynak 1998, UCI)."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, (1, 8, 8), 10)
        self.class_names = tuple("0123456789")

    def load(self) -> dict[Stage, LabelledArrays]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16
        return {"train": LabelledArrays(images, torch.from_numpy(digits.target).long())}
