"""denoise: clean noisy samples with a model, compared with filters."""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aezoo import corruptions
from aezoo.autoencoder import Autoencoder
from aezoo.corruptions import Corruption
from aezoo.data.columns import Columns
from aezoo.errors import AezooError
from aezoo.metrics import Evaluation
from aezoo.metrics.similarity import has_peak
from aezoo.tasks.denoise_filters import MISSING, Filter, best_setting, filters, missing
from aezoo.tasks.passes import Range, current
from aezoo.tasks.result_store import Row, Samples, Store, table_text, write_batch
from aezoo.tasks.results import Result, count_of, takes_model
from aezoo.tasks.samples import SampleSet, evaluation_mode, middles, rows_of
from aezoo.tasks.samples import progress_bar as progress_bar
from aezoo.tasks.tiling import Sized
from aezoo.training.model_names import display_name
from aezoo.training.seeding import mix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# samples on which the filters' settings are chosen
_MAX_TUNING_SAMPLES = 64
# squares of larger noise overflow float32
_MAX_NOISE = 1e6
# limits of data that have a peak
_UNIT = (0.0, 1.0)


@dataclass(repr=False)
class Denoising(Result):
    """The result of `denoise`; the array is a memory-mapped file if a folder was given.

    Attributes:
        x_hat: (N, *shape), the model's output, float32; of pictures of several sizes, a sequence of (C, H, W).
        rows: a row for the model, the noisy samples and each filter: mse, psnr of data in [0, 1], ssim of images,
            the filter's setting; empty without `corrupt`, because there are no clean samples to compare with.
        n_compared: number of samples in the comparison.
        text: how it was made, and its best row.
    """

    x_hat: Samples
    rows: list[Row]
    n_compared: int = 0
    text: str = ""

    def about(self) -> str:
        return count_of(self.x_hat) + (f", mse {self.rows[0]['mse']:.4g}" if self.rows else "")

    def summary(self) -> str:
        """The comparison, or how to get one."""
        if not self.rows:
            return f"{len(self.x_hat):,} samples; errors need clean ones and noise to add, as in --corrupt gaussian:0.3"
        return f"{table_text(self.rows)}\n{self.text}"


@takes_model
def denoise(
    model: Autoencoder,
    x: Any,
    *,
    corrupt: str = "none",
    baselines: bool = True,
    n_compared: int = 1000,
    n_shown: int = 8,
    tile: int = 0,
    blend: float = 0.0,
    out: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Denoising:
    """Denoise noisy samples, or add noise to clean samples first and measure how much of it the model removes.

    Writes denoised.npy (of a table also denoised.csv, in the units of its columns) and a picture; with corrupt also
    denoise.csv: PSNR and SSIM against the clean originals, compared with a median filter, total variation and non-local
    means (which need the extra images). For PSNR and SSIM, the range of data between 0 and 1 is 1; that of other data
    goes from the least to the largest clean value. Pictures of several sizes, which convolutional models whose code is
    a map take, give denoised/000000.png and so on in their sizes instead of denoised.npy.

    Args:
        model: a trained model.
        x: samples (N, *input_shape), a DataModule (its test split) or `SampleSet`; noisy ones unless corrupt is given.
            A convolutional model whose code is a map takes samples of another size, too, and a list of pictures of
            several sizes.
        corrupt: noise to add first: gaussian:0.3, masking:0.3, salt_and_pepper:0.1; none if the samples are noisy.
        baselines: compare with filters.
        n_compared: number of samples in the comparison, drawn from the seed, since filters are slow.
        n_shown: samples in the picture; 0 draws none.
        tile: process samples with sides above this in tiles of this many points per side, without seams and in the
            memory that a tile needs; 0 processes all as a whole.
        blend: let tiles overlap by this share of their sides and blend them, for networks that need the whole sample;
            the result then differs from that of the whole.
        out: folder for the results; None keeps them in memory.
        batch_size: samples at a time.
        seed: seed of the noise, which depends only on it and on a sample's number.
        progress: show bars on a terminal.

    Raises:
        AezooError: a value that cannot work, or samples that the model cannot use.
    """
    if n_shown < 0 or n_compared < 1 or batch_size < 1:
        raise AezooError(f"n_shown must be at least 0, n_compared and batch_size at least 1, got {n_shown}, "
                         f"{n_compared} and {batch_size}")  # fmt: skip
    noise = corruptions.corruption(corrupt)
    if noise is not None and noise.amount > _MAX_NOISE:
        raise AezooError(f"corrupt is {corrupt!r}: give a standard deviation of at most {_MAX_NOISE:g}")
    sized = Sized(model, tile, blend)
    samples = SampleSet.from_data(x).check(model, sized)
    n, shapes, batch_size = len(samples), samples.shapes, sized.batch_size(samples, batch_size)
    with Store(out, model.data_units) as store, evaluation_mode(model, seed) as like:
        x_hat: Samples = store.samples("denoised", (n, *samples.shape)) if shapes is None else store.separate(shapes)
        limits, passes = Range(), current.get()
        for start, batch in passes.blocks(samples, batch_size, seed, "denoise" if progress else "", (limits,)):
            noisy = _corrupted(batch, range(start, start + len(batch)), noise, seed)
            write_batch(x_hat, start, sized(tuple(batch.shape[1:]))(noisy.to(like)))
            limits.add(batch)
        passes.finish()
        low, high = limits.low, limits.high
        if shapes is not None:
            store.each_sample("denoised/", x_hat)
        if has_peak(low, high) or low == high or model.likelihood.unit_interval:
            low, high = _UNIT

        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        compared, tuned_on, shown = (
            order[:k].sort().values for k in (n_compared, min(n_compared, _MAX_TUNING_SAMPLES), n_shown)
        )
        if samples.columns is not None:
            store.table("denoised", samples.columns.rows(x_hat))
        rows: list[Row] = []
        chosen: dict[str, tuple[str, Filter]] = {}
        text = ""
        if noise is not None:
            if baselines:
                chosen = _tuned(samples, tuned_on, noise, seed)
            evaluations = _evaluate(samples, compared, x_hat, noise, chosen, (low, high), batch_size, seed, progress)
            rows = _rows(display_name(type(model)), evaluations, chosen, (low, high))
            text = _text(rows, len(compared), n, len(tuned_on) if chosen else 0, (low, high))
            if baselines:
                rows += [
                    dict.fromkeys(rows[0]) | {"method": name, "setting": MISSING} for name in missing(samples.shape)
                ]
            store.table("denoise", rows)
        filters = [row for row in rows if row["method"] in chosen]
        best = min(filters, key=lambda row: float(row["mse"]))["method"] if filters else None
        shown_filter = None if best is None else (best, chosen[best][1])
        draw = functools.partial(_draw, samples, shown, x_hat, noise, shown_filter, seed) if n_shown else None
        if draw is not None:
            store.picture("denoised", draw)
    n_compared = len(compared) if rows else 0
    # without clean samples the errors are unknown
    unknown = dict.fromkeys(("mse", "psnr"), math.nan)
    shown_rows = rows or [{"method": display_name(type(model)), **unknown, "setting": ""}]
    return Denoising(x_hat, rows, n_compared, text, files=store.files, tabulate=lambda: shown_rows, draw=draw)


def _draw(
    samples: SampleSet,
    shown: Tensor,
    x_hat: Samples,
    noise: Corruption | None,
    best: tuple[str, Filter] | None,
    seed: int,
) -> "Figure":
    """Some samples, the model's output and that of the best filter."""
    clean = samples.rows(shown)
    given = noisy_rows(samples, shown, noise, seed)
    panels = {} if noise is None else {"original": clean}
    # without added noise it is unknown whether samples are noisy
    panels |= {
        "input" if noise is None else "noisy": given,
        "output": rows_of(x_hat, shown),
    }
    if best is not None:
        panels[best[0]] = torch.from_numpy(best[1](given.numpy()))
    return _picture(panels, samples.columns)


def _corrupted(clean: Tensor, numbers: Iterable[int], noise: Corruption | None, seed: int) -> Tensor:
    """Samples with noise that depends on the seed and a sample's index, not on batch size or device."""
    if noise is None:
        return clean
    generators = (torch.Generator().manual_seed(mix(seed, number)) for number in numbers)
    return torch.stack([noise(x, generator) for x, generator in zip(clean, generators, strict=True)])


def noisy_rows(samples: SampleSet, index: Tensor, noise: Corruption | None, seed: int) -> Tensor:
    """`samples.rows` with the noise that the whole samples got."""
    if samples.shapes is None:
        return _corrupted(samples.rows(index), index.tolist(), noise, seed)
    return middles([_corrupted(samples.rows([i]), [i], noise, seed)[0] for i in index.tolist()])


def _tuned(samples: SampleSet, index: Tensor, noise: Corruption, seed: int) -> dict[str, tuple[str, Filter]]:
    """Each filter with its best setting for these samples."""
    clean = samples.rows(index)
    noisy = noisy_rows(samples, index, noise, seed)
    sigma = float((noisy - clean).square().mean().sqrt())
    chosen = {}
    for name, settings in filters(samples.shape, sigma).items():
        setting = best_setting(settings, noisy.numpy(), clean.numpy())
        chosen[name] = setting, settings[setting]
    return chosen


def _evaluate(
    samples: SampleSet,
    compared: Tensor,
    x_hat: Samples,
    noise: Corruption,
    chosen: dict[str, tuple[str, Filter]],
    limits: tuple[float, float],
    batch_size: int,
    seed: int,
    progress: bool,
) -> list[Evaluation]:
    """Errors of the model, the noisy samples and each filter, in this order, with the data range scaled to [0, 1]."""
    low, high = limits
    evaluations = [Evaluation(samples.shape, torch.device("cpu")) for _ in range(2 + len(chosen))]
    with progress_bar("compare" if progress else "", len(compared)) as advance:
        for index in compared.split(batch_size if samples.shapes is None else 1):
            clean = samples.rows(index)
            noisy = _corrupted(clean, index.tolist(), noise, seed)
            outputs = [rows_of(x_hat, index), noisy]
            outputs += [torch.from_numpy(run(noisy.numpy())) for _, run in chosen.values()]
            for evaluation, output in zip(evaluations, outputs, strict=True):
                evaluation.add({}, (clean - low) / (high - low), (output - low) / (high - low))
            advance(len(index))
    return evaluations


def _rows(
    model: str, evaluations: list[Evaluation], chosen: dict[str, tuple[str, Filter]], limits: tuple[float, float]
) -> list[Row]:
    settings = {model: "", "identity": "", **{name: setting for name, (setting, _) in chosen.items()}}
    rows = []
    for (name, setting), evaluation in zip(settings.items(), evaluations, strict=True):
        figures = {key: float(value) for key, value in evaluation.compute().items()}
        if limits != _UNIT:
            figures["mse"] *= (limits[1] - limits[0]) ** 2
            figures.pop("psnr", None)
        rows.append({"method": name, **figures, "setting": setting})
    return rows


def _text(rows: list[Row], n_compared: int, n: int, n_tuned_on: int, limits: tuple[float, float]) -> str:
    """How the table was made, and its best row."""
    lines = [f"{n_compared:,} of {n:,} samples"]
    if n_tuned_on:
        lines[0] += f"; each filter in the setting that is best for {n_tuned_on:,} of them"
    if limits != _UNIT and "ssim" in rows[0]:
        lines.append(f"SSIM for a range of {limits[1] - limits[0]:.4g}, the clean samples'")
    lines.append(f"least error: {min(rows, key=lambda row: float(row['mse']))['method']}")
    return "\n".join(lines)


def _picture(panels: dict[str, Tensor], columns: Columns | None) -> "Figure":
    """Rows of samples: original and noisy, or input; output, and the best filter's output, if there are any."""
    from aezoo.callbacks import plotting

    if not plotting.is_image(panels["output"].shape[1:]):
        samples = [dict(zip(panels, row, strict=True)) for row in zip(*panels.values(), strict=True)]
        return plotting.panel_figure(samples, columns=columns)
    limits = plotting.value_range(panels.get("original", panels["output"]))
    return plotting.mosaic_figure([plotting.tiles(part, limits) for part in panels.values()], list(panels))
