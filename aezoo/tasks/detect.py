"""detect: find anomalies, with p-values, and compare with simpler detectors."""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.data.columns import Columns
from aezoo.data.windows import Spans
from aezoo.errors import AezooError
from aezoo.metrics.localisation import per_region_overlap, pixel_auroc
from aezoo.tasks.detect_calibration import AnomalyShare, Drift, Rule, drift, flagged_interval, p_values
from aezoo.tasks.detect_explain import Explainer, Explanation
from aezoo.tasks.detect_labels import Protocol, Reference, label_report, ranking_metrics
from aezoo.tasks.detect_scores import Scores, describe_deviance
from aezoo.tasks.detectors import BASELINES, Baseline, Detector
from aezoo.tasks.passes import current
from aezoo.tasks.result_store import Row, Store, check_table, row_of, table_text, write_batch
from aezoo.tasks.results import Result, sizes, takes_model
from aezoo.tasks.samples import SampleSet, evaluation_mode
from aezoo.training.data_statistics import DataStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# samples used to check whether a model has another criterion
_MAX_DESCRIBED = 8

__all__ = ["Detection", "Detector", "detect", "p_values"]


@dataclass(repr=False)
class Detection(Result):
    """The result of `detect`.

    Attributes:
        scores: (N,) larger is more anomalous.
        p_values: (N,) probability that a normal sample has at least this score.
        is_anomaly: (N,) whether the score is above the threshold.
        threshold: of the scores.
        rows: a row for each score and each baseline: auroc and aupr if anomalies are known, the threshold, and the
            share of samples above it.
        text: the samples behind threshold and p-values.
        shape: shape of one sample.
        anomaly_share: the estimated share of anomalies, with contamination estimated.
        drift: whether the scores differ from those of the reference; None without a reference or held-out samples.
        statistics: the calibration, if there were held-out samples: with it as `model.data_statistics`, later calls
            need neither these nor training samples, and `save_model` saves it.
        explainer: explains samples, see `explain`.
    """

    scores: Scores
    p_values: Scores
    is_anomaly: npt.NDArray[np.bool_]
    threshold: float
    rows: list[Row]
    text: str
    shape: tuple[int, ...] = ()
    anomaly_share: AnomalyShare | None = None
    drift: Drift | None = None
    statistics: DataStatistics | None = None
    explainer: Explainer | None = field(default=None, compare=False)

    def explain(self, i: int) -> Explanation:
        """Why sample i has its score: what each value contributes, its reconstruction, the nearest normal samples.

        Raises:
            AezooError: there is no such sample.
        """
        if self.explainer is None:
            raise AezooError(
                "this Detection has no model to explain with: use the Detection that aezoo.detect returned"
            )
        return self.explainer.explain(i)

    def about(self) -> str:
        of = f" of {sizes(self.shape)}" if self.shape else ""
        return (
            f"{len(self.scores):,} samples{of}, {int(self.is_anomaly.sum()):,} above the threshold {self.threshold:.4g}"
        )

    def summary(self) -> str:
        """The comparison with baselines and `text`."""
        return f"{table_text(self.rows)}\n{self.text}"


@takes_model
def detect(
    model: Autoencoder,
    x: Any,
    *,
    score: str = "deviance",
    contamination: float | Literal["unknown", "estimated"] | None = None,
    quantile: float | None = None,
    fdr: float | None = None,
    normal: str | None = None,
    anomaly: str | None = None,
    baselines: bool = True,
    features: str | None = None,
    reference: Any = None,
    n_draws: int = 64,
    svdd_epochs: int = 50,
    svdd_lr: float = 5e-4,
    svdd_nu: float = 0.0,
    n_fit: int = 10_000,
    maps: bool = False,
    explain: bool = False,
    n_shown: int = 8,
    table: str = "csv",
    fit_on: Any = None,
    calibrate_on: Any = None,
    out: str | None = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Detection:
    """Find anomalies, and compare with detectors that train no neural network.

    Writes scores.csv (index, score, p_value, is_anomaly, a column for each further score and, if there are any, the
    file and the label), detect.csv with a row for each score and baseline, and a picture of the most anomalous samples
    with the error of each pixel. For a table, scores.csv also has each sample's values and errors by column, in its
    units, and the column of the largest error. `explain` explains samples above the threshold: explanations.csv has a
    row for each of their values (value, reconstruction, contribution to the score, rank), neighbours.csv the nearest
    normal samples, and explanations.html is a page of the samples with the largest scores, see
    `aezoo.tasks.detect_explain`. For windows of a time series (`--data.window_length`), scores.csv has their first and
    last time stamp, and steps.csv the score of each step, the mean of the windows that cover it. AUROC and AUPR need a
    protocol, `normal` or `anomaly`, and labels; samples without a label are ignored. If the data have masks of
    defects, see `aezoo.data.defect_folders`, the first row has metrics of the model's map: `pixel_auroc` and `pro`, see
    `aezoo.metrics.localisation`.

    Args:
        model: a trained model.
        x: samples (N, *input_shape), a DataModule (its test split) or `SampleSet`.
        score: deviance, nll, mse, elbo, iwae, mahalanobis, sap, nap, combined or deep_svdd; several, as in
            deviance,nap, are compared in the table, and the first one decides. deviance is -log p(x | z) less that of a
            perfect reconstruction, with the KL of a variational model; for detectors it is their criterion, such as the
            distance of deep_svdd or the energy of dagmm. nll is the same without the subtraction: with a Bernoulli
            likelihood, it is high for all grey samples. combined is meant for tables: tail probabilities of the
            values, the error, the distance of the code and an isolation forest in one score.
        contamination: share of normal samples that lies above the threshold, at most 0.5, by default 0.1: of held-out
            samples, those of the validation split or, in Python, of calibrate_on; without any, of the samples of
            fit_on. unknown: no share is assumed, and fdr decides. estimated: fdr decides, with the share of anomalies
            among the samples that their p-values show (Storey's estimate), which is reported with an interval.
        quantile: put the threshold at this quantile of the scores of held-out samples instead.
        fdr: flag the samples that Benjamini and Hochberg's procedure on their p-values selects, so that on average a
            share of at most fdr of the flagged samples is normal (0.1 if contamination is unknown or estimated). The
            result for a sample depends on all samples, and needs held-out samples: with few of these, no p-value is
            small.
        normal: one-vs-rest: samples of this class are normal, all others are anomalies. Train the model only on that
            class, with --data.train_classes: a model that was trained on all classes has also learned the anomalies.
        anomaly: leave-one-out: samples of this class are anomalies, all others are normal. Train the model without that
            class, with --data.train_classes.
        baselines: also fit PCA of the code's size, the mean sample, kNN and an isolation forest.
        features: also fit fre, PCA on frozen features: random, resnet18, resnet50, wide_resnet50_2, vgg16, vgg19 (if
            torch.hub has the weights), or the path of VGG weights (.pth) or of a model of the zoo. On photographs of
            industrial goods, frozen features are better: image AUROC on MVTec AD .933 with resnet50 and .947 with
            wide_resnet50_2, .421 of GANomaly (anomalib's figures).
        reference: samples for the test of drift, given like x (on the command line a file, or a split of the data:
            train, val or test): a two-sample test compares the scores with those of the reference. By default the
            held-out samples of the calibration.
        n_draws: draws of the code for each sample, for elbo and iwae.
        svdd_epochs: passes over the training samples that deep_svdd makes.
        svdd_lr: learning rate of deep_svdd.
        svdd_nu: share of the training samples that may lie outside deep_svdd's soft boundary; 0 has no soft boundary.
        n_fit: training samples that the baselines are fitted on, drawn from the seed; fewer if these take more than
            256 MiB.
        maps: also write maps.npy, the absolute error of each value of each sample, of draem its anomaly map.
        explain: also write explanations.csv, neighbours.csv and explanations.html. deviance, nll, mse, sap and combined
            have contributions of values; samples of other scores have a reconstruction and neighbours.
        n_shown: samples in the picture and on the page of explanations; 0 makes none.
        table: csv or parquet, the format of the scores.
        fit_on: normal samples to which scores and baselines are fitted. By default, if x is a DataModule, its training
            split without the samples whose labels make them anomalies; otherwise x.
        calibrate_on: normal samples that the model was not trained on, for threshold and p-values; by default the
            validation split if x is a DataModule, otherwise the samples of fit_on, or without them the calibration that
            is stored with the weights, see `aezoo.Autoencoder.data_statistics`.
        out: folder for the results; None writes nothing.
        batch_size: samples at a time.
        seed: seed of everything that is random.
        progress: show bars on a terminal.

    Raises:
        AezooError: an invalid value, or samples that the model cannot use.
    """
    check_table(table, ("csv", "parquet"))
    if n_shown < 0 or n_fit < 2:
        raise AezooError(f"n_shown must be at least 0 and n_fit at least 2, got {n_shown} and {n_fit}")
    rule = Rule.of(contamination, quantile, fdr)
    options: dict[str, Any] = {
        "contamination": rule.contamination, "batch_size": batch_size, "seed": seed, "progress": progress,
    }  # fmt: skip
    trained = [
        Detector(
            model, name.strip(), n_draws=n_draws, svdd_epochs=svdd_epochs, svdd_lr=svdd_lr, svdd_nu=svdd_nu, **options
        )
        for name in score.split(",")
    ]
    detectors: list[Detector | Baseline] = [*trained]
    others = (BASELINES if baselines else ()) + (() if features is None else ("fre",))
    options |= {"n_components": math.prod(model.code_shape), "n_fit": n_fit, "device": model.device}
    detectors += [Baseline(name, features=features or "", **options) for name in others]

    protocol = Protocol(normal, anomaly)
    samples = SampleSet.from_data(x, allow_missing=model.takes_missing).check(model)
    anomalous, masks = protocol.anomalies(samples), samples.pixel_masks
    train = Reference.from_split(model, fit_on, x, "train", protocol, samples)
    train = train or Reference(samples, np.arange(len(samples)), 0)
    held_out = Reference.from_split(model, calibrate_on, x, "val", protocol, samples)
    compared = None
    if reference is not None:
        compared = SampleSet.from_data(reference, "val", model.takes_missing).check(model)
    stored = model.data_statistics if held_out is None and train.samples is samples else None
    restored = [
        isinstance(detector, Detector) and stored is not None and detector.restore(stored) for detector in detectors
    ]
    if rule.needs_held_out and held_out is None and not restored[0]:
        raise AezooError(f"{rule.needs_held_out} needs held-out samples: set --data.val_fraction above 0, in Python "
                         "give calibrate_on, or use contamination")  # fmt: skip

    lines: list[str] = []
    with Store(out) as store:
        results = [
            _run_detector(detector, samples, train, held_out, compared, is_restored, rule)
            for detector, is_restored in zip(detectors, restored, strict=True)
        ]
        has_masks = masks is not None and bool(masks.any())
        errors = _value_errors(model, samples, store, maps, has_masks, batch_size, seed, progress)
        current.get().finish()
        rows: list[Row] = [
            {"method": detector.name}
            | ({"note": detector.note} if found is None else ranking_metrics(found.scores, anomalous) | found.figures())
            for detector, found in zip(detectors, results, strict=True)
        ]
        if errors.located is not None and masks is not None:
            located, true = np.asarray(errors.located), masks.numpy()
            rows[0] |= {"pixel_auroc": pixel_auroc(located, true), "pro": per_region_overlap(located, true)}
        columns = list(dict.fromkeys(name for row in rows for name in row if row[name] is not None))
        rows = [{name: row.get(name) for name in columns} for row in rows]
        first = results[0]
        assert first is not None  # only baselines may have no scores
        other_models = {
            detector.name: found
            for detector, found in zip(detectors[1:], results[1:], strict=True)
            if isinstance(detector, Detector) and found is not None
        }
        tabulate = functools.partial(_score_rows, samples, first, other_models, errors.by_column)
        draw = functools.partial(_draw, model, samples, first, n_shown, seed) if n_shown else None
        store.table("scores", tabulate(), table)
        store.table("detect", rows)
        if samples.spans is not None:
            store.table("steps", _step_rows(samples.spans, first), table)
        explainer = Explainer(
            model, trained[0].name, trained[0].scorer, samples, first, train.samples,
            np.arange(len(samples)) if train.samples is samples else train.own, batch_size, seed,
        )  # fmt: skip
        if explain:
            store.table("explanations", explainer.rows(), table)
            store.table("neighbours", explainer.neighbour_rows(), table)
            if n_shown:
                store.file("explanations.html", explainer.page(n_shown))
            lines.append(explainer.report())
        with evaluation_mode(model, seed) as like:
            if detectors[0].name == "deviance":
                lines += [describe_deviance(model, samples.rows(range(min(len(samples), _MAX_DESCRIBED))).to(like))]
        if draw is not None:
            store.picture("anomalies", draw)
    fits_on_itself = train.samples is samples
    n_held_out = first.n_reference if held_out is not None or restored[0] else 0
    lines += _threshold_report(first, None if fits_on_itself else train, n_held_out, rule)
    if first.drift is not None:
        lines.append(first.drift.describe("held-out samples" if compared is None else f"samples of {compared.name}"))
    lines += label_report(rows, others, train, protocol, anomalous, samples.labels is not None)
    return Detection(
        first.scores, first.p_values, first.is_anomaly, first.threshold, rows, "\n".join(lines), samples.shape,
        first.anomaly_share, first.drift, None if held_out is None else _statistics(detectors), explainer,
        files=store.files, tabulate=tabulate, draw=draw,
    )  # fmt: skip


@dataclass
class _DetectorResult:
    """The scores of one detector."""

    scores: Scores
    p_values: Scores
    threshold: float
    n_reference: int
    anomaly_share: AnomalyShare | None = None
    drift: Drift | None = None

    @property
    def is_anomaly(self) -> npt.NDArray[np.bool_]:
        return self.scores > self.threshold

    def figures(self) -> Row:
        estimated = {} if self.anomaly_share is None else {"anomaly_share": self.anomaly_share.share}
        drifted = {} if self.drift is None else self.drift.figures()
        return {"threshold": self.threshold, "flagged": float(self.is_anomaly.mean())} | estimated | drifted


def _run_detector(
    detector: Detector | Baseline,
    samples: SampleSet,
    train: Reference,
    held_out: Reference | None,
    compared: SampleSet | None,
    is_restored: bool,
    rule: Rule,
) -> _DetectorResult | None:
    if not is_restored:
        detector.fit(train.samples)
    if detector.note:
        return None
    scores = detector.decision_function(samples)
    if len(train.own) and not is_restored:
        # samples that were fitted on, each left out of what it is compared with
        scores[train.own[detector.fitted_on]] = detector.decision_scores_
    own = (held_out or train).own
    if is_restored and isinstance(detector, Detector):
        reference, own = detector.calibration_scores_, own[:0]
    elif held_out is not None:
        reference = scores[own] if len(own) else detector.decision_function(held_out.samples)
    else:
        reference = detector.decision_scores_
    if held_out is not None and isinstance(detector, Detector):
        detector.calibrate(reference)
    threshold, share = rule.threshold(scores, reference, held_out=is_restored or held_out is not None)
    p = p_values(scores, reference)
    if len(own) == len(reference):
        p[own] = p_values(scores[own], reference, among=True)
    drifted = None
    if compared is not None:
        drifted = drift(scores, detector.decision_function(compared))
    elif (is_restored or held_out is not None) and not len(own):
        drifted = drift(scores, reference)
    return _DetectorResult(scores, p, threshold, len(reference), share, drifted)


def _statistics(detectors: Iterable[Detector | Baseline]) -> DataStatistics:
    found = DataStatistics()
    for detector in detectors:
        if isinstance(detector, Detector):
            found = found.updated(detector.statistics())
    return found


@dataclass
class _ValueErrors:
    """The anomaly map of the samples, as far as it is needed.

    Attributes:
        located: (N, *positions), the mean over channels.
        by_column: (N, D), of a table, x_hat - x.
    """

    located: npt.NDArray[Any] | None = None
    by_column: npt.NDArray[Any] | None = None


def _value_errors(
    model: Autoencoder,
    samples: SampleSet,
    store: Store,
    maps: bool,
    masks: bool,
    batch_size: int,
    seed: int,
    progress: bool,
) -> _ValueErrors:
    """Reconstruct all samples once, for maps.npy, the comparison with masks and the columns of a table."""
    n, found = len(samples), _ValueErrors()
    if not maps and not masks and samples.columns is None:
        return found
    written = store.array("maps", (n, *samples.shape)) if maps else None
    found.located = store.scratch((n, *samples.shape[1:])) if masks else None
    found.by_column = None if samples.columns is None else store.scratch((n, *samples.shape))
    with evaluation_mode(model, seed) as like:
        for start, x in current.get().blocks(samples, batch_size, seed, "errors" if progress else ""):
            output, error = _reconstruction_errors(model, x, like)
            if written is not None:
                write_batch(written, start, error)
            if found.located is not None:
                write_batch(found.located, start, error.mean(1))
            if found.by_column is not None:
                write_batch(found.by_column, start, output - x)
    return found


def _draw(model: Autoencoder, samples: SampleSet, found: _DetectorResult, n_shown: int, seed: int) -> "Figure":
    """The samples of the highest scores."""
    index = torch.from_numpy(np.argsort(-found.scores, kind="stable")[:n_shown].copy())
    shown, titles = samples.rows(index), [f"p {value:.2g}" for value in found.p_values[index.numpy()]]
    kind = "anomaly" if hasattr(model, "anomaly_map") else "error"
    with evaluation_mode(model, seed) as like:
        return _picture(shown, *_reconstruction_errors(model, shown, like), titles, kind, samples.columns)


def _score_rows(
    samples: SampleSet,
    found: _DetectorResult,
    others: dict[str, _DetectorResult],
    by_column: npt.NDArray[Any] | None,
) -> Iterator[Row]:
    fields, columns = samples.fields, samples.columns
    for i, (score, p, flagged) in enumerate(zip(found.scores, found.p_values, found.is_anomaly, strict=True)):
        row = {"index": i, "score": float(score), "p_value": float(p), "is_anomaly": bool(flagged)}
        row |= {name: float(other.scores[i]) for name, other in others.items()}
        row |= row_of(fields, i)
        yield row if by_column is None or columns is None else row | columns.error_row(by_column[i])


def _step_rows(spans: Spans, found: _DetectorResult) -> Iterator[Row]:
    """The score of each step of a time series, the mean of the windows that cover it."""
    for step, score in zip(*spans.step_scores(found.scores), strict=True):
        time = {"time": spans.times[step]} if spans.times else {}
        yield {"step": int(step)} | time | {"score": float(score), "is_anomaly": bool(score > found.threshold)}


def _threshold_report(found: _DetectorResult, train: Reference | None, n_held_out: int, rule: Rule) -> list[str]:
    """The samples behind threshold and p-values, in words."""
    fitted = "these samples themselves (give fit_on)" if train is None else f"{len(train.samples):,} training samples"
    calibrated = f"{n_held_out:,} held-out samples" if n_held_out else fitted
    n_flagged = f"{int(found.is_anomaly.sum()):,} of {len(found.scores):,} samples"
    if rule.fdr is not None:
        where = f" (scores above {found.threshold:.4g})" if np.isfinite(found.threshold) else ""
        lines = [f"{n_flagged} are flagged{where}: {rule} p-values among {calibrated}"]
        smallest = 1 / (found.n_reference + 1)
        if not found.is_anomaly.any() and (n_smallest := int((found.p_values <= smallest).sum())):
            lines.append(f"{n_smallest:,} of the samples have the smallest p-value that these allow, {smallest:.2g}: "
                         "with more held-out samples, they may be flagged")  # fmt: skip
        if share := found.anomaly_share:
            lines.append(f"about {100 * share.share:.3g} % of the samples are anomalies by their p-values "
                         f"({100 * share.low:.3g} to {100 * share.high:.3g} %, 95 % interval); there are more if some "
                         "have a p-value above 0.5")  # fmt: skip
        return lines
    if n_held_out and rule.quantile is None:
        low, high = flagged_interval(n_held_out, rule.contamination)
        calibrated += f" ({100 * low:.2g} to {100 * high:.2g} % of new normal samples exceed it, 95 % interval)"
    lines = [
        f"{n_flagged} lie above {found.threshold:.4g}, {rule} the scores of {calibrated}; p-values refer to the "
        "same samples",
    ]
    if train is not None and not n_held_out:
        lines.append("if the model was trained on these, too many new samples will be flagged: give calibrate_on")
    return lines


def _reconstruction_errors(model: Autoencoder, x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions and anomaly maps: those of the model if it has them, otherwise absolute errors."""
    given = x.to(like)
    output, anomaly_map = model(given).float().cpu(), getattr(model, "anomaly_map", None)
    if anomaly_map is not None:
        return output, anomaly_map(given)[:, None].expand_as(given).float().cpu()
    return output, (output - x).abs().masked_fill(x.isnan(), 0)  # a missing value has no error


def _picture(
    given: Tensor, output: Tensor, error: Tensor, titles: list[str], kind: str, columns: Columns | None
) -> "Figure":
    """The samples with the largest scores, their reconstructions and anomaly maps."""
    from aezoo.callbacks import plotting

    if not plotting.is_image(given.shape[1:]):
        panels = [{"original": x, "output": x_hat, kind: e} for x, x_hat, e in zip(given, output, error, strict=True)]
        return plotting.panel_figure(panels, titles, columns=columns)
    limits = plotting.value_range(given)
    rows = [
        plotting.tiles(given, limits),
        plotting.tiles(output, limits),
        plotting.error_tiles(error, float(error.max())),
    ]
    return plotting.mosaic_figure(rows, ["strangest", "output", f"{kind}, 0 to {float(error.max()):.2g}"], titles)
