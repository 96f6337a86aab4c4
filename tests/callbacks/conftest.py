"""Fixtures: a quiet trainer, and its event files."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from callback_fakes import digits
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            # Lightning 2.6 creates a LeafSpec, which torch deprecates
            item.add_marker(pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"))
            # trainers get plain loaders
            item.add_marker(pytest.mark.filterwarnings("ignore:.*does not have many workers"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


KINDS = ("scalars", "images", "histograms", "distributions", "tensors")
Fit = Callable[..., pl.Trainer]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    def run(model: pl.LightningModule, *callbacks: pl.Callback, ckpt_path: str | None = None, **options: Any):
        options = {"max_epochs": 2, "logger": TensorBoardLogger(tmp_path, name="run", version="0")} | options
        n, batch_size = options.pop("n", 48), options.pop("batch_size", 16)
        trainer = pl.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            enable_model_summary=False,
            log_every_n_steps=1,
            **({"enable_checkpointing": False} | options),
            **(
                {}
                if any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks)
                else {"enable_progress_bar": False}
            ),
        )
        data = digits(model.input_shape, n)
        loaders = DataLoader(data, batch_size, shuffle=True), DataLoader(data, batch_size)
        trainer.fit(model, *loaders, ckpt_path=ckpt_path)
        return trainer

    return run


@pytest.fixture
def events(tmp_path: Path) -> Callable[[], EventAccumulator]:
    def read() -> EventAccumulator:
        found = EventAccumulator(str(tmp_path / "run" / "0"), size_guidance=dict.fromkeys(KINDS, 0))
        found.Reload()
        return found

    return read
