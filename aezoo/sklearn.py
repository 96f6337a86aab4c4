"""scikit-learn interface: autoencoders as a transformer, an outlier detector and a denoiser.

    from aezoo.sklearn import AutoencoderTransformer
    make_pipeline(AutoencoderTransformer("vae", latent_dim=8, random_state=0), LogisticRegression())

X is (n_samples, n_features); with `sample_shape=(1, 28, 28)`, a convolutional model gets its rows as images. A pickled
estimator contains its fitted model as safetensors and plain values, from which only registered models can be built.
"""

import inspect
import logging
import math
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from sklearn import base
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_array,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)
from torch import Tensor

from aezoo.autoencoder import Autoencoder
from aezoo.data.resident import ResidentLoader
from aezoo.distributions.likelihoods import likelihood
from aezoo.errors import AezooError
from aezoo.io.checkpoint import build
from aezoo.registry import create_model, hyperparameters, model_class, name_of
from aezoo.tasks.detect_calibration import AnomalyShare, anomaly_share, fdr_threshold, held_out_threshold, p_values
from aezoo.tasks.detect_combined import CombinedScore
from aezoo.tasks.detect_contributions import contributions
from aezoo.tasks.result_store import resolve_device
from aezoo.tasks.samples import random_rows
from aezoo.training import arguments, budgets
from aezoo.training.data_statistics import DataStatistics
from aezoo.training.data_units import DataUnits
from aezoo.training.seeding import forked_rng, seed_all

Array = npt.NDArray[Any]
_SCALES = ("none", "standard", "unit")
_ANOMALY_SCORES = ("auto", "combined", "deviance")
# code size of a detector of vectors, chosen on the ten tuning sets of `aezoo benchmark adbench`
_DETECTOR_CODE = 2
_DTYPES = (np.float64, np.float32)
# attributes that scikit-learn sets before fitting
_FEATURE_ATTRIBUTES = ("n_features_in_", "feature_names_in_")
# the results of a sample must not depend on its neighbours, so all batches have one size
_BLOCK = 256
# torch's random streams and Lightning's loggers belong to the process, so threads take turns
_ONE_AT_A_TIME = threading.RLock()


class _Estimator(base.BaseEstimator):
    """Base of the three: training, scaling, blocks of samples, pickling; `AutoencoderTransformer` has the arguments."""

    autoencoder_: Autoencoder
    offset_of_scale_: Array
    scale_: Array
    n_epochs_: int
    chosen_: dict[str, Any]
    classes_: Array

    def __init__(
        self,
        model: str = "dense_ae",
        latent_dim: int | None = None,
        *,
        model_params: dict[str, Any] | None = None,
        likelihood: str | None = None,
        scale: str | None = None,
        sample_shape: tuple[int, ...] | None = None,
        max_epochs: int | None = None,
        batch_size: int | None = None,
        lr: float = 1e-3,
        device: str = "auto",
        random_state: Any = None,
        verbose: bool | int = False,
    ) -> None:
        self.model, self.latent_dim, self.model_params, self.likelihood = model, latent_dim, model_params, likelihood
        self.scale, self.sample_shape, self.max_epochs, self.batch_size = scale, sample_shape, max_epochs, batch_size
        self.lr, self.device, self.random_state, self.verbose = lr, device, random_state, verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        with suppress(AezooError):  # of an unknown model, which fit reports
            tags.input_tags.allow_nan = self._takes_missing()
        return tags

    # ---- training ---------------------------------------------------------------------------------------------------

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train a fresh model on X, (n_samples, n_features), dense and finite.

        For models of samples that may lack parts, such as mvae, the values of a missing part are NaN.

        Labels y, (n_samples,), -1 for none, are for models with the hyperparameter `num_classes` and for models that
        learn from them which samples belong together, such as triplet_ae; other models ignore them.
        """
        return self._fit(X, y, from_scratch=True)

    def partial_fit(self, X: Any, y: Any = None) -> Self:
        """Train one pass on these samples with a fresh optimiser; the first fixes scale, labels and initial weights."""
        return self._fit(X, y, from_scratch=not hasattr(self, "autoencoder_"), epochs=1)

    def _fit(self, X: Any, y: Any, from_scratch: bool, epochs: int | None = None) -> Self:
        before = {name: value for name, value in vars(self).items() if name in _FEATURE_ATTRIBUTES}
        try:
            self._train(self._checked(X, reset=from_scratch), y, from_scratch, epochs)
        except BaseException:
            # a fitted estimator continues with the features that it had
            for name in _FEATURE_ATTRIBUTES:
                self.__dict__.pop(name, None)
            self.__dict__.update(before)
            raise
        return self

    def _train(self, X: Array, y: Any, from_scratch: bool, epochs: int | None = None) -> None:
        settings = self._settings()
        labels = None
        counts_classes = "num_classes" in hyperparameters(settings["model"])
        if y is not None and (counts_classes or model_class(settings["model"]).reads_labels):
            check_consistent_length(X, y)
            if not from_scratch and not hasattr(self, "classes_"):
                raise AezooError("partial_fit takes labels from its first call on, which had none: give them there too")
            classes, labels = _labels(y, None if from_scratch else getattr(self, "classes_", None))
            if counts_classes:
                settings["model_params"] = {"num_classes": len(classes), **settings["model_params"]}
        chosen = self._choose(settings, X)
        if not from_scratch:
            chosen |= {name: value for name, value in self.chosen_.items() if name in chosen}
        settings |= chosen
        epochs = epochs or settings["max_epochs"]
        device = resolve_device(settings["device"])
        seed = check_random_state(self.random_state).randint(2**31) + (0 if from_scratch else self.n_epochs_)
        offset, scale = _statistics(X, settings["scale"]) if from_scratch else (self.offset_of_scale_, self.scale_)
        if settings["verbose"] and chosen and from_scratch:
            print(f"chosen from the data: {', '.join(f'{key} {value}' for key, value in chosen.items())}")
        with _no_side_effects(device):
            seed_all(seed, device, others=False)
            model = _build(settings, X.shape[1]) if from_scratch else self.autoencoder_
            if "lr" in model.hparams:
                model.lr = {**settings, **settings["model_params"]}["lr"]
            for part in model.modules():
                if isinstance(part, Autoencoder) and "steps" in dict(part.named_buffers(recurse=False)):
                    part.steps_before = 0 if from_scratch else int(part.get_buffer("steps")) + 1
            model.compile_mode = "off"
            x = _samples_of(model, X, offset, scale)
            trainer = pl.Trainer(
                max_epochs=epochs,
                accelerator="gpu" if device.type == "cuda" else device.type,
                devices=[device.index or 0] if device.type == "cuda" else 1,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=bool(settings["verbose"]),
            )
            loader = ResidentLoader(x, labels, batch_size=min(settings["batch_size"], len(x)), shuffle=True, seed=seed)
            try:
                trainer.fit(model.train(), loader)
            except SystemExit as stopped:
                # Lightning ends the process at Ctrl-C; notebooks and searches expect the interrupt itself
                if isinstance(stopped.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from None
                raise
            finally:
                # the trainer refers to the training data; a fitted estimator does not
                model.trainer = None
                model.cpu().eval()
        # at the end, so that a failed fit keeps the previous results
        self.autoencoder_, self.offset_of_scale_, self.scale_, self.chosen_ = model, offset, scale, chosen
        self._set_units()
        if from_scratch:
            self.__dict__.pop("classes_", None)
        if labels is not None:
            self.classes_ = classes
        self.n_epochs_ = epochs + (0 if from_scratch else self.n_epochs_)
        self._n_features_out = math.prod(model.code_shape)

    def _set_units(self) -> None:
        """Store the units of X in the model, for `save_model`, `export` and the commands."""
        model = self.autoencoder_
        parts = {"offset": self.offset_of_scale_, "factor": self.scale_}
        is_table = len(model.input_shape) == 1
        columns = tuple(getattr(self, "feature_names_in_", ())) if is_table else ()
        scaling = {key: torch.from_numpy(np.array(part)).reshape(model.input_shape) for key, part in parts.items()}
        model.data_units = DataUnits(scaling, None, columns, is_table)

    def _settings(self) -> dict[str, Any]:
        """The parameters, checked against the constructor's annotations; NumPy numbers of a search become Python's."""
        settings = _plain(self.get_params(deep=False))
        arguments.check(type(self), (), settings)
        for name in ("max_epochs", "batch_size"):
            if settings[name] is not None and settings[name] < 1:
                raise AezooError(f"{name} must be at least 1, got {settings[name]}")
        if settings["scale"] not in (None, *_SCALES):
            raise AezooError(f"scale is {settings['scale']!r}: choose from {', '.join(_SCALES)}")
        params = settings["model_params"] = settings["model_params"] or {}
        if "input_shape" in params:
            raise AezooError(f"model_params must be a dict, without input_shape (give sample_shape), got {params!r}")
        return settings

    def _choose(self, settings: dict[str, Any], X: Array) -> dict[str, Any]:
        """Values for the arguments that are None, by the rules of `aezoo.training.budgets`."""
        return _choose(settings, X)

    # ---- samples in and out -----------------------------------------------------------------------------------------

    def _validated(self, X: Any) -> Array:
        check_is_fitted(self)
        return self._checked(X, reset=False)

    def _checked(self, X: Any, reset: bool) -> Array:
        finite = "allow-nan" if self._takes_missing() else True
        return validate_data(self, X, dtype=_DTYPES, reset=reset, ensure_all_finite=finite)

    def _takes_missing(self) -> bool:
        return isinstance(self.model, str) and bool(model_class(self.model).takes_missing)

    def _samples(self, X: Array) -> Tensor:
        """Rows of X as the model's samples."""
        return _samples_of(self.autoencoder_, X, self.offset_of_scale_, self.scale_)

    def _rows(self, x: Array, dtype: npt.DTypeLike) -> Array:
        """The model's samples as rows in the units of X."""
        return (x * self.scale_ + self.offset_of_scale_).astype(dtype)

    def _apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Array:
        """function(x) as rows of float64, in blocks of one size on the model's device."""
        device, parts = self.autoencoder_.device, []
        with _ONE_AT_A_TIME, torch.no_grad(), forked_rng(device):
            seed_all(0, device, others=False)
            for block in x.split(_BLOCK):
                padded = torch.cat([block, block[:1].expand(_BLOCK - len(block), *block.shape[1:])])
                parts.append(function(padded.to(device))[: len(block)].cpu().double().flatten(1))
        return torch.cat(parts).numpy()

    def reconstruct(self, X: Any) -> Array:
        """Reconstructions, (n_samples, n_features), in the units of X."""
        X = self._validated(X)
        return self._rows(self._apply(self.autoencoder_, self._samples(X)), X.dtype)

    def score_samples(self, X: Any) -> Array:
        """Log-likelihood of each sample in nats, (n_samples,); larger is more normal.

        It is log p(x | code), or the ELBO for a variational model. A density is that of X in its units, for any
        scale. A discrete likelihood such as bernoulli gives a probability, which has no units. For a model with
        another score, such as deep_svdd with a distance and dagmm with an energy, it is minus that score, up to a
        constant: it compares samples under one model, but not models with each other.
        """
        return self._score_samples(self._validated(X))

    def _score_samples(self, X: Array) -> Array:
        model = self.autoencoder_
        nll = self._apply(lambda block: model.score(block)[:, None], self._samples(X))[:, 0]
        # the density of x = s x' + o is that of x' divided by the product of s, over the values that are there
        log_scale = np.where(np.isnan(X), 0.0, np.log(self.scale_)).sum(1)
        return -nll - (0.0 if model.likelihood.discrete else log_scale)

    # ---- pickling ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        model = state.pop("autoencoder_", None)
        if model is not None:
            # copies, because safetensors rejects tensors that share memory
            weights = {k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
            state["_saved"] = (name_of(type(model)), dict(model.hparams), safetensors.torch.save(weights))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved", None)
        super().__setstate__(state)
        if saved is not None:
            name, settings, content = saved
            weights = safetensors.torch.load(content)
            model = build(name, settings, Path("the pickled estimator"), weights)
            model.float().load_state_dict(weights)
            self.autoencoder_ = model.eval()
            self._set_units()

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "autoencoder_")


class _Transformer(base.TransformerMixin):
    """A transformer whose output has the dtype of the input: float32 for float32, float64 for everything else."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


class AutoencoderTransformer(base.ClassNamePrefixFeaturesOutMixin, _Transformer, _Estimator):
    """Codes as features: `transform` encodes, `inverse_transform` decodes, `score` is the mean log-likelihood.

    Args:
        model: a name of the registry.
        latent_dim: size of the code, if the model has such a hyperparameter; None chooses it by the number of features,
            as `aezoo fit` does.
        model_params: other hyperparameters of the model, e.g. {"hidden_dims": (256, 64)}.
        likelihood: how outputs are compared with data; bernoulli needs scale "unit" or data in [0, 1]. None takes the
            default of the model, but gaussian instead of bernoulli for values outside of [0, 1].
        scale: standard (mean 0, deviation 1), unit (0 to 1) or none; per feature, from the statistics of the first fit.
            None does not scale data in [0, 1]; for others it takes unit if the likelihood needs [0, 1] or samples are
            pictures, otherwise standard.
        sample_shape: shape of a sample as input of the model; None for vectors.
        max_epochs: passes over the training data; None makes at least 20, and about 2,000 steps of few samples.
        batch_size: samples per step; None takes 16 to 128, by the number of samples.
        lr: learning rate.
        device: device for training: auto, cpu, cuda, cuda:1 ...; a trained model is on the CPU.
        random_state: fixes initial weights, order and noise.
        verbose: show a progress bar.

    Attributes:
        autoencoder_: the trained model with the units of X, for `aezoo.save_model` and `aezoo.export`.
        offset_of_scale_: (n_features,) the offset that is subtracted from X.
        scale_: (n_features,) the scale that X is divided by.
        n_epochs_: epochs trained so far.
        chosen_: what the first fit chose for those of the arguments that are None.
        classes_: (n_classes,) the labels of the training data, for a model that uses labels.
    """

    def transform(self, X: Any) -> Array:
        """Codes of the samples, (n_samples, code size)."""
        X = self._validated(X)
        return self._apply(self.autoencoder_.encode, self._samples(X)).astype(X.dtype)

    def inverse_transform(self, X: Any) -> Array:
        """Decode codes into samples: (n_samples, code size) -> (n_samples, n_features), in the units of X."""
        check_is_fitted(self)
        codes = check_array(X, dtype=_DTYPES)
        if codes.shape[1] != self._n_features_out:
            raise AezooError(f"codes have {self._n_features_out} numbers, X has {codes.shape[1]}")
        z = torch.from_numpy(codes.astype(np.float32)).reshape(len(codes), *self.autoencoder_.code_shape)
        return self._rows(self._apply(self.autoencoder_.decode, z), codes.dtype)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of `score_samples`: larger is better, as cross-validation and grid search expect."""
        return float(self.score_samples(X).mean())


class AutoencoderDetector(base.OutlierMixin, _Estimator):
    """Outlier detection by the score of a model: `predict` gives 1 for normal samples and -1 for outliers.

    `fit` does not train on a share of the samples and computes the threshold from their scores, because a model scores
    training samples as more normal than new ones. Other arguments and attributes are those of `AutoencoderTransformer`.

    For a stream, call `partial_fit` with one part after the other. Each call trains on its samples except for the share
    `calibration_fraction`. The threshold is then computed from the scores, by the new model, of the samples that the
    last calls did not train on, and the score combined is fitted to those that they trained on. Together these are the
    last `stream_window` samples, so that both follow a drift. The first call determines the scale of the features.

    Args:
        anomaly_score: how samples are scored. combined: the tail probabilities of the values, the error of the
            reconstruction, the distance of the code from the mean code and an isolation forest, combined by Fisher's
            method, see `aezoo.tasks.detect_combined`. deviance: the model's `anomaly_score`; for most models
            the log-likelihood less that of a perfect reconstruction, so that samples are compared by their errors and
            not by how likely their values are; for detectors such as deep_svdd and dagmm their criterion. auto:
            combined for vectors and models with a narrow code whose score is only the reconstruction error, such as
            dense_ae and denoising_ae, otherwise deviance.
        latent_dim: size of the code; None takes 2 if auto takes combined, otherwise the choice of
            `AutoencoderTransformer`. A wide code reconstructs outliers, too.
        max_epochs: passes over the training data; None takes the choice of `AutoencoderTransformer`, or, if auto takes
            combined, about 1,000 steps in 10 to 40 passes, because the network learns outliers later.
        contamination: share of normal samples that are treated as outliers, which sets the threshold.
        calibration_fraction: share of the samples that is only used for the threshold, at least 1 / contamination - 1
            samples, at most half of all. With 0, training uses all samples, and contamination is the share of the
            training samples that are treated as outliers; the share of new normal samples is larger.
        stream_window: number of samples of the last calls of `partial_fit` that the estimator stores, at least those of
            the last call.

    Attributes:
        offset_: the threshold; samples with `score_samples` below it are outliers.
        n_calibration_: number of samples for the threshold; 0 if it comes from the training samples.
        calibration_scores_: (n_calibration_,) their scores, minus `score_samples`, or those of the training samples.
    """

    calibration_scores_: Array
    _combined: CombinedScore | None
    # the last samples of a stream: those that were trained on, and those for the threshold
    _recent: tuple[Array, Array]

    def __init__(
        self, model: str = "dense_ae", latent_dim: int | None = None, *, anomaly_score: str = "auto",
        contamination: float = 0.1, calibration_fraction: float = 0.2, stream_window: int = 2000,
        model_params: dict[str, Any] | None = None, likelihood: str | None = None, scale: str | None = None,
        sample_shape: tuple[int, ...] | None = None, max_epochs: int | None = None, batch_size: int | None = None,
        lr: float = 1e-3, device: str = "auto", random_state: Any = None, verbose: bool | int = False,
    ) -> None:  # fmt: skip
        super().__init__(
            model, latent_dim, model_params=model_params, likelihood=likelihood, scale=scale, sample_shape=sample_shape,
            max_epochs=max_epochs, batch_size=batch_size, lr=lr, device=device, random_state=random_state,
            verbose=verbose,
        )  # fmt: skip
        self.anomaly_score, self.contamination = anomaly_score, contamination
        self.calibration_fraction, self.stream_window = calibration_fraction, stream_window

    def _settings(self) -> dict[str, Any]:
        if isinstance(self.contamination, str):
            raise AezooError(f"contamination must be a number in (0, 0.5], the share of outliers, got "
                             f"{self.contamination!r}: no rule sets it from the data")  # fmt: skip
        settings = super()._settings()
        if settings["anomaly_score"] not in _ANOMALY_SCORES:
            raise AezooError(
                f"anomaly_score is {settings['anomaly_score']!r}: choose from {', '.join(_ANOMALY_SCORES)}"
            )
        if not 0 < settings["contamination"] <= 0.5:
            raise AezooError(f"contamination must be in (0, 0.5], got {settings['contamination']}")
        if not 0 <= settings["calibration_fraction"] <= 0.5:
            raise AezooError(f"calibration_fraction must be in [0, 0.5], got {settings['calibration_fraction']}")
        if settings["stream_window"] < 1:
            raise AezooError(f"stream_window must be at least 1, got {settings['stream_window']}")
        return settings

    def _choose(self, settings: dict[str, Any], X: Array) -> dict[str, Any]:
        chosen = super()._choose(settings, X)
        if settings["anomaly_score"] == "auto":
            cls = model_class(settings["model"])
            by_reconstruction = cls.score is Autoencoder.score and budgets.has_narrow_code(cls)
            combined = by_reconstruction and len(settings["sample_shape"] or (1,)) == 1
            chosen["anomaly_score"] = "combined" if combined else "deviance"
            if combined and "latent_dim" in chosen:
                chosen["latent_dim"] = min(_DETECTOR_CODE, chosen["latent_dim"])
            if combined and "max_epochs" in chosen:
                batch_size = {**settings, **chosen}["batch_size"]
                chosen["max_epochs"] = budgets.choose_detector_epochs(len(X), batch_size)
        return chosen

    def _train(self, X: Array, y: Any, from_scratch: bool, epochs: int | None = None) -> None:
        contamination, fraction = (self._settings()[name] for name in ("contamination", "calibration_fraction"))
        n = min(max(round(fraction * len(X)), math.ceil(1 / contamination) - 1), len(X) // 2) if fraction else 0
        if n and y is not None:
            check_consistent_length(X, y)
        # one seed for all calls, so that a second pass over the same samples trains on the same ones
        left_out, trained = np.split(np.random.default_rng(0).permutation(len(X)), [n])
        trained.sort()
        super()._train(X[trained], None if y is None else np.asarray(y)[trained], from_scratch, epochs)
        fitted, held_out = X[trained], X[left_out]
        recent = self.__dict__.pop("_recent", None)
        if epochs is not None:
            if recent is not None and not from_scratch:
                fitted, held_out = (np.concatenate(parts) for parts in zip(recent, (fitted, held_out), strict=True))
            n_held_out = max(n, round(fraction * self.stream_window), math.ceil(1 / contamination) - 1)
            n_fitted = max(len(trained), self.stream_window - n_held_out)
            fitted, held_out = self._recent = fitted[-n_fitted:].copy(), held_out[-n_held_out:].copy()
        self._combined = None
        if {"anomaly_score": self.anomaly_score, **self.chosen_}["anomaly_score"] == "combined":
            self._combined = self._fit_combined(fitted)
        self.n_calibration_ = len(held_out)
        self.calibration_scores_ = -self._score_samples(held_out if len(held_out) else fitted)
        if len(held_out):
            self.offset_ = -held_out_threshold(self.calibration_scores_, contamination)
        else:
            self.offset_ = float(np.percentile(-self.calibration_scores_, 100 * contamination))
        self._set_statistics()

    @property
    def _score_name(self) -> str:
        """The score of the fit, even if the parameter has been changed since."""
        return "deviance" if self._combined is None else "combined"

    def _set_statistics(self) -> None:
        """Store the calibration in the model, for `aezoo detect` and `aezoo export`."""
        states = {} if self._combined is None else {self._score_name: self._combined.state}
        if self.n_calibration_:
            scores = {self._score_name: torch.from_numpy(np.array(self.calibration_scores_))}
            self.autoencoder_.data_statistics = DataStatistics(None, scores, states)

    def _fit_combined(self, X: Array) -> CombinedScore:
        found = CombinedScore(self.autoencoder_)
        x = self._samples(X)
        chosen = random_rows(len(x), found.max_samples(x[:1]), 0)
        with _ONE_AT_A_TIME, torch.no_grad(), forked_rng(self.autoencoder_.device):
            seed_all(0, self.autoencoder_.device, others=False)
            found.fit([x[chosen]], len(chosen))
        return found

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        combined = state.pop("_combined", None)
        if combined is not None:
            state["_saved_score"] = safetensors.torch.save(combined.state)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        saved = state.pop("_saved_score", None)
        super().__setstate__(state)
        if hasattr(self, "autoencoder_"):
            self._combined = None if saved is None else CombinedScore(self.autoencoder_)
            if saved is not None and self._combined is not None:
                self._combined.restore(safetensors.torch.load(saved))
            if hasattr(self, "calibration_scores_"):
                self._set_statistics()

    def score_samples(self, X: Any) -> Array:
        """Minus the score of each sample, (n_samples,); larger is more normal.

        Of combined it is the sum of the logarithms of four p-values. Of deviance it is log p(x | code) less its value
        for a perfect reconstruction, at most 0, minus the KL for a variational model; units of X do not change it; for
        a model with a criterion of its own, such as deep_svdd with a distance and dagmm with an energy, it is minus
        that. `AutoencoderTransformer` gives log-likelihoods.
        """
        return super().score_samples(X)

    def _score_samples(self, X: Array) -> Array:
        score = self._combined or self.autoencoder_.anomaly_score
        return -self._apply(lambda block: score(block)[:, None], self._samples(X))[:, 0]

    def decision_function(self, X: Any) -> Array:
        """`score_samples` minus the threshold, (n_samples,); negative for outliers."""
        return self.score_samples(X) - self.offset_

    def contributions(self, X: Any) -> Array:
        """What each feature contributes to the score, (n_samples, n_features); a row of combined adds up to it.

        The score is minus `score_samples`. Terms that belong to no feature, such as the KL of a variational model, are
        not included, see `aezoo.tasks.detect_contributions`.

        Raises:
            AezooError: the score is not a sum over features, such as the distance of deep_svdd.
        """
        x, name = self._samples(self._validated(X)), self._score_name
        return self._apply(lambda x: contributions(self.autoencoder_, name, self._combined, x).values, x)

    def predict(self, X: Any, fdr: float | None = None) -> npt.NDArray[np.int64]:
        """1 for normal samples, -1 for outliers, (n_samples,).

        Args:
            X: (n_samples, n_features).
            fdr: instead of `contamination`: treat those samples of X as outliers that Benjamini and Hochberg's
                procedure on their p-values selects. On average, a share of at most fdr of these are normal. The result
                for a sample then depends on all samples of X.

        Raises:
            AezooError: an fdr with too few calibration samples.
        """
        if fdr is None:
            return np.where(self.decision_function(X) < 0, -1, 1).astype(np.int64)
        scores = -self.score_samples(X)
        threshold = fdr_threshold(scores, self._held_out_scores("fdr"), fdr)
        return np.where(scores > threshold, -1, 1).astype(np.int64)

    def p_values(self, X: Any) -> Array:
        """Probabilities that a normal sample has at least the score of each sample of X, (n_samples,).

        Conformal p-values, from the scores s_i of n calibration samples, see `aezoo.tasks.detect_calibration`:

            p(x) = (1 + #{i: s_i >= s(x)}) / (n + 1)

        For a new normal sample, the probability of a value of at most t is at most t. Without calibration samples,
        the scores of the training samples are used, and the values are too small.
        """
        return p_values(-self.score_samples(X), self.calibration_scores_)

    def anomaly_share(self, X: Any) -> AnomalyShare:
        """The share of outliers among X with a 95 % interval, by Storey's estimate from the p-values.

        Raises:
            AezooError: there are no calibration samples.
        """
        scores = -self.score_samples(X)
        return anomaly_share(scores, self._held_out_scores("a share of outliers"))

    def _held_out_scores(self, what: str) -> Array:
        if not self.n_calibration_:
            raise AezooError(f"{what} needs samples that training leaves out: set calibration_fraction above 0")
        return self.calibration_scores_


class AutoencoderDenoiser(base.OneToOneFeatureMixin, _Transformer, _Estimator):
    """Turns noisy samples into clean ones with a denoising model that is trained on clean samples.

    Other arguments and attributes are those of `AutoencoderTransformer`.

    Args:
        corruption: noise that training adds and `transform` removes, in units of the scaled data: gaussian:0.3,
            masking:0.3, salt_and_pepper:0.1; None leaves it to the model.
    """

    def __init__(
        self, model: str = "denoising_ae", latent_dim: int | None = None, *, corruption: str | None = "gaussian:0.3",
        model_params: dict[str, Any] | None = None, likelihood: str | None = None, scale: str | None = None,
        sample_shape: tuple[int, ...] | None = None, max_epochs: int | None = None, batch_size: int | None = None,
        lr: float = 1e-3, device: str = "auto", random_state: Any = None, verbose: bool | int = False,
    ) -> None:  # fmt: skip
        super().__init__(
            model, latent_dim, model_params=model_params, likelihood=likelihood, scale=scale, sample_shape=sample_shape,
            max_epochs=max_epochs, batch_size=batch_size, lr=lr, device=device, random_state=random_state,
            verbose=verbose,
        )  # fmt: skip
        self.corruption = corruption

    def _settings(self) -> dict[str, Any]:
        settings = super()._settings()
        model, corruption = settings["model"], settings["corruption"]
        if corruption is not None:
            if "corruption" not in hyperparameters(model):
                raise AezooError(f"{model} is not trained on corrupted samples: give corruption=None, or denoising_ae")
            settings["model_params"] = {"corruption": corruption, **settings["model_params"]}
        return settings

    def transform(self, X: Any) -> Array:
        """Clean samples, (n_samples, n_features), in the units of X."""
        return self.reconstruct(X)


# ---- parts of a fit -------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, also within dicts and sequences."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value


def _choose(settings: dict[str, Any], X: Array) -> dict[str, Any]:
    cls, shape = model_class(settings["model"]), settings["sample_shape"] or (X.shape[1],)
    defaults = {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}
    # scaling to 1 gives 1 + 2^-52, too
    unbounded = bool((X < 0).any() or (np.finfo(np.float32).eps < X - 1).any())
    chosen: dict[str, Any] = {}
    if settings["latent_dim"] is None and "latent_dim" in defaults:
        chosen["latent_dim"] = budgets.choose_latent_dim(cls, defaults["latent_dim"], shape)
    if settings["likelihood"] is None:
        own = defaults.get("likelihood", "bernoulli")
        chosen["likelihood"] = budgets.choose_likelihood(own, shape, unbounded, settings["scale"])
    if settings["scale"] is None:
        name = {**settings, **chosen, **settings["model_params"]}["likelihood"]
        rule = budgets.choose_scale(shape, unbounded, likelihood(name).unit_interval)
        # auto does not scale values from 0 to 1, and scales others to this range
        chosen["scale"] = rule if rule != "auto" else "unit" if unbounded else "none"
    if settings["batch_size"] is None:
        chosen["batch_size"] = budgets.choose_batch_size(len(X))
    if settings["max_epochs"] is None:
        chosen["max_epochs"] = budgets.choose_max_epochs(len(X), {**settings, **chosen}["batch_size"])
    return chosen


def _build(settings: dict[str, Any], n_features: int) -> Autoencoder:
    shape = settings["sample_shape"] or (n_features,)
    if math.prod(shape) != n_features:
        raise AezooError(f"sample_shape {shape} has {math.prod(shape)} values, X has {n_features} features")
    known = hyperparameters(settings["model"])
    common: dict[str, Any] = {name: settings[name] for name in ("latent_dim", "likelihood", "lr") if name in known}
    if "tokenizer" in known:  # a prior over indices, whose tokenizer compares outputs with data
        grid = {} if len(shape) > 1 else {"net": "mlp"}
        common["tokenizer"] = {"model": "vq_vae", "likelihood": settings["likelihood"], **grid}
    try:
        # samples are float32 for any default dtype of torch
        return create_model(settings["model"], shape, **{**common, **settings["model_params"]}).float()
    except AezooError as error:
        # a hyperparameter that is not an argument of the estimator
        other = next((name for name in known if name not in common and str(error).startswith(f"{name} ")), None)
        if other is None:
            raise
        raise AezooError(f"{error}: give it in model_params={{{other!r}: ...}}") from error


def _labels(y: Any, known: Array | None) -> tuple[Array, Tensor]:
    """The classes among the labels, or the known ones, and each label's index among them; -1 without a label."""
    y = column_or_1d(y)
    check_classification_targets(y)
    given = y != -1 if np.issubdtype(y.dtype, np.number) else np.full(len(y), True)
    classes = np.unique(y[given]) if known is None else known
    unknown = np.setdiff1d(y[given], classes)
    if not len(classes) or len(unknown):
        what = (
            f"y has the label {unknown.tolist()[0]!r}, which the first fit did not have"
            if len(unknown)
            else "all labels are -1"
        )
        raise AezooError(f"{what}: give labels that the model knows, or leave out y")
    return classes, torch.from_numpy(np.where(given, np.searchsorted(classes, y), -1))


def _statistics(X: Array, scale: str) -> tuple[Array, Array]:
    """The offset and the scale of each feature; a constant feature becomes 0."""
    if scale == "none":
        return np.zeros(X.shape[1]), np.ones(X.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):  # _scaled rejects the result
        found = (StandardScaler() if scale == "standard" else MinMaxScaler()).fit(X.astype(np.float64))
    return (found.mean_, found.scale_) if scale == "standard" else (found.data_min_, 1 / found.scale_)


def _samples_of(model: Autoencoder, X: Array, offset: Array, scale: Array) -> Tensor:
    """Rows of X as the model's samples; NaN marks a missing part."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = ((X - offset) / scale).astype(np.float32)
    if not np.isfinite(scale).all() or np.isinf(scaled).any():
        raise AezooError("X contains values that are too large for float32 once scaled: clean X, or use logarithms")
    x = torch.from_numpy(scaled).reshape(len(X), *model.input_shape)
    if model.invalid_mask(x).any():
        raise AezooError(
            "rows of X contain NaN in some values of a part or in all parts: clean them; "
            "a part is missing where all its values are NaN"
        )
    return x


@contextmanager
def _no_side_effects(device: torch.device) -> Iterator[None]:
    """Print nothing, and restore the random streams of torch, NumPy and Python at the end."""
    with _ONE_AT_A_TIME, warnings.catch_warnings(), forked_rng(device):
        warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec|no `val_dataloader`|GPU).*")
        loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
        levels, of_numpy, of_python = [logger.level for logger in loggers], np.random.get_state(), random.getstate()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            np.random.set_state(of_numpy)
            random.setstate(of_python)
