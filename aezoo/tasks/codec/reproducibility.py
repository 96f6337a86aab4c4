"""What the results of a network depend on: its weights, the number of threads, the kernels."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.registry import name_of
from aezoo.tasks.codec.container import MAX_THREADS
from aezoo.tasks.samples import reference_tensor


def fingerprint(model: Autoencoder) -> str:
    """SHA-256 over the registry name, the plain hyperparameters and the weights of a model."""
    # LightningCLI adds entries that begin with an underscore
    plain = {key: value for key, value in dict(model.hparams).items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([model_name(model), plain], sort_keys=True, default=str).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(json.dumps([key, str(value.dtype), list(value.shape)]).encode())
        digest.update(memoryview(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def model_name(model: Autoencoder) -> str:
    """The registry name of a model, or its class name."""
    return name_of(type(model)) or type(model).__qualname__


def model_folder(fingerprint: str) -> str:
    """The folder next to its files in which `compress` stores a model."""
    return f"model-{fingerprint[:8]}"


def describe_device(model: Autoencoder) -> dict[str, str]:
    """The device, dtype and library that a model computes with."""
    reference = reference_tensor(model)
    return {
        "device": reference.device.type,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


@contextmanager
def deterministic_kernels(threads: int) -> Iterator[int]:
    """Use the same kernels for the same shapes, and a fixed number of threads, which is yielded; then restore all.

    Sums are split among threads, so their last bits depend on the number of threads.

    Args:
        threads: number of torch's threads on the CPU; 0 does not change it.

    Raises:
        AezooError: not a number of threads.
    """
    if not 0 <= threads <= MAX_THREADS:
        raise AezooError(f"threads is {threads}: give a number from 1 to {MAX_THREADS}, or 0 to leave it as it is")
    before = torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        if threads:
            torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield torch.get_num_threads()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.set_num_threads(before)


def little_endian_bytes(values: npt.NDArray[Any]) -> bytes:
    """An array's bytes, the lowest byte of each value first."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()


def decode_codes(model: Autoencoder, codes: npt.NDArray[np.float32], block: int) -> Any:
    """Outputs (n, *input_shape), float32, from codes (n, D); the model processes `block` samples at a time."""
    parts = []
    for start in range(0, len(codes), block):
        z = torch.from_numpy(codes[start : start + block]).unflatten(1, model.code_shape)
        parts.append(model.decode(z.to(reference_tensor(model))).float().cpu().numpy())
    return np.concatenate(parts)
