"""Priors of principal components: those of `aezoo.tasks.priors` that describe t."""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from aezoo.distributions.gaussians import LOG_2PI
from aezoo.errors import AezooError, install_hint
from aezoo.tasks.priors_base import Array, Density, Seed
from aezoo.tasks.priors_riemannian import Riemannian
from aezoo.tasks.priors_vamp import Kernel
from aezoo.training.seeding import forked_rng

# components of wide codes that fitted densities describe, and the fewest codes that each Gaussian of gmm has for one
_MAX_COMPONENTS = 64
# those of riemannian, whose metric is a matrix at every position
_MAX_CURVED = 16
_CODES_PER_COMPONENT = 5
# variances below this share of the largest are rounding errors of float32 codes
_NO_VARIANCE = 1e-10
# training of a network: seconds on one core, at most a minute
_EPOCHS, _STEPS, _BATCH, _PATIENCE, _LR = 200, 4_000, 256, 20, 5e-3
# importance samples of a code's density
_DRAWS = 200


def principal(name: str, codes: Array, n_components: int, seed: int) -> "PrincipalSubspace":
    """The prior of this name, with as many principal components as it can describe.

    Args:
        name: gaussian, gmm, maf, two_stage, vamp or riemannian.
        codes: (N, D).
        n_components: Gaussians of gmm.
        seed: of random draws in the fit.
    """
    n, size = codes.shape
    if name == "gmm":
        n_components = min(n_components, n)
        size = min(size, _MAX_COMPONENTS, max(2, n // (_CODES_PER_COMPONENT * n_components)))
    elif name != "gaussian":
        size = min(size, _MAX_COMPONENTS if name != "riemannian" else _MAX_CURVED)
    return PrincipalSubspace(name, codes, size, n_components, seed)


class PrincipalSubspace:
    """z = mean + t S^1/2 V + r, see `aezoo.tasks.priors`.

    Args:
        name: gaussian, gmm, maf, two_stage, vamp or riemannian.
        codes: (N, D).
        size: most components to keep.
        n_components: Gaussians of gmm.
        seed: of random draws in the fit.

    Attributes:
        density: the distribution of t.
        components: S^1/2 V, (K, D).
    """

    def __init__(self, name: str, codes: Array, size: int, n_components: int, seed: int) -> None:
        from sklearn.decomposition import PCA

        self.mean = codes.mean(0, dtype=np.float64)
        centred = codes - self.mean
        variances, directions = np.zeros(0), np.zeros((0, codes.shape[1]))
        if np.any(centred):
            found = PCA(min(size, *codes.shape), random_state=0).fit(centred)
            kept = found.explained_variance_ > _NO_VARIANCE * found.explained_variance_[0]
            variances, directions = found.explained_variance_[kept], found.components_[kept]
        self.components = np.sqrt(variances)[:, None] * directions
        self._to_t = directions.T / np.sqrt(variances)
        t = centred @ self._to_t
        # R'R = residuals' residuals, so that r = e R / sqrt(N - 1), e ~ N(0, I), has their covariance
        factor: Any = np.linalg.qr(centred - t @ self.components, mode="r")
        self._residual_factor: Array = factor / math.sqrt(len(codes) - 1)
        self.density: Density = Normal(t.shape[1])
        if len(variances) and name == "gmm":
            self.density = Mixture(t, n_components, seed)
        elif len(variances) and name == "maf":
            self.density = Flow(t, seed)
        elif len(variances) and name == "two_stage":
            self.density = SecondStage(t, seed)
        elif len(variances) and name == "vamp":
            self.density = Kernel(t, seed)
        elif len(variances) and name == "riemannian":
            self.density = cast(Any, Riemannian(t, seed))  # its density is only known up to a constant

    def sample(self, n: int, seed: Seed) -> Array:
        rng = np.random.default_rng(seed)
        t = self.density.sample(n, rng)
        r = rng.standard_normal((n, len(self._residual_factor))) @ self._residual_factor
        return (self.mean + t @ self.components + r).astype(np.float32)

    def log_prob(self, codes: Array) -> Array:
        """Log-density of the kept components, in nats: (N, D) -> (N,)."""
        t = (codes - self.mean) @ self._to_t
        # dt/dz = S^-1/2
        return self.density.log_prob(t) - np.log(np.linalg.norm(self.components, axis=1)).sum()

    def gain(self, codes: Array) -> float:
        """Mean log-likelihood gain, in nats per code, over a Gaussian of the same mean and covariance."""
        t = (codes - self.mean) @ self._to_t
        return float((self.density.log_prob(t) - Normal(t.shape[1]).log_prob(t)).mean())


class Normal:
    """N(0, I)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        return rng.standard_normal((n, self.size))

    def log_prob(self, t: Array) -> Array:
        return np.asarray(-0.5 * (t**2 + LOG_2PI).sum(1))


class Mixture:
    """sum_k w_k N(mean_k, covariance_k), fitted by expectation maximisation."""

    def __init__(self, t: Array, n_components: int, seed: int) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        # discrete codes may repeat
        n_components = min(n_components, len(np.unique(t.round(6), axis=0)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # 500 rounds are enough
            # the added variance prevents a Gaussian from collapsing to a single code; those of t are 1
            self.mixture = GaussianMixture(n_components, reg_covar=1e-4, max_iter=500, random_state=seed).fit(t)

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        drawn = self.mixture.set_params(random_state=int(rng.integers(2**32))).sample(n)[0]
        return rng.permutation(drawn)  # they come sorted by Gaussian

    def log_prob(self, t: Array) -> Array:
        return np.asarray(self.mixture.score_samples(t))


class Flow:
    """A masked autoregressive flow.

    Its steps are affine, so for one-dimensional t it is a Gaussian.
    """

    def __init__(self, t: Array, seed: int) -> None:
        zuko = flows()
        with forked_rng(torch.device("cpu")), torch.enable_grad():
            torch.manual_seed(seed)
            data = torch.from_numpy(t).float()[torch.randperm(len(t))]
            # in two dimensions, the random orders of all steps might be the same
            flow = zuko.flows.MAF(data.shape[1], transforms=5, hidden_features=(64, 64), randperm=data.shape[1] > 2)
            _train(flow, lambda rows: -flow().log_prob(rows).mean(), data)
            self.flow = flow

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        with forked_rng(torch.device("cpu")), torch.no_grad():
            torch.manual_seed(int(rng.integers(2**32)))
            return self.flow().sample((n,)).double().numpy()

    @torch.no_grad()
    def log_prob(self, t: Array) -> Array:
        return self.flow().log_prob(torch.from_numpy(t).float()).double().numpy()


class SecondStage:
    """A VAE whose code u is as wide as t: t = g(u) + s e, u and e ~ N(0, I), s learned."""

    def __init__(self, t: Array, seed: int) -> None:
        from aezoo.models.variational.vae import VAE

        size = t.shape[1]
        with forked_rng(torch.device("cpu")), torch.enable_grad():
            torch.manual_seed(seed)
            data = torch.from_numpy(t).float()[torch.randperm(len(t))]
            self.vae = VAE((size,), latent_dim=size, hidden_dims=(128, 128), likelihood="gaussian:learned")
            _train(self.vae, lambda rows: self.vae.loss(rows)["loss"], data)

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        with forked_rng(torch.device("cpu")), torch.no_grad():
            torch.manual_seed(int(rng.integers(2**32)))
            return self.vae.likelihood.sample(self.vae.decoder(self.vae.sample_prior(n))).double().numpy()

    def log_prob(self, t: Array) -> Array:
        """By importance sampling, a lower bound on average."""
        with forked_rng(torch.device("cpu")):
            torch.manual_seed(0)
            return self.vae.log_likelihood(torch.from_numpy(t).float(), _DRAWS).double().numpy()


def _train(model: nn.Module, nll: Callable[[Tensor], Tensor], data: Tensor) -> None:
    """Train on nine tenths of the data, with early stopping on the rest, and keep the best weights."""
    held = data[: max(1, len(data) // 10)]
    data = data[len(held) :]
    optimizer = torch.optim.Adam(model.parameters(), lr=_LR)
    best, kept, waited = math.inf, copy.deepcopy(model.state_dict()), 0
    for _ in range(min(_EPOCHS, _STEPS * _BATCH // len(data) + 1)):
        for rows in torch.randperm(len(data)).split(_BATCH):
            optimizer.zero_grad()
            nll(data[rows]).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        with torch.no_grad(), forked_rng(torch.device("cpu")):
            torch.manual_seed(0)  # the same noise each time
            found = float(nll(held))
        waited += 1
        if found < best:
            best, kept, waited = found, copy.deepcopy(model.state_dict()), 0
        if waited >= _PATIENCE:
            break
    model.load_state_dict(kept)


def flows() -> Any:
    """The package zuko.

    Raises:
        AezooError: it is not installed.
    """
    try:
        import zuko
    except ImportError as error:
        raise AezooError(f"prior maf needs zuko: {install_hint('flows')}") from error
    return zuko
