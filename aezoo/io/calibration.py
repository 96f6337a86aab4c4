"""Results of `detect` on calibration samples, stored next to the weights so that later calls need no training data.

`calibration.safetensors` is in the folder of a run or of a saved model. It contains `DataStatistics` and the SHA-256 of
the corresponding weights. `save_model` stores the same statistics in `model.safetensors`, also for the hub.
"""

import hashlib
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.io import atomic_files
from aezoo.training.data_statistics import DataStatistics

NAME = "calibration.safetensors"
_WEIGHTS = "weights_sha256"


def write(folder: Path, model: Autoencoder) -> Path:
    """Write the statistics of a model next to its weights; return the file.

    Raises:
        AezooError: the file cannot be written.
    """
    assert model.data_statistics is not None
    content = save(model.data_statistics.to_tensors(), {_WEIGHTS: weights_sha256(model)})
    cure = f"without write access to {folder}, later calls need the training data"
    atomic_files.write(folder / NAME, lambda file: file.write(content), cure=cure)
    return folder / NAME


def read(folder: Path, model: Autoencoder, code_size: int) -> DataStatistics | None:
    """Return the statistics that `write` has stored in a folder, or None if there are none for these weights.

    Args:
        folder: folder of a run or of a saved model.
        model: the model.
        code_size: number of values in a code.

    Raises:
        AezooError: the file is damaged.
    """
    file = folder / NAME
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as content:
            weights = (content.metadata() or {}).get(_WEIGHTS)
            tensors: dict[str, Tensor] = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise AezooError(f"cannot read {file}: {' '.join(str(error).split())[:100]}; delete it, and run aezoo detect "
                         "with the training data again") from error  # fmt: skip
    if weights != weights_sha256(model):
        print(f"aezoo: {file} belongs to other weights and is ignored: aezoo detect with the training data updates it",
              file=sys.stderr)  # fmt: skip
        return None
    return DataStatistics.from_tensors(tensors, code_size, str(file))


def weights_sha256(model: Autoencoder) -> str:
    """Return the SHA-256 of all parameters and buffers, converted to float32."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
