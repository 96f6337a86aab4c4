"""Detectors with one interface: a trained model, and baselines that train no neural network."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.data import DataModule
from aezoo.errors import AezooError
from aezoo.tasks.detect_calibration import AnomalyShare, anomaly_share, fdr_threshold, p_values, threshold_of
from aezoo.tasks.detect_deep_svdd import SVDDSettings
from aezoo.tasks.detect_features import FrozenFeatures
from aezoo.tasks.detect_scores import FunctionScorer, Scores, scorer
from aezoo.tasks.passes import current
from aezoo.tasks.samples import SampleSet, evaluation_mode, random_rows
from aezoo.training.data_statistics import DataStatistics

BASELINES = ("pca", "mean", "knn", "isolation_forest")
_MAX_DRAWS = 10**6
# floats of the training samples for a baseline, 256 MiB, of which most methods make copies
_MAX_VALUES = 2**26
# floats of the training samples that are scored at a time
_MAX_SCORED = 2**24
# largest size in bytes of the statistics of a score that are stored with the weights
_MAX_STATE = 2**28
# directions of fre, the proj_size of https://github.com/open-edge-platform/anomalib
_FRE_COMPONENTS = 220


class Detector:
    """Anomaly detection by a trained model, with the conventions of PyOD.

    `fit` sets the threshold, and fits mahalanobis, nap, combined and deep_svdd; the model stays unchanged. Scores of
    samples that the model was trained on are lower than those of new samples: give others to calibrate on.
    PyOD: Zhao et al. 2019, https://jmlr.org/papers/v20/19-011.html

    Args:
        model: a trained model.
        score: deviance, nll, mse, elbo, iwae, mahalanobis, sap, nap, combined or deep_svdd, see
            `aezoo.tasks.detect_scores`.
        contamination: share of the calibration samples above the threshold, at most one half.
        n_draws: draws of the code per sample, for elbo and iwae.
        svdd_epochs: epochs of deep_svdd.
        svdd_lr: learning rate of deep_svdd.
        svdd_nu: share of the training samples that may lie outside deep_svdd's soft boundary; 0 has no boundary.
        batch_size: samples at a time.
        seed: of random draws.
        progress: show bars on a terminal.

    Attributes:
        scorer: computes the score.
        decision_scores_: (N,) scores of the training samples; for mahalanobis and nap as if each had been left out of
            the fit.
        calibration_scores_: (M,) scores of the calibration samples; without them those of the training samples.
        threshold_: samples with larger scores are anomalies.
        labels_: (N,) 1 for the anomalies among the training samples, 0 for the others.

    Raises:
        AezooError: an invalid value, or a score that the model does not have.
    """

    decision_scores_: Scores
    calibration_scores_: Scores
    threshold_: float
    labels_: npt.NDArray[np.int64]

    def __init__(
        self,
        model: Autoencoder,
        score: str = "deviance",
        contamination: float = 0.1,
        *,
        n_draws: int = 64,
        svdd_epochs: int = 50,
        svdd_lr: float = 5e-4,
        svdd_nu: float = 0.0,
        batch_size: int = 256,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        if not 0 < contamination <= 0.5:
            raise AezooError(f"contamination is {contamination}: give a share above 0 and of at most 0.5")
        if not 1 <= n_draws <= _MAX_DRAWS or batch_size < 1:
            raise AezooError(f"n_draws takes 1 to {_MAX_DRAWS:,}, batch_size 1 or more, got {n_draws}, {batch_size}")
        self.model, self.score, self.contamination = model, score, contamination
        self.name, self.note, self.fitted_on = score, "", slice(None)
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        tuning = SVDDSettings(svdd_epochs, svdd_lr, svdd_nu)
        self.scorer = scorer(model, score, n_draws, tuning, self._title("epochs"))

    def fit(self, X: Any, y: Any = None, calibrate_on: Any = None) -> "Detector":
        """Learn from samples that are mostly normal, and set the threshold.

        Args:
            X: samples (N, *input_shape), a DataModule (its training split) or `SampleSet`.
            y: not used.
            calibrate_on: normal samples that the model was not trained on, for threshold and p-values; by default the
                validation split if X is a DataModule, else X.
        """
        if calibrate_on is None and isinstance(X, DataModule) and "val" in X.splits():
            calibrate_on = X
        samples = SampleSet.from_data(X, "train", self.model.takes_missing).check(self.model)
        n = len(samples)
        with evaluation_mode(self.model, self.seed) as like:
            most = self.scorer.max_samples(samples.rows([0]).to(like))
            chosen = random_rows(n, most, self.seed)
            part = samples if len(chosen) == n else samples.subset(chosen)
            batches = part.batches(self.batch_size, self._title("fit"))
            self.scorer.fit((x.to(like) for x in batches), len(part))
        self.decision_scores_ = self._scores(samples)
        self.decision_scores_[chosen.numpy()] = self.scorer.leave_one_out(self.decision_scores_[chosen.numpy()])
        if calibrate_on is None:
            self._is_held_out, self.calibration_scores_ = False, self.decision_scores_
            self.threshold_ = threshold_of(self.decision_scores_, self.contamination, held_out=False)
        else:
            held_out = SampleSet.from_data(calibrate_on, "val", self.model.takes_missing).check(self.model)
            self.calibrate(self._scores(held_out))
        self.labels_ = (self.decision_scores_ > self.threshold_).astype(np.int64)
        return self

    def restore(self, statistics: DataStatistics) -> bool:
        """Use the calibration of an earlier `fit` instead of a new one.

        Args:
            statistics: see `Autoencoder.data_statistics`.

        Returns:
            Whether they contain this score and its statistics.

        Raises:
            AezooError: the statistics are of another model.
        """
        scores, state = statistics.scores.get(self.score), statistics.states.get(self.score, {})
        if scores is None or not (state or isinstance(self.scorer, FunctionScorer)):
            return False
        try:
            self.scorer.restore(state)
            with evaluation_mode(self.model, self.seed) as like:
                found = self.scorer(like.new_zeros(1, *self.model.input_shape))
            if found.shape != (1,):
                raise ValueError(f"it gives scores of shape {tuple(found.shape)}")
        except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise AezooError(f"the calibration stored with the weights is not for the score {self.score} of this model "
                             f"({reason}): run detect with the training data again") from error  # fmt: skip
        self.calibrate(scores.cpu().double().numpy())
        self.decision_scores_ = self.calibration_scores_
        self.labels_ = (self.decision_scores_ > self.threshold_).astype(np.int64)
        return True

    def statistics(self) -> DataStatistics:
        """The calibration, for `restore`; empty without calibration samples or if it is larger than 256 MiB."""
        size = sum(value.nbytes for value in self.scorer.state.values())
        if not self._is_held_out or size > _MAX_STATE:
            return DataStatistics()
        scores = {self.score: torch.from_numpy(np.array(self.calibration_scores_))}
        state = {key: value.detach().cpu() for key, value in self.scorer.state.items()}
        return DataStatistics(None, scores, {self.score: state} if state else {})

    def decision_function(self, X: Any) -> Scores:
        """Scores of samples, larger is more anomalous, (N,)."""
        if not hasattr(self, "threshold_"):
            raise AezooError("this Detector is not fitted: call fit(X) with samples that are mostly normal first")
        return self._scores(SampleSet.from_data(X, allow_missing=self.model.takes_missing).check(self.model))

    def predict(self, X: Any, fdr: float | None = None) -> npt.NDArray[np.int64]:
        """1 for samples above the threshold, 0 for the others, (N,).

        Args:
            X: samples.
            fdr: flag those of these samples that Benjamini and Hochberg's procedure on their p-values selects; on
                average a share of at most fdr of them is normal. Each decision then depends on the other samples.

        Raises:
            AezooError: an fdr without calibration samples, or with too few of them.
        """
        scores = self.decision_function(X)
        if fdr is None:
            return (scores > self.threshold_).astype(np.int64)
        return (scores > fdr_threshold(scores, self._held_out_scores("fdr"), fdr)).astype(np.int64)

    def predict_proba(self, X: Any) -> npt.NDArray[np.float64]:
        """Scores scaled to 0 at the smallest and 1 at the largest training score, (N, 2): normal, anomaly.

        These follow PyOD and are not probabilities; `p_values` are.
        """
        scores, train = self.decision_function(X), self.decision_scores_
        outlier = ((scores - train.min()) / (np.ptp(train) or 1.0)).clip(0, 1)
        return np.stack([1 - outlier, outlier], axis=1)

    def p_values(self, X: Any) -> Scores:
        """Probabilities that a normal sample has at least the score of each of these, (N,); see `p_values`."""
        return p_values(self.decision_function(X), self.calibration_scores_)

    def anomaly_share(self, X: Any) -> AnomalyShare:
        """The share of anomalies among samples, estimated from their p-values; see `AnomalyShare`.

        Raises:
            AezooError: there are no calibration samples.
        """
        return anomaly_share(self.decision_function(X), self._held_out_scores("a share of anomalies"))

    def _held_out_scores(self, what: str) -> Scores:
        if not self._is_held_out:
            raise AezooError(f"{what} needs samples that the model was not trained on: call fit(X, calibrate_on=...)")
        return self.calibration_scores_

    def calibrate(self, scores: Scores) -> None:
        """Take scores of samples that the model was not trained on for threshold and p-values, (M,)."""
        self._is_held_out, self.calibration_scores_ = True, scores
        self.threshold_ = threshold_of(scores, self.contamination)

    def _scores(self, samples: SampleSet) -> Scores:
        with evaluation_mode(self.model, self.seed) as like:
            scores = _computed(
                samples, lambda x: self.scorer(x.to(like)), self.batch_size, self.seed, self._title("scores")
            )
        if not np.isfinite(scores).all():
            max_score = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise AezooError(f"the score {self.score} of sample {max_score} is {scores[max_score]}: use another score")
        return scores

    def _title(self, what: str) -> str:
        return f"{self.score}: {what}" if self.progress else ""


class Baseline:
    """A detector that trains no neural network, on raw values or frozen features, with the methods of `Detector`.

    Args:
        name: pca, the squared error of a reconstruction from as many components as a code has numbers; mean, the
            squared distance to the mean sample; knn, the distance to the fifth-nearest training sample;
            isolation_forest (Liu et al. 2008, https://doi.org/10.1109/ICDM.2008.17). All are scikit-learn's. fre, the
            feature reconstruction error (Ndiour et al. 2020, https://arxiv.org/abs/2012.04250): pca, of 220
            components or half of the possible number, in the features of a frozen network. PCA is the optimum of a
            linear autoencoder's squared error, and needs no training. On photographs of industrial products this is
            better than autoencoders of pixels: image AUROC on MVTec AD .933 with ResNet-50 and .947 with a wide one,
            against .421 for GANomaly (anomalib's results).
        contamination: share of the training samples above the threshold.
        n_components: for pca.
        features: for fre, see `aezoo.tasks.detect_features`.
        device: of the network for fre.
        n_fit: training samples to fit on, drawn from the seed.
        batch_size: samples at a time.
        seed: of random draws.
        progress: show bars on a terminal.

    Attributes:
        fitted_on: indices of the training samples that it was fitted on.
        decision_scores_: their scores; for knn a sample is not a neighbour of itself.
        threshold_: samples with larger scores are anomalies.
        note: why it cannot be fitted, if so.
    """

    fitted_on: npt.NDArray[np.int64]
    decision_scores_: Scores
    threshold_: float

    def __init__(
        self,
        name: str,
        contamination: float = 0.1,
        *,
        n_components: int = 16,
        features: str = "random",
        device: torch.device | str = "cpu",
        n_fit: int = 10_000,
        batch_size: int = 256,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.name, self.contamination, self.n_components, self.n_fit = name, contamination, n_components, n_fit
        self.features, self.device = features, device
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        self.note = ""
        self._net: FrozenFeatures | None = None

    def fit(self, samples: SampleSet) -> "Baseline":
        """Learn from samples that are mostly normal."""
        if self.name == "fre":
            self._net = FrozenFeatures(self.features, samples.shape).to(self.device)
        d = self._values(samples.rows([0])).shape[1]
        chosen = random_rows(len(samples), min(self.n_fit, max(2, _MAX_VALUES // d)), self.seed)
        self.fitted_on, n = chosen.numpy(), len(chosen)
        x, start = np.empty((n, d), np.float32), 0
        for part in samples.subset(chosen).batches(self.batch_size, f"{self.name}: fit" if self.progress else ""):
            x[start : start + len(part)] = self._values(part)
            start += len(part)
        n_components = min(_FRE_COMPONENTS, n // 2, d // 2) if self.name == "fre" else self.n_components
        if np.isnan(x).any():
            self.note = "does not accept samples with missing values"
        elif n < 2:
            self.note = "needs at least 2 training samples"
        elif self.name == "pca" and n_components >= min(n, d):
            self.note = f"{n_components:,} components reconstruct exactly {n:,} samples of {d:,} values"
        else:
            self._function, train_scores = _FITS[self.name](x, n_components, self.seed)
            self.decision_scores_ = np.asarray(train_scores, np.float64)
            self.threshold_ = float(np.percentile(self.decision_scores_, 100 * (1 - self.contamination)))
        return self

    def decision_function(self, samples: SampleSet) -> Scores:
        """Scores of samples, larger is more anomalous, (N,)."""

        def score(x: Tensor) -> Tensor:
            if x.isnan().any():
                raise AezooError(f"{self.name} does not accept samples with missing values: give --baselines false")
            return torch.from_numpy(np.asarray(self._function(self._values(x)), np.float64))

        title = f"{self.name}: scores" if self.progress else ""
        return _computed(samples, score, self.batch_size, self.seed, title)

    def _values(self, x: Tensor) -> "Rows":
        """The values or features of samples, (B, *shape) -> (B, D)."""
        values: Rows = (x if self._net is None else self._net(x.to(self.device)).cpu()).flatten(1).numpy()
        return values


def _computed(samples: SampleSet, score: Callable[[Tensor], Tensor], batch_size: int, seed: int, title: str) -> Scores:
    """The scores of all samples, (N,), by the processes of the command."""
    passes = current.get()
    scores = np.empty(len(samples)) if passes.parts is None else passes.array((len(samples),), np.float64)
    for start, x in passes.blocks(samples, batch_size, seed, title):
        scores[start : start + len(x)] = score(x).cpu().double().numpy()
    return np.array(scores)  # which callers change


Rows = npt.NDArray[np.float32]
Fitted = tuple[Callable[[Rows], Any], Any]


def _in_parts(score: Callable[[Rows], Any], x: Rows) -> Any:
    """Scores of all rows, of which a part is in memory a second time."""
    n = max(1, _MAX_SCORED // x.shape[1])
    return np.concatenate([score(x[start : start + n]) for start in range(0, len(x), n)])


def _pca(x: Rows, n_components: int, seed: int) -> Fitted:
    from sklearn.decomposition import PCA

    with np.errstate(invalid="ignore"):  # of constant data, shares of a variance of 0
        pca = PCA(n_components, random_state=seed).fit(x)

    def score(x: Rows) -> Any:
        return np.square(x - pca.inverse_transform(pca.transform(x))).sum(1)

    return score, _in_parts(score, x)


def _mean(x: Rows, n_components: int, seed: int) -> Fitted:
    mean = x.mean(0)

    def score(x: Rows) -> Any:
        return np.square(x - mean).sum(1)

    return score, _in_parts(score, x)


def _knn(x: Rows, n_components: int, seed: int) -> Fitted:
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=min(5, len(x) - 1)).fit(x)

    def score(x: Rows) -> Any:
        return near.kneighbors(x)[0][:, -1]

    # without other samples, no training sample counts as a neighbour of itself
    return score, near.kneighbors()[0][:, -1]


def _isolation_forest(x: Rows, n_components: int, seed: int) -> Fitted:
    from sklearn.ensemble import IsolationForest

    forest = IsolationForest(random_state=seed).fit(x)

    def score(x: Rows) -> Any:
        return -forest.score_samples(x)

    return score, _in_parts(score, x)


_FITS = {"pca": _pca, "mean": _mean, "knn": _knn, "isolation_forest": _isolation_forest, "fre": _pca}
