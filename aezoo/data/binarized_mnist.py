"""binarized_mnist: MNIST as binarised once by Larochelle & Murray (2011): 50,000, 10,000 and 10,000 digits.

The "static" or "fixed" binarisation of papers on deep generative models, in three text files of zeros and ones.
"""

from pathlib import Path

import numpy as np
import torch

from aezoo.data.images import ImageArgs
from aezoo.data.in_memory import InMemory, LabelledArrays
from aezoo.data.readers import MemoryLimitArgs, check_bytes
from aezoo.data.source import Options, Stage, accepts
from aezoo.errors import AezooError

_FILES: dict[Stage, str] = {
    "train": "binarized_mnist_train.amat",
    "val": "binarized_mnist_valid.amat",
    "test": "binarized_mnist_test.amat",
}
_FROM = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist"


@accepts(ImageArgs, MemoryLimitArgs)
class BinarizedMnist(InMemory):
    """Digits of zeros and ones without labels, in the splits of the files."""

    def __init__(self, options: Options) -> None:
        super().__init__(options, (1, 28, 28), None)

    def load(self) -> dict[Stage, LabelledArrays]:
        return {stage: LabelledArrays(self._read(self._find(name))) for stage, name in _FILES.items()}

    def _find(self, name: str) -> Path:
        root = Path(self.options.root).expanduser()
        for folder in (root / "binarized_mnist", root):
            if (folder / name).is_file():
                return folder / name
        raise AezooError(f"binarized_mnist: no {name} in {root}: download the three files of {_FROM} into that folder")

    def _read(self, path: Path) -> torch.Tensor:
        check_bytes(path, path.stat().st_size, self.options.max_bytes)
        values = np.frombuffer(path.read_bytes().translate(None, b" \t\r\n"), np.uint8) - ord("0")
        if not values.size or values.size % 784 or values.max() > 1:
            raise AezooError(f"{path}: not lines of 784 zeros and ones: the file is damaged, download it again")
        return torch.from_numpy(values.reshape(-1, 1, 28, 28) * np.uint8(255))
