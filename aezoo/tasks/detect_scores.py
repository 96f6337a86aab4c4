"""Anomaly scores of a trained model, larger is more anomalous.

x_hat is the reconstruction of x, z its code:

    deviance     the model's `anomaly_score`: for most -log p(x | z) less that of a perfect reconstruction, for
                 variational models with the KL, for detectors their criterion
    nll          the model's `score`, for most -log p(x | z), which with a Bernoulli likelihood is smallest for black
                 and white values, for any reconstruction
    mse          ||x - x_hat||^2 / D
    elbo         -ELBO(x), the mean over draws of the code, for models whose loss has an ELBO
    iwae         -log p(x), importance-sampled (Burda et al. 2015, https://arxiv.org/abs/1509.00519)
    mahalanobis  (z - mu)' C^-1 (z - mu), with mean and covariance of the training codes
    sap, nap     the difference of x and x_hat in all layers of the encoder
                 (RaPP, Kim et al. 2020, https://openreview.net/forum?id=HkgeGeBYDB):
                     d(x) = [h_0(x) - h_0(x_hat), ..., h_l(x) - h_l(x_hat)]     h_0(x) = x
                     SAP(x) = ||d(x)||^2
                     NAP(x) = ||(d(x) - mu)' V S^-1||^2     U S V' = the training rows d(x_i) - mu
    combined     tails, error, distance of the code and isolation in one, see `aezoo.tasks.detect_combined`
    deep_svdd    ||f(x) - c||^2 for a copy f of the encoder, fine-tuned on the training samples, see detect_deep_svdd

NAP is the Mahalanobis distance of d(x) divided by n - 1, so one class, `Mahalanobis`, computes both. The paper has more
training samples than features; with fewer, directions without training variance dominate, see there.

Shapes: B batch, N training samples, M features, R directions in which training samples vary.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aezoo.autoencoder import Autoencoder, at_least_float32
from aezoo.errors import AezooError
from aezoo.tasks.detect_combined import CombinedScore
from aezoo.tasks.detect_deep_svdd import DeepSVDDScorer, SVDDSettings
from aezoo.training.model_names import display_name

Scores = npt.NDArray[np.float64]

SCORES = ("deviance", "nll", "mse", "elbo", "iwae", "mahalanobis", "sap", "nap", "combined", "deep_svdd")
# a matrix of this many rows and columns takes 128 MiB, its eigenvectors half a minute of one core
_MAX_FEATURES = 2**12
# features of training samples, and values of copies of a sample, in memory at a time: at most 512 MiB
_MAX_VALUES = 2**26


class Scorer(Protocol):
    """One score of a model."""

    @property
    def state(self) -> dict[str, Tensor]:
        """What `fit` has found, tensors by name, enough for `restore`; empty for a score that learns nothing."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `fit` has found earlier; a state of another model may raise anything, or when it is used."""
        ...

    def max_samples(self, x: Tensor) -> int | None:
        """The most training samples that it can use, given one of them, (1, *shape); None without limit."""
        ...

    def fit(self, batches: Iterable[Tensor], n: int) -> None:
        """Fit to n training samples, batches (B, *shape) on the model's device."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Scores of a batch, (B, *shape) -> (B,)."""
        ...

    def leave_one_out(self, scores: Scores) -> Scores:
        """Scores of the samples it was fitted on, as if each had been left out of the fit."""
        ...


def scorer(model: Autoencoder, name: str, n_draws: int, tuning: SVDDSettings | None = None, title: str = "") -> Scorer:
    """A score by its name.

    Args:
        model: in evaluation mode whenever the scorer is used.
        name: one of `SCORES`.
        n_draws: draws of the code for each sample, of elbo and iwae.
        tuning: of deep_svdd.
        title: of a bar for long training; empty shows none.

    Raises:
        AezooError: an unknown score, or one that this model does not have.
    """
    kind = display_name(type(model))
    if name in ("sap", "nap", "deep_svdd") and not hasattr(model, "encoder"):
        raise AezooError(f"{name} reads the layers of the encoder, and {kind} sets none: set self.encoder in its "
                         "constructor, or use nll, mse or mahalanobis")  # fmt: skip
    match name:
        case "deviance":
            return FunctionScorer(model.anomaly_score)
        case "nll":
            return FunctionScorer(model.score)
        case "mse":
            return FunctionScorer(lambda x: (model(x) - x).square().flatten(1).mean(1))
        case "elbo":
            return FunctionScorer(partial(_negative_elbo, model, n_draws))
        case "iwae":
            log_likelihood = getattr(model, "log_likelihood", None)
            if log_likelihood is None:
                raise AezooError(
                    f"iwae needs a model with a log_likelihood, such as vae, not {kind}: use deviance or nap"
                )
            return FunctionScorer(lambda x: -log_likelihood(x, n_draws))
        case "mahalanobis":
            return Mahalanobis(lambda x: model.encode(x).flatten(1), "mahalanobis")
        case "sap":
            return FunctionScorer(lambda x: pathway(model, x).square().sum(1))
        case "nap":
            return Mahalanobis(partial(pathway, model), "nap")
        case "combined":
            return CombinedScore(model)
        case "deep_svdd":
            return DeepSVDDScorer(model, tuning or SVDDSettings(), title)
    raise AezooError(f"unknown score {name!r}: choose from {', '.join(SCORES)}")


def describe_deviance(model: Autoencoder, x: Tensor) -> str:
    """What `deviance` is for a model, in words, found on some samples (B, *shape)."""
    found = []
    for score in (model.score, model.anomaly_score):
        torch.manual_seed(0)  # some models draw a code
        found.append(score(x))
    if torch.equal(*found):
        return "deviance: here the model's own score, unchanged"
    return f"deviance: the model's score minus -log p of a perfect reconstruction ({type(model.likelihood).__name__})"


class FunctionScorer:
    """A score that needs no training samples.

    Args:
        function: (B, *shape) -> (B,).
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self._function = function
        self.state: dict[str, Tensor] = {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Do nothing."""

    def max_samples(self, x: Tensor) -> int | None:
        return None

    def fit(self, batches: Iterable[Tensor], n: int) -> None:
        """Do nothing."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._function(x)

    def leave_one_out(self, scores: Scores) -> Scores:
        return scores


class Mahalanobis:
    """Squared distance of features from their training mean, in units of their training spread.

    With the singular values s and right singular vectors V of the centred training features,

        h(f) = ||(f - mu)' V S^-1||^2

    is the distance in units of their sum of squares, as in nap, and (n - 1) h(f) that in units of their covariance.
    Directions without training variance have s = 0; s^2 is then replaced by 1e-10 of the mean s^2, which float32
    rounding may reach, so that they count much, but not infinitely.

    Args:
        features: (B, *shape) -> (B, M).
        name: mahalanobis, in units of the covariance, or nap, in units of the sum of squares.
    """

    def __init__(self, features: Callable[[Tensor], Tensor], name: str) -> None:
        self._features, self._name = features, name
        self.state: dict[str, Tensor] = {}

    def max_samples(self, x: Tensor) -> int | None:
        m = self._features(x).shape[1]
        return None if m <= _MAX_FEATURES else max(2, min(_MAX_FEATURES // 2, _MAX_VALUES // m))

    def fit(self, batches: Iterable[Tensor], n: int) -> None:
        features = (self._features(x).cpu().double() for x in batches)
        first_BM = next(features)
        m = first_BM.shape[1]
        if n <= m + 1:
            self._keep(n, *self._fit_rows(torch.cat([first_BM, *features])))
            return
        # sums around a point near the data, since sums around 0 cancel
        origin_M, sum_M, squares_MM = first_BM.mean(0), first_BM.new_zeros(m), first_BM.new_zeros(m, m)
        for f_BM in chain([first_BM], features):
            f_BM = f_BM - origin_M
            sum_M += f_BM.sum(0)
            squares_MM.addmm_(f_BM.T, f_BM)
        mean_M = origin_M + sum_M / n
        # sum_i (f_i - mu)(f_i - mu)' = V S^2 V'
        squares_MM -= torch.outer(sum_M, sum_M) / n
        s2_M, V_MM = torch.linalg.eigh(squares_MM)
        s2_M = s2_M.clamp(min=0)
        self._slack_N: npt.NDArray[np.float64] | None = None
        self._keep(n, mean_M, V_MM, s2_M, 1e-10 * float(s2_M.mean()) or 1e-10)

    def _keep(self, n: int, mean_M: Tensor, V_MR: Tensor, s2_R: Tensor, floor: float) -> None:
        numbers = {"n": torch.tensor(n), "floor": torch.tensor(floor, dtype=torch.float64)}
        # contiguous, as when it is read from a file: with another layout, rounding differs
        self.restore({"mean": mean_M, "directions": V_MR.contiguous(), "squares": s2_R, **numbers})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.state = dict(state)
        self._mean_M, self._V_MR, self._s2_R = (state[key].double() for key in ("mean", "directions", "squares"))
        self._n, self._floor = int(state["n"]), float(state["floor"])
        self._scale = max(self._n - 1, 1) if self._name == "mahalanobis" else 1

    def _fit_rows(self, f_NM: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
        """The same from the eigenvectors U of the small matrix of inner products, V = F' U S^-1."""
        n, m = f_NM.shape
        mean_M = f_NM.mean(0)
        f_NM -= mean_M
        products_NN = f_NM @ f_NM.T
        total = float(products_NN.trace())
        floor = 1e-10 * total / m or 1e-10
        # centring leaves (1, ..., 1) without spread: made the largest, it does not mix with the others, and goes
        s2_N, U_NN = torch.linalg.eigh(products_NN + 2 * total / n)
        s2_R, U_NR = s2_N[:-1].clamp(min=0), U_NN[:, :-1]
        # 1 - 1/n - h of each sample, which is so small here that the difference would be nothing but rounding
        self._slack_N = (floor * (U_NR**2 / (s2_R + floor)).sum(1)).numpy()
        seen = s2_R > floor
        return mean_M, f_NM.T @ (U_NR[:, seen] / s2_R[seen].sqrt()), s2_R[seen], floor

    def __call__(self, x: Tensor) -> Tensor:
        centred_BM = self._features(x).cpu().double() - self._mean_M
        along_BR = centred_BM @ self._V_MR
        h_B = (along_BR**2 / (self._s2_R + self._floor)).sum(1)
        if len(self._s2_R) < len(self._mean_M):
            h_B += (centred_BM.square().sum(1) - along_BR.square().sum(1)).clamp(min=0) / self._floor
        return self._scale * h_B

    def leave_one_out(self, scores: Scores) -> Scores:
        """By the formula of Sherman and Morrison, without n fits.

        Without sample i the mean moves away from it by the factor n / (n - 1), and the sum of squares loses
        n / (n - 1) (f_i - mu)(f_i - mu)'. So a squared distance h, in units of the sum of squares, becomes
        n / (n - 1) h / (1 - 1/n - h). In many dimensions that is far from h, and most new samples would be above a
        threshold on h.
        """
        n, h = self._n, scores / self._scale
        if n < 2:
            return scores
        slack = 1 - 1 / n - h if self._slack_N is None else self._slack_N
        left = n / (n - 1) * h / np.maximum(slack, np.finfo(np.float64).tiny)
        # the covariance of n - 1 samples is their sum of squares divided by n - 2
        return left * (max(n - 2, 1) if self._name == "mahalanobis" else 1)


def _negative_elbo(model: Autoencoder, n_draws: int, x: Tensor) -> Tensor:
    """-ELBO of each sample: `loss` gives means over a batch, so n_draws copies of each sample are a separate batch."""
    most = max(1, _MAX_VALUES // x[0].numel())
    scores = at_least_float32(x).new_zeros(len(x))
    for i, sample in enumerate(x):
        for start in range(0, n_draws, most):
            n = min(most, n_draws - start)
            terms = model.loss(sample.expand(n, *sample.shape))
            if "elbo" not in terms:
                raise AezooError(
                    "elbo needs a model whose loss has an ELBO, such as vae, not "
                    f"{display_name(type(model))}: use deviance, mahalanobis, sap or nap"
                )
            scores[i] -= terms["elbo"] * n / n_draws
    return scores


def pathway(model: Autoencoder, x: Tensor) -> Tensor:
    """d(x), how far x and its reconstruction are apart in each layer of the encoder, (B, *shape) -> (B, M)."""
    pairs = zip(hidden_activations(model, x), hidden_activations(model, model(x)), strict=True)
    return torch.cat([(h.float() - h_hat.float()).flatten(1) for h, h_hat in pairs], dim=1)


def hidden_activations(model: Autoencoder, x: Tensor) -> list[Tensor]:
    """h_0(x) = x, the output of each layer of the encoder, and the code; activations count to the layer before them."""
    layers: list[Tensor] = []

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.shape[0] != x.shape[0]:  # len would fix the batch size of a graph
            return  # a model that infers the label of a sample first encodes the sample with every label
        if next(module.parameters(), None) is not None:
            layers.append(output)
        elif layers:
            layers[-1] = output

    handles = [module.register_forward_hook(keep) for module in _modules(model.encoder)]
    try:
        code = model.encode(x)
    finally:
        for handle in handles:
            handle.remove()
    # the last layer's output is the code, or the posterior's parameters, from which the code is taken
    return [x, *layers[:-1], code]


def _modules(encoder: nn.Module) -> list[nn.Module]:
    """The modules that an encoder runs one after the other; a residual block counts as one."""
    found: list[nn.Module] = []
    for child in encoder.children():
        found += _modules(child) if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
    return found or [encoder]
