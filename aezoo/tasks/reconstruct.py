"""reconstruct: what a model makes of samples, how far off it is, and which samples it knows best and least."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from aezoo.autoencoder import Autoencoder
from aezoo.errors import AezooError
from aezoo.tasks.output import Store, fill, table_text
from aezoo.tasks.samples import Samples, at_work

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Reconstruction:
    """What `reconstruct` found; arrays are memory-mapped files where a folder was given.

    Attributes:
        x_hat: (N, *shape), reconstructions in data space, float32.
        mse: (N,) squared error of each sample, the mean over its values.
        mae: (N,) absolute error of each sample, likewise.
        score: (N,) the model's `score` in nats per sample: -log p(x | code), of a VAE -ELBO, with the KL of its code.
        files: what has been written.
    """

    x_hat: npt.NDArray[np.float32]
    mse: npt.NDArray[np.float32]
    mae: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32]
    files: list[Path] = field(default_factory=list)

    def summary(self) -> str:
        """Means and quantiles as a table."""
        rows = []
        for name in ("mse", "mae", "score"):
            values = getattr(self, name)
            low, middle, high = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
            rows.append({"error": name, "mean": float(values.mean(dtype=np.float64)), "5 %": low, "median": middle,
                         "95 %": high, "largest": float(values.max())})  # fmt: skip
        # PSNR of the mean error, peak 1, as `aezoo test` reports it
        psnr = -10 * math.log10(max(float(self.mse.mean(dtype=np.float64)), 1e-20))
        return f"{table_text(rows)}\n{len(self.mse):,} samples, PSNR {psnr:.2f} dB"


def reconstruct(
    model: Autoencoder,
    x: Any,
    *,
    n_shown: int = 8,
    table: str = "csv",
    out: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Reconstruction:
    """Reconstruct samples and measure the error of each.

    Writes reconstructions.npy, errors.csv (index, mse, mae, score and, where there are such, file and label) and a
    picture of the best, the median and the worst samples.

    Args:
        model: a trained model.
        x: samples (N, *input_shape), a DataModule (its test split) or `Samples`.
        n_shown: samples in each row of the picture; 0 draws none.
        table: csv or parquet, the format of the errors.
        out: folder for the results; None keeps them in memory.
        batch_size: samples at a time.
        seed: of models that draw noise.
        progress: show a bar on a terminal.

    Raises:
        AezooError: samples that the model cannot use, or a folder that cannot be written.
    """
    if table not in ("csv", "parquet"):
        raise AezooError(f"table is {table!r}: take csv or parquet")
    if n_shown < 0 or batch_size < 1:
        raise AezooError(f"n_shown must be at least 0 and batch_size at least 1, got {n_shown} and {batch_size}")
    samples = Samples.of(x).check(model)
    n = len(samples)
    with Store(out) as store, at_work(model, seed) as device:
        x_hat = store.array("reconstructions", (n, *model.input_shape))
        errors = {name: np.empty(n, np.float32) for name in ("mse", "mae", "score")}
        start = 0
        for batch in samples.batches(batch_size, "reconstruct" if progress else ""):
            given = batch.to(device)
            output = model(given).float()
            difference = (output - given).flatten(1)
            fill(x_hat, start, output)
            fill(errors["mse"], start, difference.square().mean(1))
            fill(errors["mae"], start, difference.abs().mean(1))
            fill(errors["score"], start, model.score(given))
            start += len(batch)
        rows = [
            {"index": i} | {name: float(values[i]) for name, values in errors.items()} | note
            for i, note in enumerate(samples.notes)
        ]
        store.table("errors", rows, table)
        if n_shown and store.folder is not None:
            store.picture("reconstructions", _picture(samples, x_hat, errors["mse"], n_shown))
    return Reconstruction(x_hat, **errors, files=store.files)


def _picture(samples: Samples, x_hat: npt.NDArray[Any], mse: npt.NDArray[Any], n_shown: int) -> "Figure":
    """Originals above reconstructions, for the samples of least, middle and largest error."""
    from aezoo.callbacks import drawing

    order = torch.from_numpy(np.argsort(mse, kind="stable"))
    n = min(n_shown, len(order))
    middle = (len(order) - n) // 2
    groups = {"best": order[:n], "median": order[middle : middle + n], "worst": order[-n:].flip(0)}
    pairs = {
        name: (samples.rows(index), torch.from_numpy(np.asarray(x_hat[index.numpy()])))
        for name, index in groups.items()
    }
    if not drawing.is_image(samples.shape):
        panels = [
            {"original": given[i], "output": output[i]} for given, output in pairs.values() for i in range(min(n, 4))
        ]
        labels = [f"{name}: mse {mse[index[i]]:.3g}" for name, index in groups.items() for i in range(min(n, 4))]
        return drawing.panel_figure(panels, labels)
    limits = drawing.value_range(torch.cat([given for given, _ in pairs.values()]))
    rows = [drawing.tiles(part, limits) for pair in pairs.values() for part in pair]
    labels = [label for name in groups for label in (name, "output")]
    return drawing.mosaic_figure(rows, labels)
