"""impute: fill missing values with a model, compared with imputation by the mean, neighbours and regressions."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.bases.multimodal import Multimodal
from aezoo.data.columns import Columns
from aezoo.data.source import ArrayDataset
from aezoo.errors import AezooError
from aezoo.tasks.impute_baselines import Baseline, baselines_of
from aezoo.tasks.impute_files import write_completed
from aezoo.tasks.passes import current
from aezoo.tasks.result_store import Row, Store, check_table, row_of, table_text, write_batch
from aezoo.tasks.results import Result, count_of, takes_model
from aezoo.tasks.samples import SampleSet, evaluation_mode, random_rows
from aezoo.training.model_names import display_name
from aezoo.training.seeding import mix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_STEPS, _MAX_DRAWS = 10_000, 10_000
# values of the samples that are compared, and of those that baselines are fitted to: 16 MiB each
_MAX_VALUES = 2**22
# a last step that changes missing values by more than this has not settled
_SETTLED = 1e-2


@dataclass(repr=False)
class Imputation(Result):
    """The result of `impute`; the array is a memory-mapped file if a folder was given.

    Attributes:
        x_hat: (N, *shape), the completed samples in the scale that the model sees, float32: values that are not missing
            are those that were given.
        n_missing: (N,) number of missing values of each sample.
        change: (N,) by how much the last step changed the missing values of each sample, root mean square; 0 without
            any.
        effective_draws: (N,) with draws, their effective number (sum w)^2 / sum w^2, w the weights; else empty.
        rows: with `hide`, a row for the model and each baseline: root mean square and mean absolute error of the hidden
            values in the scale that the model sees.
        text: with `hide`, how the rows were made, and the best of them.
    """

    x_hat: npt.NDArray[np.float32]
    n_missing: npt.NDArray[np.int64]
    change: npt.NDArray[np.float32]
    effective_draws: npt.NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    rows: list[Row] = field(default_factory=list)
    text: str = ""

    def about(self) -> str:
        rmse = f", rmse {self.rows[0]['rmse']:.4g} of hidden values" if self.rows else ""
        return f"{count_of(self.x_hat)}, {int(self.n_missing.sum()):,} missing values{rmse}"

    def summary(self) -> str:
        """How much was filled, whether it has settled, and the comparison."""
        n, n_samples = int(self.n_missing.sum()), int((self.n_missing > 0).sum())
        lines = [table_text(self.rows), self.text] if self.rows else []
        if n:
            count = f"{n_samples:,} of {len(self.x_hat):,} samples"
            lines.append(f"{n:,} of {self.x_hat.size:,} values were missing, in {count}")
            change = float(np.sqrt((self.change.astype(np.float64) ** 2 * self.n_missing).sum() / n))
            lines.append(f"the last step changed them by {change:.2g} (root mean square, in the model's scale)")
            lines[-1] += ": more --steps may change them further" if change > _SETTLED else ""
        if n and len(self.effective_draws):
            least = float(np.median(self.effective_draws[self.n_missing > 0]))
            lines.append(f"effective number of draws: {least:.3g} (median)")
        return "\n".join(lines)


@takes_model
def impute(
    model: Autoencoder,
    x: Any,
    *,
    mask: Any = None,
    fit_on: Any = None,
    steps: int = 20,
    draws: int = 0,
    hide: float = 0.0,
    baselines: bool = True,
    n_compared: int = 1000,
    n_fit: int = 2000,
    n_shown: int = 8,
    table: str = "csv",
    out: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Imputation:
    """Fill missing values, NaN or empty cells, with a model that was trained on complete samples.

    Missing values begin as the mean of the training samples; each step replaces them by the model's reconstruction of
    the completed sample (pseudo-Gibbs, Rezende et al. 2014, https://arxiv.org/abs/1401.4082, with means in place of
    draws). For linear Gaussian models the fixed point is the conditional mean. With draws, the result is the
    conditional mean by self-normalised importance sampling (Mattei & Frellsen 2019, https://arxiv.org/abs/1812.02633),

        E[x_missing | x_observed] = sum_k w_k E[x_missing | z_k] / sum_k w_k
        w_k = p(x_observed | z_k) p(z_k) / q(z_k | x_completed)         z_k ~ q(z | x_completed)

    A model of samples that have parts ignores parts that are missing as a whole. If a model has the method `inpaint`,
    it is used.

    Writes the completed samples in the format of the file that was given, imputed.csv, .parquet, .npy or .npz, in its
    units; there, values that are not missing stay as they are. Of other samples, imputed.npy, .csv or pictures. Also
    samples.csv (index, number of missing values, change of the last step and, if known, file and label) and a picture;
    with hide also impute.csv. Splits of a DataModule are written with the digits that float32 has.

    Args:
        model: a trained model.
        x: samples (N, *input_shape), a DataModule (its test split) or `SampleSet`; missing values are NaN.
        mask: further missing values, where it is not 0; one for each sample (N, *input_shape) or one for all
            (1, *input_shape), or of one channel for all channels. On the command line a file or a folder of images.
        fit_on: training samples, whose mean the missing values begin with, and to which baselines are fitted. Without
            it, the samples themselves.
        steps: reconstructions of the completed samples.
        draws: importance samples of the code, for models with a Gaussian posterior and prior; 0 takes the means.
        hide: share of the values that are not missing that is hidden, to measure errors; only for the comparison.
        baselines: compare with the mean, nearest neighbours and regressions (scikit-learn's KNNImputer and
            IterativeImputer).
        n_compared: number of samples in the comparison, drawn from the seed.
        n_fit: number of training samples that the mean and the baselines use, drawn from the seed.
        n_shown: samples in the picture; 0 draws none.
        table: format of samples and comparison, csv or parquet.
        out: folder for the results; None keeps them in memory.
        batch_size: samples at a time.
        seed: seed of what is hidden, which depends only on it and on a sample's number, and of draws.
        progress: show bars on a terminal.

    Raises:
        AezooError: a value that cannot work, samples that the model cannot use, or nothing that is missing or to hide.
    """
    check_table(table, ("csv", "parquet"))
    if n_shown < 0 or min(n_compared, n_fit, batch_size) < 1:
        raise AezooError(f"n_shown must be at least 0, n_compared, n_fit and batch_size at least 1, got {n_shown}, "
                         f"{n_compared}, {n_fit} and {batch_size}")  # fmt: skip
    if not 1 <= steps <= _MAX_STEPS or not 0 <= draws <= _MAX_DRAWS:
        raise AezooError(
            f"steps must be from 1 to {_MAX_STEPS:,} and draws from 0 to {_MAX_DRAWS:,}, got {steps} and {draws}"
        )
    if not 0 <= hide < 1:
        raise AezooError(f"hide must be a share from 0 up to, but not including, 1, got {hide}")
    if draws and not model.normal_prior:
        raise AezooError(f"draws need a model with a Gaussian posterior and prior, such as vae, not "
                         f"{display_name(type(model))}: use draws 0")  # fmt: skip
    samples = SampleSet.from_data(x, allow_missing=True).in_model_scale(model)
    if mask is not None:
        samples = samples.masked(mask if isinstance(mask, SampleSet) else SampleSet.from_data(mask))
    samples = samples.check_values(model, fills_missing=True)
    train = None
    if fit_on is not None:
        train = SampleSet.from_data(fit_on, "train", True).in_model_scale(model).check_values(model, fills_missing=True)
    n, most = len(samples), max(2, _MAX_VALUES // int(np.prod(samples.shape)))
    source = samples if train is None else train
    numbers = random_rows(len(source), min(n_fit, most), seed)
    fitted = source.rows(numbers)
    fill = Filler(model, _mean(fitted), steps, draws)
    with Store(out, model.data_units) as store, evaluation_mode(model, seed) as like:
        x_hat = store.scratch((n, *samples.shape))
        n_missing = store.scratch((n,), np.int64)
        measured = {"change": store.scratch((n,))} | ({"effective_draws": store.scratch((n,))} if draws else {})
        passes = current.get()
        for start, batch in passes.blocks(samples, batch_size, seed, "impute" if progress else ""):
            completed, found = fill(batch, like, start)
            write_batch(x_hat, start, completed)
            write_batch(n_missing, start, batch.isnan().flatten(1).sum(1))
            for name, values in measured.items():
                write_batch(values, start, found[name])
        comparison = None
        if hide:
            chosen = random_rows(n, min(n_compared, most), seed)
            comparison = _Comparison(samples.rows(chosen), chosen, hide, seed)
            if train is None:  # baselines must not see what is hidden
                fitted = _hidden(fitted, numbers.tolist(), hide, seed)
            output = store.scratch(tuple(comparison.x.shape))
            again, fill = SampleSet(ArrayDataset(comparison.given)), Filler(model, _mean(fitted), steps, draws)
            for start, batch in passes.blocks(again, batch_size, seed, "compare" if progress else ""):
                write_batch(output, start, fill(batch, like, start)[0])
        passes.finish()
        in_memory = {name: np.array(values) for name, values in measured.items()}
        result = Imputation(x_hat, np.array(n_missing), in_memory["change"])
        result.effective_draws = in_memory.get("effective_draws", result.effective_draws)
        filled = int(result.n_missing.sum())
        if not filled and comparison is None:
            raise AezooError(f"{samples.name} has no missing value: give samples with NaN or empty cells, a mask, or a "
                             "share to hide (--hide 0.2), which measures errors")  # fmt: skip
        if comparison is not None:
            others = baselines_of(samples.shape, seed) if baselines else {}
            comparison.outputs = {display_name(type(model)): np.array(output)}
            result.rows = comparison.rows(others, fitted.numpy())
            result.text = comparison.text(result.rows, n, len(fitted) if baselines else 0)
            store.table("impute", result.rows, table)
        if filled:
            write_completed(store, samples, x_hat)
        result.tabulate = functools.partial(_rows, result, samples.notes)
        store.table("samples", result.tabulate(), table)
        if n_shown:
            result.draw = functools.partial(_draw, samples, result, comparison, n_shown, seed)
            store.picture("imputed", result.draw)
    result.files = store.files
    return result


class Filler:
    """Fills the missing values of batches.

    Args:
        model: in evaluation mode whenever it is used.
        mean: (*shape), what missing values begin with.
        steps: reconstructions.
        draws: importance samples; 0 for none.
    """

    def __init__(self, model: Autoencoder, mean: Tensor, steps: int, draws: int) -> None:
        self._model, self._mean, self._steps, self._draws = model, mean, steps, draws

    def __call__(self, x: Tensor, like: Tensor, first: int = 0) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Completed samples, and for each sample the change of the last step and, with draws, their effective number.

        Args:
            x: (B, *shape), float32 on the CPU; missing values are NaN.
            like: a tensor on the model's device and of its dtype.
            first: index of the first sample, for messages.

        Raises:
            AezooError: a sample has no value, or what the model gives is not finite.
        """
        missing = x.isnan()
        found = {"change": torch.zeros(len(x)), "effective_draws": torch.full((len(x),), float(self._draws))}
        if not missing.any():
            return x, found
        if (empty := missing.flatten(1).all(1)).any():
            raise AezooError(f"sample {first + int(empty.nonzero()[0])} has no value that is not missing: leave it out")
        lacks, filled = missing.to(like.device), torch.where(missing, self._mean, x).to(like)
        before = filled
        for _ in range(self._steps):
            before, filled = filled, torch.where(lacks, self._reconstructed(filled, lacks).to(filled), filled)
            if torch.equal(before, filled):
                break
        n_B = missing.flatten(1).sum(1).clamp(min=1)
        found["change"] = ((filled - before).float().square().flatten(1).sum(1).cpu() / n_B).sqrt()
        if self._draws:
            mean, found["effective_draws"] = self._expected(torch.where(lacks, torch.nan, filled), filled)
            filled = torch.where(lacks, mean.to(filled), filled)
        if not filled.isfinite().all():
            raise AezooError(f"the model's values for missing ones are not finite after {self._steps} steps: use "
                             "fewer --steps, or another model")  # fmt: skip
        return torch.where(missing, filled.float().cpu(), x), found

    def _reconstructed(self, x: Tensor, missing: Tensor) -> Tensor:
        """Reconstructions of completed samples, by the model's own method for missing values if any: (B, *shape)."""
        model: Any = self._model
        if isinstance(model, Multimodal):
            return _reconstructed_from_parts(model, x, missing)
        if hasattr(model, "inpaint"):
            inpainted: Tensor = model.inpaint(x, ~missing.any(1, keepdim=True))
            return inpainted
        output: Tensor = model(x)
        return output

    def _expected(self, observed: Tensor, completed: Tensor) -> tuple[Tensor, Tensor]:
        """E[x | x_observed] and the effective number of draws: (B, *shape), (B, *shape) -> (B, *shape), (B,).

        With z_k ~ q(z | completed) and w_k = p(x_observed | z_k) p(z_k) / q(z_k | completed), it is
        sum_k w_k E[x | z_k] / sum_k w_k; sums are taken one draw after the other, relative to the largest weight.
        """
        model: Any = self._model
        mu_BD, log_var_BD = model.posterior(completed)
        largest_B = mu_BD.new_full((len(completed),), -torch.inf)
        sum_B, squares_B = torch.zeros_like(largest_B), torch.zeros_like(largest_B)
        total = at_least_float32(completed).new_zeros(completed.shape)
        for _ in range(self._draws):
            eps_BD = torch.randn_like(mu_BD)
            z_BD = mu_BD + torch.exp(0.5 * log_var_BD) * eps_BD
            params = model.decoder(z_BD.to(completed.dtype))
            log_px_B = -at_least_float32(model.likelihood.nll_by_value(params, observed)).flatten(1).sum(1)
            # up to terms that are equal for all draws of a sample
            log_w_B = log_px_B + 0.5 * (eps_BD**2 - z_BD**2).flatten(1).sum(1)
            above_B = torch.maximum(largest_B, log_w_B)
            kept_B, w_B = torch.exp(largest_B - above_B), torch.exp(log_w_B - above_B)
            largest_B, sum_B, squares_B = above_B, kept_B * sum_B + w_B, kept_B**2 * squares_B + w_B**2
            kept, w = (weight_B.reshape(-1, *[1] * (completed.ndim - 1)) for weight_B in (kept_B, w_B))
            total = kept * total + w * model.likelihood.mean(params)
        return total / sum_B.reshape(-1, *[1] * (completed.ndim - 1)), (sum_B**2 / squares_B).float().cpu()


def _reconstructed_from_parts(model: Multimodal, x: Tensor, missing: Tensor) -> Tensor:
    """Reconstructions that ignore parts that are missing as a whole, unless all are."""
    parts = model.split(missing)
    lacks_BM = torch.stack([part.flatten(1).all(1) for part in parts], 1)
    output = torch.empty_like(x)
    for pattern in lacks_BM.unique(dim=0):
        rows = (lacks_BM == pattern).all(1)
        present = [i for i, lacking in enumerate(pattern.tolist()) if not lacking]
        whole = len(present) == len(parts)
        output[rows] = (model(x[rows]) if whole else model.reconstruct_from(x[rows], present)).to(output)
    return output


def _mean(x: Tensor) -> Tensor:
    """The mean of each value over the samples that have it, else of all values: (N, *shape) -> (*shape)."""
    count = (~x.isnan()).sum(0)
    total = x.nansum(0, dtype=torch.float64)
    overall = total.sum() / count.sum().clamp(min=1)
    return torch.where(count > 0, total / count.clamp(min=1), overall).float()


def _hidden(x: Tensor, numbers: Sequence[int], share: float, seed: int) -> Tensor:
    """Samples of which a share of the values that are not missing is NaN; each keeps one at least.

    What is hidden depends on the seed and a sample's number alone.
    """
    hidden = torch.stack([
        torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(mix(seed, number))) < share
        for number in numbers
    ])  # fmt: skip
    kept = (~hidden & ~x.isnan()).flatten(1).any(1)
    found = x.masked_fill(hidden, torch.nan)
    for i in (~kept).nonzero().flatten().tolist():
        first = int((~x[i].isnan()).flatten().to(torch.uint8).argmax())
        found[i].view(-1)[first] = x[i].reshape(-1)[first]
    return found


def _rmse(row: Row) -> float:
    return float(row["rmse"])


class _Comparison:
    """Samples with hidden values, and the values that are filled in.

    Args:
        x: (n, *shape), the samples; NaN where values are missing.
        numbers: (n,) their indices.
        share: of the values that is hidden.
        seed: of what is hidden.

    Attributes:
        given: the samples without what is hidden.
        outputs: completed samples by method.
    """

    def __init__(self, x: Tensor, numbers: Tensor, share: float, seed: int) -> None:
        self.x, self.given = x, _hidden(x, numbers.tolist(), share, seed)
        self._hidden = (self.given.isnan() & ~x.isnan()).numpy()
        self.outputs: dict[str, npt.NDArray[Any]] = {}
        if not self._hidden.any():
            raise AezooError(f"hide is {share:g}, which hides none of the {x.numel():,} values that are compared: give "
                             "a larger share, or compare more samples")  # fmt: skip

    def rows(self, baselines: Mapping[str, Baseline | str], fitted: npt.NDArray[Any]) -> list[Row]:
        """A row for each method: errors of hidden values, and the setting of a baseline or why it is left out."""
        found = []
        for name, baseline in baselines.items():
            if not isinstance(baseline, str):
                self.outputs[name] = baseline.run(fitted, self.given.numpy())
        for name in [*self.outputs, *(name for name in baselines if name not in self.outputs)]:
            row: Row = {"method": name, "rmse": None, "mae": None}
            if name in self.outputs:
                error = (self.outputs[name] - self.x.numpy())[self._hidden].astype(np.float64)
                row |= {"rmse": float(np.sqrt((error**2).mean())), "mae": float(np.abs(error).mean())}
            baseline = baselines.get(name, "")
            found.append(row | {"setting": baseline if isinstance(baseline, str) else baseline.setting})
        return found

    def text(self, rows: list[Row], n: int, n_fitted: int) -> str:
        """How the rows were made, and the best of them."""
        line = f"{int(self._hidden.sum()):,} hidden values of {len(self.x):,} of {n:,} samples"
        line += f"; baselines fitted to {n_fitted:,}" if n_fitted else ""
        return f"{line}\nleast error: {min((row for row in rows if row['rmse'] is not None), key=_rmse)['method']}"


def _rows(result: Imputation, notes: Mapping[str, Sequence[Any]]) -> Iterator[Row]:
    for i in range(len(result.x_hat)):
        row: Row = {"index": i, "n_missing": int(result.n_missing[i]), "change": float(result.change[i])}
        row |= {"effective_draws": float(result.effective_draws[i])} if len(result.effective_draws) else {}
        yield row | row_of(notes, i)


def _draw(samples: SampleSet, result: Imputation, comparison: _Comparison | None, n_shown: int, seed: int) -> "Figure":
    """Some samples: as they were, without what is hidden, and completed by the model and by the best baseline."""
    if comparison is not None:
        others = [row for row in result.rows[1:] if row["rmse"] is not None]
        names = [row["method"] for row in [result.rows[0], *sorted(others, key=_rmse)[:1]]]
        panels = {"original": comparison.x[:n_shown]}
        if len(samples.shape) > 1:  # in a row of a table, what was not hidden is what it was
            panels["hidden"] = comparison.given[:n_shown]
        outputs = [torch.from_numpy(comparison.outputs[name][:n_shown]).float() for name in names]
        panels |= {"output" if i == 0 else names[i]: output for i, output in enumerate(outputs)}
        return _picture(panels, samples.columns)
    lacking = np.flatnonzero(result.n_missing)
    index = torch.from_numpy(lacking)[random_rows(len(lacking), n_shown, seed)]
    panels = {"input": samples.rows(index), "output": torch.from_numpy(result.x_hat[index.numpy()])}
    return _picture(panels, samples.columns)


def _picture(panels: dict[str, Tensor], columns: Columns | None) -> "Figure":
    from aezoo.callbacks import plotting

    if not plotting.is_image(panels["output"].shape[1:]):
        rows = [dict(zip(panels, row, strict=True)) for row in zip(*panels.values(), strict=True)]
        return plotting.panel_figure(rows, columns=columns)
    low, high = plotting.value_range(panels["output"])
    grey = (low + high) / 2  # of missing pixels
    parts = [plotting.tiles(part.masked_fill(part.isnan(), grey), (low, high)) for part in panels.values()]
    return plotting.mosaic_figure(parts, list(panels))
