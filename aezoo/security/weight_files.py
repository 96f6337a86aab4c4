"""Reading of untrusted files of weights, without running code in them."""

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from aezoo.errors import AezooError
from aezoo.security import archives, values


def read(path: Path, label: str, allowed: Sequence[Any] = ()) -> Any:
    """The content of a `.pt`, `.pth`, `.bin` or `.ckpt` file, tensors and plain values; of others the tensors by name.

    A file of torch may also contain an `argparse.Namespace`, the settings of many training scripts: it only has values.

    Args:
        path: a file on this disk; `.safetensors` and `.npz` are recognised by their names.
        label: its name in messages.
        allowed: further classes that run no code when they are loaded, for `torch.serialization.safe_globals`.

    Raises:
        AezooError: the file is damaged, decompresses to far more than its size, or has objects that could run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        archives.check_growth(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        archives.check_tuples(path)
        with torch.serialization.safe_globals([argparse.Namespace, *allowed]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
        values.check_extent(found, label)
    except AezooError:
        raise
    except Exception as error:  # a damaged file can cause any exception of the readers
        if isinstance(error, pickle.UnpicklingError):
            raise AezooError(f"{label} is refused: it is damaged, or contains objects that could run code") from error
        reason = " ".join(str(error).split())[:200]
        raise AezooError(f"cannot read {label}: {reason}; download it again") from error
    return found


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _read_npz(path: Path) -> dict[str, Tensor]:
    with np.load(path, allow_pickle=False) as arrays:
        return {key: torch.from_numpy(np.ascontiguousarray(arrays[key])) for key in arrays.files}
