"""What `benchmarks.peers` trains: three networks of the zoo, real digits as data, and the common initial weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
VAL_ROWS = 500


@dataclass(frozen=True)
class Workload:
    """A network and the shape of its data.

    Attributes:
        description: one line for `--help`.
        shape: shape of one sample in the data file.
        hidden_dims: widths of the dense encoder, or channels of the convolutional one.
        latent_dim: size of the code.
        variational: a convolutional VAE; otherwise the dense autoencoder with a rectified code.
        rows: training rows of a full run.
        batch: rows per step.
        epochs: epochs of a full run, including the warm-up.
        tolerance: largest allowed relative distance of a curve from that of the compiled loop.
        lr: Adam's learning rate.
    """

    description: str
    shape: tuple[int, ...]
    hidden_dims: tuple[int, ...]
    latent_dim: int
    variational: bool
    rows: int
    batch: int
    epochs: int
    tolerance: float
    lr: float = 1e-3


WORKLOADS = {
    "dense": Workload(
        description="784-128-64-32-64-128-784, batch 256",
        shape=(784,),
        hidden_dims=(128, 64),
        latent_dim=32,
        variational=False,
        rows=60_000,
        batch=256,
        epochs=4,
        tolerance=0.01,
        # at 1e-3, rounding errors separate the curves of the same loop, compiled and not compiled, by 3 %
        lr=2e-4,
    ),
    "conv28": Workload(
        description="VAE on 1x28x28, channels 32-64-128-256, code 16, batch 128",
        shape=(1, 28, 28),
        hidden_dims=(32, 64, 128, 256),
        latent_dim=16,
        variational=True,
        rows=5_120,
        batch=128,
        epochs=3,
        # each party draws its own noise for the code
        tolerance=0.03,
    ),
    "conv64": Workload(
        description="VAE on 3x64x64, channels 32-64-128-256-512, code 128, batch 64",
        shape=(3, 64, 64),
        hidden_dims=(32, 64, 128, 256, 512),
        latent_dim=128,
        variational=True,
        rows=640,
        batch=64,
        epochs=3,
        tolerance=0.01,
        # at 1e-3, leaving the first plateau depends on single draws, and curves of equal parties differ by 7 %
        lr=2e-4,
    ),
}


def images(n: int, shape: tuple[int, ...], seed: int) -> Bytes:
    """Pictures (n, *shape) from the 5,000 digits of mnist5k: first unchanged, then shifted by up to 2 pixels."""
    import torch
    import torch.nn.functional as F

    from aezoo.data.mnist5k import FILE

    with np.load(FILE, allow_pickle=False) as file:
        digits: Bytes = file["images"]
    random = np.random.default_rng(seed)
    which = np.arange(n) % len(digits)
    shifts = random.integers(-2, 3, size=(n, 2)) * (np.arange(n) >= len(digits))[:, None]
    padded = np.pad(digits, ((0, 0), (2, 2), (2, 2)))
    down, right = (np.arange(28) + 2 + shifts[:, axis, None] for axis in (0, 1))
    moved = padded[which[:, None, None], down[:, :, None], right[:, None, :]]
    if shape[-1] in (28, 784):
        return moved.reshape(n, *shape)
    large = F.interpolate(torch.from_numpy(moved)[:, None], shape[1:], mode="bilinear").numpy()
    # a colour for each picture, so that the three channels differ
    colours = random.uniform(0.3, 1, size=(n, shape[0], 1, 1)).astype(np.float32)
    return (large * colours).astype(np.uint8)


def build_model(workload: Workload, seed: int) -> Any:
    """The zoo's model with the weights that `aezoo fit --seed_everything SEED` starts from."""
    import torch

    import aezoo

    torch.manual_seed(seed)
    common: dict[str, Any] = {"latent_dim": workload.latent_dim, "hidden_dims": workload.hidden_dims}
    if workload.variational:
        return aezoo.create_model("vae", workload.shape, net="conv", **common)
    return aezoo.create_model("dense_ae", workload.shape, code_activation="relu", **common)


def write_inputs(workload: Workload, rows: int, seed: int, folder: Path) -> int:
    """Write data.npz and weights.npz for all parties; return the number of parameters.

    Args:
        workload: one of `WORKLOADS`.
        rows: training rows.
        seed: seed of shifts and weights.
        folder: folder to write into.
    """
    x = images(rows + min(VAL_ROWS, rows), workload.shape, seed)
    np.savez(folder / "data.npz", x_train=x[:rows], x_val=x[rows:])
    weights = [parameter.detach().numpy() for parameter in build_model(workload, seed).parameters()]
    np.savez(folder / "weights.npz", *weights)
    return sum(weight.size for weight in weights)
