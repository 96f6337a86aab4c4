"""Fixtures of the laws and of tests of components of models."""

import os
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from quiet_trainer import quiet_trainer
from sklearn.datasets import load_digits
from torch import Tensor, nn

from aezoo import Autoencoder, DataModule

Fitter = Callable[..., float]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


def _images(data: DataModule, stage: str) -> Tensor:
    x: Tensor = data.tensors(stage)[0]
    assert x.is_floating_point()
    assert 0 <= x.min() <= x.max() <= 1
    return x


@pytest.fixture(scope="session")
def digits() -> Tensor:
    """scikit-learn's digits in the split of the reference table: the first 1,437 for training, 360 for test."""
    return torch.from_numpy(load_digits().data / 16).reshape(-1, 1, 8, 8)


@pytest.fixture(scope="session")
def mnist5k() -> Tensor:
    """The 4,000 training images of mnist5k in [0, 1], float64."""
    return _images(DataModule("mnist5k"), "train").double()


@pytest.fixture(scope="session")
def fashion_mnist() -> tuple[Tensor, Tensor]:
    """All of Fashion-MNIST, train and test, from the files under AEZOO_TEST_ROOT (default /usr/share/datasets)."""
    root = Path(os.environ.get("AEZOO_TEST_ROOT", "/usr/share/datasets"))
    if not list(root.glob("**/train-images-idx3-ubyte*")):
        pytest.skip(f"no Fashion-MNIST under {root}: install dataset-fashion-mnist or set AEZOO_TEST_ROOT")
    data = DataModule("fashion_mnist", root=str(root))
    return torch.cat([_images(data, "train"), _images(data, "val")]), _images(data, "test")


@pytest.fixture
def quiet() -> Callable[..., pl.Trainer]:
    """A trainer that writes and prints nothing."""
    return quiet_trainer


@pytest.fixture(scope="session")
def lbfgs() -> Fitter:
    """Minimise a deterministic loss over the whole set; returns the last loss."""

    def fit(model: Autoencoder, x: Tensor, rounds: int) -> float:
        model.train()
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=rounds, history_size=30, line_search_fn="strong_wolfe",
            tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model.loss(x)["loss"]
            loss.backward()
            return loss

        optimizer.step(closure)
        model.eval()
        with torch.no_grad():
            return float(model.loss(x)["loss"])

    return fit


@pytest.fixture(scope="session")
def adam() -> Fitter:
    """Minimise a loss over shuffled batches with Adam, its rate falling to 0; returns the last loss."""

    def fit(model: Autoencoder, x: Tensor, steps: int, lr: float, batch: int) -> float:
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        loss = torch.zeros(())
        for step in range(steps):
            rows = torch.randint(len(x), (batch,)) if batch < len(x) else slice(None)
            optimizer.zero_grad()
            loss = model.loss(x[rows])["loss"]
            loss.backward()
            optimizer.step()
            schedule.step()
            assert torch.isfinite(loss), f"step {step}"
        model.eval()
        return float(loss.detach())

    return fit


@pytest.fixture(scope="session")
def shifted() -> Callable[[Autoencoder], Autoencoder]:
    """Add random offsets to all parameters: zero biases would hide many mistakes."""

    def shift(model: Autoencoder) -> Autoencoder:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += (0.4 if p.ndim == 1 else 0.1) * torch.randn_like(p)
                if name.endswith("W_NX"):
                    p /= p.norm(dim=1, keepdim=True)
        return model

    return shift


@pytest.fixture(scope="session")
def centred() -> Callable[[Autoencoder, Tensor], Autoencoder]:
    """Initialise a linear model's biases at the data's mean, which shortens optimisation and keeps the optimum."""

    def start(model: Autoencoder, x: Tensor) -> Autoencoder:
        down, up = (next(m for m in net if isinstance(m, nn.Linear)) for net in (model.encoder, model.decoder))
        mean = x.flatten(1).mean(0).to(up.bias)
        with torch.no_grad():
            up.bias.copy_(mean)
            down.bias.copy_(-down.weight @ mean)
        return model

    return start


@pytest.fixture(scope="session")
def spectrum() -> Callable[[Tensor], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Mean, eigenvalues in descending order and eigenvectors (columns) of a data set, by numpy in float64."""

    def compute(x: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        flat = x.flatten(1).double().numpy()
        values, vectors = np.linalg.eigh(np.cov(flat.T, bias=True))
        return flat.mean(0), values[::-1].clip(min=0), vectors[:, ::-1]

    return compute
