"""reconstruct: reconstructions of samples, their errors, and the best and worst of them."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.bases.multimodal import Multimodal
from aezoo.data.columns import Columns
from aezoo.errors import AezooError
from aezoo.metrics.similarity import ValueErrors, has_peak, psnr
from aezoo.tasks.coherence import coherence
from aezoo.tasks.embed_codes import has_class_labels
from aezoo.tasks.passes import Range, current
from aezoo.tasks.result_store import Row, Samples, Store, check_table, row_of, table_text, write_batch
from aezoo.tasks.results import Result, count_of, takes_model
from aezoo.tasks.samples import SampleSet, evaluation_mode, rows_of
from aezoo.tasks.tiling import Sized
from aezoo.training.model_names import display_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# columns of a table that the summary shows
_MAX_COLUMNS = 12


@dataclass(repr=False)
class Reconstruction(Result):
    """The result of `reconstruct`; x_hat is a memory-mapped file if a folder was given.

    Attributes:
        x_hat: (N, *shape), reconstructions in the scale of the model, float32; files are in the data's units. For
            pictures of several sizes, a sequence of (C, H, W).
        mse: (N,) squared error of each sample, the mean over its values that are not missing.
        mae: (N,) absolute error of each sample, the mean over the same values.
        score: (N,) the model's `anomaly_score` in nats per sample, by which `detect` ranks, too: the deviance, -log
            p(x | code) less that of a perfect reconstruction, for a VAE with the KL of its code. None with `parts`,
            since it depends on the whole sample.
        part_mse: the squared error of each part, by its number, (N,); NaN of a missing part; empty without `parts`.
        columns: of a table, one row for each of its columns: mean absolute and root mean square error and the deviation
            in the column's unit, and r2, the share of the variance explained.
        coherence: with `parts` and labels, one row for each part, see `aezoo.tasks.coherence`.
        psnr: that of the mean error in dB, as `aezoo test` reports it; None of data that are not scaled to [0, 1].
        r2: the share of the samples' variance that the reconstructions explain; None if they have none.
    """

    x_hat: Samples
    mse: npt.NDArray[np.float32]
    mae: npt.NDArray[np.float32]
    score: npt.NDArray[np.float32] | None = None
    part_mse: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict)
    columns: list[Row] = field(default_factory=list)
    coherence: list[Row] = field(default_factory=list)
    psnr: float | None = None
    r2: float | None = None

    def about(self) -> str:
        return f"{count_of(self.x_hat)}, mse {float(np.nanmean(self.mse)):.4g}"

    @property
    def errors(self) -> dict[str, npt.NDArray[np.float32]]:
        """All errors by column name, (N,) each."""
        score = {} if self.score is None else {"score": self.score}
        return {"mse": self.mse, "mae": self.mae, **score} | {f"mse_{i}": mse for i, mse in self.part_mse.items()}

    def summary(self) -> str:
        """Means and quantiles as a table."""
        rows = []
        for name, all_values in self.errors.items():
            values = _drop_nan(all_values) if self.part_mse else all_values
            low, middle, high = np.quantile(values, (0.05, 0.5, 0.95)).tolist()
            rows.append({"error": name, "mean": float(values.mean(dtype=np.float64)), "5 %": low, "median": middle,
                         "95 %": high, "largest": float(values.max())})  # fmt: skip
        text = f"{table_text(rows)}\n{len(self.mse):,} samples"
        text += "" if self.psnr is None else f", PSNR {self.psnr:.2f} dB"
        text += "" if self.r2 is None else f", r2 {self.r2:.4g}"
        lacking = int(np.isnan(self.mse).sum()) if self.part_mse else 0
        if 0 < lacking < len(self.mse):
            text += f"\n{lacking:,} of them lack the evaluated parts, and are not counted here"
        if self.columns:
            worst = sorted(self.columns, key=lambda row: np.nan_to_num(row["r2"], nan=2.0))[:_MAX_COLUMNS]
            text += "\n" + table_text([row for row in self.columns if row in worst])
            text += f"\nthe {len(worst)} worst of {len(self.columns)} columns" * (len(worst) < len(self.columns))
        return f"{text}\n{table_text(self.coherence)}" if self.coherence else text


@takes_model
def reconstruct(
    model: Autoencoder,
    x: Any,
    *,
    parts: int | tuple[int, ...] | None = None,
    n_shown: int = 8,
    table: str = "csv",
    tile: int = 0,
    blend: float = 0.0,
    out: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Reconstruction:
    """Reconstruct samples and measure the error of each.

    Writes reconstructions.npy, errors.csv (index, mse, mae, score and, if known, file and label; with `parts` the mse
    of each instead of the score) and a picture of the best, the median and the worst samples. With `parts` and labels
    also coherence.csv: whether the generated parts have the class of their sample. For a table also, with the names
    and units of its columns, reconstructions.csv, and columns.csv with the error by column; errors.csv then also has
    the values and errors of each sample by column. Pictures of several sizes, which convolutional models whose code is
    a map take, give reconstructions/000000.png and so on in their sizes instead of reconstructions.npy.

    Args:
        model: a trained model.
        x: samples (N, *input_shape), a DataModule (its test split) or `SampleSet`; a convolutional model whose code is
            a map takes samples of another size, too, and a list of pictures of several sizes.
        parts: reconstruct whole samples only from this part, or from these, numbered from 0; the other parts are
            ignored. For models of samples that have parts, such as mvae. By default all parts are used.
        n_shown: samples in each row of the picture; 0 draws none.
        table: format of the errors, csv or parquet.
        tile: process samples with sides above this in tiles of this many points per side, without seams and in the
            memory that a tile needs; 0 processes all as a whole.
        blend: let tiles overlap by this share of their sides and blend them, for networks that need the whole sample;
            the result then differs from that of the whole.
        out: folder for the results; None keeps them in memory.
        batch_size: samples at a time.
        seed: seed of models that draw noise.
        progress: show a bar on a terminal.

    Raises:
        AezooError: samples that the model cannot use, parts that it does not have, or a folder that cannot be written.
    """
    check_table(table, ("csv", "parquet"))
    if n_shown < 0 or batch_size < 1:
        raise AezooError(f"n_shown must be at least 0 and batch_size at least 1, got {n_shown} and {batch_size}")
    reconstructor = None if parts is None else _PartReconstructor(model, (parts,) if isinstance(parts, int) else parts)
    sized = Sized(model, tile, blend)
    samples = SampleSet.from_data(x, allow_missing=model.takes_missing).check(model, sized)
    n, shapes, batch_size = len(samples), samples.shapes, sized.batch_size(samples, batch_size)
    with Store(out, model.data_units) as store, evaluation_mode(model, seed) as like:
        x_hat: Samples = (
            store.samples("reconstructions", (n, *samples.shape)) if shapes is None else store.separate(shapes)
        )
        mse, mae, score = (store.scratch((n,)) for _ in range(3))
        part_mse = {i: store.scratch((n,)) for i in range(len(reconstructor.model.sizes) if reconstructor else 0)}
        limits, by_value, passes = Range(), ValueErrors(), current.get()
        title = "reconstruct" if progress else ""
        for start, batch in passes.blocks(samples, batch_size, seed, title, (limits, by_value)):
            given, own = batch.to(like), sized(tuple(batch.shape[1:]))
            output = (reconstructor.reconstructed(given) if reconstructor else own(given)).float()
            difference = output - batch.to(output)
            write_batch(x_hat, start, output)
            limits.add(batch[~batch.isnan()])
            if shapes is None:
                by_value.add(batch, output)
            known = ~batch.to(like.device).isnan()
            write_batch(mse, start, _mean(difference.square(), known))
            write_batch(mae, start, _mean(difference.abs(), known))
            if reconstructor is None:
                write_batch(score, start, own.anomaly_score(given))
            else:
                parts_known = reconstructor.model.split(known)
                for i, part in enumerate(reconstructor.model.split(difference)):
                    write_batch(part_mse[i], start, _mean(part.square(), parts_known[i]))
        passes.finish()
        mse, mae, score = (np.array(errors) for errors in (mse, mae, score))
        part_mse = {i: np.array(errors) for i, errors in part_mse.items()}
        found = Reconstruction(x_hat, mse, mae, None if reconstructor else score, part_mse)
        if has_peak(limits.low, limits.high):
            found.psnr = psnr(float(_drop_nan(mse).mean(dtype=np.float64)))
        if shapes is None:
            found.r2 = by_value.r2()
        else:
            store.each_sample("reconstructions/", x_hat)
        errors, fields, columns, by_column = found.errors, samples.fields, samples.columns, None
        if columns is not None:
            by_column = np.asarray(x_hat) - samples.rows(range(n)).numpy()
            found.columns = columns.summary(by_value)
            store.table("reconstructions", columns.rows(x_hat), table)
            store.table("columns", found.columns, table)
        found.tabulate = functools.partial(_error_rows, errors, fields, columns, by_column)
        store.table("errors", found.tabulate(), table)
        if reconstructor and has_class_labels(samples):
            found.coherence = coherence(reconstructor.model, samples, np.asarray(x_hat), seed, batch_size)
        if found.coherence:
            store.table("coherence", found.coherence, table)
        if n_shown:
            found.draw = functools.partial(_picture, samples, x_hat, mse, n_shown, reconstructor)
            store.picture("reconstructions", found.draw)
    return replace(found, files=store.files)


def _error_rows(
    errors: dict[str, npt.NDArray[np.float32]],
    fields: dict[str, Sequence[Any]],
    columns: Columns | None,
    by_column: npt.NDArray[np.float32] | None,
) -> Iterator[Row]:
    for i in range(len(errors["mse"])):
        row = {"index": i} | {name: float(values[i]) for name, values in errors.items()} | row_of(fields, i)
        yield row if columns is None or by_column is None else row | columns.error_row(by_column[i])


def _drop_nan(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values that are numbers, if any is."""
    lacks = np.isnan(values)
    return values[~lacks] if not lacks.all() else values


def _mean(errors: Tensor, known: Tensor) -> Tensor:
    """The mean of each sample over its values that are not missing, (B, *shape) -> (B,); NaN if there are none."""
    return errors.masked_fill(~known, 0).flatten(1).sum(1) / known.flatten(1).sum(1)


class _PartReconstructor:
    """Some parts of samples, for a model with parts.

    Raises:
        AezooError: the model has no parts.
    """

    def __init__(self, model: Autoencoder, parts: Sequence[int]) -> None:
        if not isinstance(model, Multimodal):
            raise AezooError(f"{display_name(type(model))} does not support parts of samples: drop --parts, "
                             "or train a model that does, such as mvae")  # fmt: skip
        self.model, self.parts = model, parts

    def reconstructed(self, x: Tensor) -> Tensor:
        return self.model.reconstruct_from(x, self.parts)

    def shown(self, x: Tensor) -> Tensor:
        """Samples with their other parts grey, (B, *shape) -> (B, *shape)."""
        known = x[~x.isnan()]
        grey = (known.min() + known.max()) / 2
        seen = [part if i in self.parts else grey.expand_as(part) for i, part in enumerate(self.model.split(x))]
        return torch.cat(seen, self.model.decoder.dim + 1)


def _picture(
    samples: SampleSet,
    x_hat: Samples,
    mse: npt.NDArray[Any],
    n_shown: int,
    reconstructor: _PartReconstructor | None = None,
) -> "Figure":
    """Originals above reconstructions, with the encoded parts between, for the smallest, median and largest errors."""
    from aezoo.callbacks import plotting

    order = torch.from_numpy(np.argsort(mse, kind="stable")[: len(_drop_nan(mse))])  # NaN comes last
    n = min(n_shown, len(order))
    middle = (len(order) - n) // 2
    groups = {"best": order[:n], "median": order[middle : middle + n], "worst": order[-n:].flip(0)}
    shown = {}
    for name, index in groups.items():
        given, output = samples.rows(index), rows_of(x_hat, index)
        shown[name] = (
            {"original": given} | ({"seen": reconstructor.shown(given)} if reconstructor else {}) | {"output": output}
        )
    if not plotting.is_image(samples.shape):
        panels = [{what: part[i] for what, part in parts.items()} for parts in shown.values() for i in range(min(n, 4))]
        labels = [f"{name}: mse {mse[index[i]]:.3g}" for name, index in groups.items() for i in range(min(n, 4))]
        return plotting.panel_figure(panels, labels, columns=samples.columns)
    limits = plotting.value_range(torch.cat([parts["original"] for parts in shown.values()]))
    rows = [plotting.tiles(part, limits) for parts in shown.values() for part in parts.values()]
    labels = [name if what == "original" else what for name, parts in shown.items() for what in parts]
    return plotting.mosaic_figure(rows, labels)
