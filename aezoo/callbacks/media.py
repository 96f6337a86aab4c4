"""Log pictures, histograms, texts, embeddings and hyperparameters in the format that each logger supports.

| | TensorBoard | W&B | MLflow | others |
|---|---|---|---|---|
| picture | Images | image | image | `log_image(key, [pixels], step=step)`, if available |
| histogram | Histograms | histogram | picture | picture |
| text | Text | table | text file | |
| embedding | Projector | table | CSV file | |
| hyperparameters | HParams, see `Dashboard` | config | parameters | `log_hyperparams` |

All functions write on rank zero only. An error of TensorBoard, which writes to the disk, is raised; an error of another
logger gives one warning and does not end the run.
"""

import csv
import io
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from aezoo.callbacks.loggers import MLflow

# counts of each bar, (N,), and the edges between them, (N + 1,)
Bars = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
_BARS = 64
# maximum columns of a table; wider codes are replaced by their principal components
_MAX_COLUMNS = 256
_COMPONENTS = 64
_failed: "weakref.WeakSet[Logger]" = weakref.WeakSet()


def tensorboard_writers(trainer: pl.Trainer) -> list[Any]:
    """Return the SummaryWriters of this run, on rank zero."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_picture(trainer: pl.Trainer, name: str, pixels: np.ndarray[Any, Any], png: bytes) -> None:
    """Log a picture.

    Args:
        trainer: trainer of the run.
        name: name, such as `pictures/samples`.
        pixels: (H, W, 3), uint8.
        png: the same picture as PNG data, so that it is not encoded again.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    for writer in tensorboard_writers(trainer):
        image = Summary.Image(height=len(pixels), width=pixels.shape[1], colorspace=3, encoded_image_string=png)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        writer.file_writer.add_summary(summary, trainer.global_step)
    _to_others(trainer, lambda logger: _add_picture(logger, name, pixels, trainer.global_step))


def log_histogram(
    trainer: pl.Trainer, name: str, to_tensorboard: Callable[[Any], None], bars: Callable[[], Bars]
) -> None:
    """Log a histogram.

    Args:
        trainer: trainer of the run.
        name: name, such as `weights/encoder.0.weight`.
        to_tensorboard: writes it to a SummaryWriter.
        bars: returns the bars for other loggers, at most 512.
    """
    for writer in tensorboard_writers(trainer):
        to_tensorboard(writer)
    _to_others(trainer, lambda logger: _add_histogram(logger, name, bars(), trainer.global_step))


def bars_of(values: Tensor) -> Bars:
    """Compute a histogram of finite values (N,)."""
    return np.histogram(values.detach().float().cpu().numpy(), _BARS)


def log_text(trainer: pl.Trainer, name: str, text: str) -> None:
    """Log the text of a YAML file under its name without suffix."""
    for writer in tensorboard_writers(trainer):
        writer.add_text(name, f"```yaml\n{text}\n```", trainer.global_step)

    def add(logger: Logger) -> None:
        if isinstance(logger, WandbLogger):
            logger.log_text(name, columns=[name], data=[[text]], step=trainer.global_step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"{name}.yaml")

    _to_others(trainer, add)


def log_hyperparameters(trainer: pl.Trainer, values: Mapping[str, Any]) -> None:
    """Log plain values by name; for TensorBoard's HParams tab, see `Dashboard`."""
    _to_others(trainer, lambda logger: logger.log_hyperparams(dict(values)))


def log_results(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """Log metrics of the whole run; `Dashboard` writes them to a separate folder for TensorBoard."""
    _to_others(trainer, lambda logger: logger.log_metrics(dict(values), step=trainer.global_step))


def log_embedding(
    trainer: pl.Trainer,
    name: str,
    codes: Tensor,
    columns: Mapping[str, Tensor],
    sprites: Tensor | None,
    to_tensorboard: Callable[[Path], None],
) -> None:
    """Log points in the latent space.

    Args:
        trainer: trainer of the run.
        name: name, such as `codes`.
        codes: (N, D); more than 256 dimensions are reduced to 64 principal components.
        columns: metadata of the points, (N,) integers each.
        sprites: (N, 3, side, side) in [0, 1].
        to_tensorboard: writes the points to the folder of the event files.
    """
    for writer in tensorboard_writers(trainer):
        to_tensorboard(Path(writer.log_dir))

    def add(logger: Logger) -> None:
        if not isinstance(logger, WandbLogger | MLFlowLogger):
            return
        values, heads = codes.float().cpu(), "z"
        if values.shape[1] > _MAX_COLUMNS:
            values, heads = values - values.mean(0), "PC "
            _, _, directions = torch.pca_lowrank(values, q=min(_COMPONENTS, *values.shape), center=False)
            values = values @ directions
        names = [f"{heads}{i}" for i in range(values.shape[1])] + [*columns]
        known = [[int(value) for value in row] for row in zip(*columns.values(), strict=True)] or [[]] * len(values)
        rows = [[*place, *of] for place, of in zip(values.tolist(), known, strict=True)]
        if isinstance(logger, WandbLogger):
            import wandb

            if sprites is not None:
                pixels = (sprites.permute(0, 2, 3, 1) * 255).round().byte().numpy()
                names, rows = (
                    [*names, "sample"],
                    [[*row, wandb.Image(one)] for row, one in zip(rows, pixels, strict=True)],
                )
            logger.log_table(f"projector/{name}", columns=names, data=rows, step=trainer.global_step)
        else:
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([names, *rows])
            logger.experiment.log_text(logger.run_id, text.getvalue(), f"projector/{name}.csv")

    _to_others(trainer, add)


def viewers(trainer: pl.Trainer) -> Iterator[tuple[str, Path]]:
    """Yield the commands that show the local logs of a run, each with its last argument, a path."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield "tensorboard --logdir ", Path(logger.save_dir)
        elif isinstance(logger, MLflow) and logger.is_local:
            yield "mlflow server --backend-store-uri sqlite:///", logger.folder / "mlflow" / "mlflow.db"


def _add_picture(logger: Logger, name: str, pixels: np.ndarray[Any, Any], step: int) -> None:
    if isinstance(logger, MLFlowLogger):
        # characters that MLflow allows
        key = re.sub(r"[^\w/. -]+", "", name, flags=re.ASCII)
        logger.experiment.log_image(logger.run_id, pixels, key=key, step=step)
    elif callable(log_image := getattr(logger, "log_image", None)):
        log_image(name, [pixels], step=step)


def _add_histogram(logger: Logger, name: str, bars: Bars, step: int) -> None:
    if isinstance(logger, WandbLogger):
        import wandb

        found: Any = {name: wandb.Histogram(np_histogram=bars)}
        logger.log_metrics(found, step)
    elif isinstance(logger, MLFlowLogger) or hasattr(logger, "log_image"):
        from aezoo.callbacks import plotting

        _add_picture(logger, name, plotting.render(plotting.histogram_figure(*bars, name)), step)


def _to_others(trainer: pl.Trainer, add: Callable[[Logger], None]) -> None:
    """Call `add` for each logger except TensorBoard's."""
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            continue
        try:
            add(logger)
        except Exception as error:  # must not end training
            if logger not in _failed:
                _failed.add(logger)
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                rank_zero_warn(f"{type(logger).__name__} could not log everything: {reason[:300]}")
