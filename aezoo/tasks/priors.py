"""Priors fitted to codes, for sampling from models without a prior or with a poor one.

    gaussian    N(mean, covariance) of the codes
    gmm         mixture of Gaussians with full covariances, as Ghosh et al. 2020 fit it after training, 10 of them
                (section 4, https://arxiv.org/abs/1903.12436)
    maf         masked autoregressive flow (Papamakarios et al. 2017, https://arxiv.org/abs/1705.07057)
    two_stage   a second VAE, of codes, with its own scale of noise (Dai & Wipf 2019, section 4,
                https://arxiv.org/abs/1903.05789)
    vamp        the mean of the posteriors of training samples, the optimal prior for a VAE's bound (Tomczak & Welling
                2017, https://arxiv.org/abs/1705.07120); for codes without posteriors, kernels of one width,
                `priors_vamp`
    riemannian  uniform on the manifold of the codes, by a metric of the codes, drawn by Hamiltonian Monte Carlo
                (Chadebec et al. 2021, https://arxiv.org/abs/2105.00026), `priors_riemannian`
    sphere      mixture of von Mises-Fisher distributions, for unit vectors, `priors_sphere`
    poincare    mixture of Gaussians in normal coordinates, for codes in a Poincare ball, `priors_poincare`
    knn         z = a + u (b - a), u ~ U(0, 1), a any code, b one of its k nearest neighbours: SMOTE (Chawla et al.
                2002, https://doi.org/10.1613/jair.953)

Codes are vectors, (N, D): a feature map is one vector of all its channels and places, which are drawn together.

Those up to riemannian describe t, the code's principal components scaled to variance 1. The remainder outside these
components is Gaussian, with the covariance of the codes; for codes of few dimensions there is no remainder:

    z = mean + t S^1/2 V + r        S, V: variances and directions of the components kept; r: Gaussian, orthogonal to V
"""

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aezoo.distributions.gaussians import LOG_2PI
from aezoo.errors import AezooError
from aezoo.training.seeding import forked_rng

Array = npt.NDArray[Any]
Seed = int | np.random.Generator

OF_ANY_CODE = ("gaussian", "gmm", "maf", "knn", "two_stage", "vamp", "riemannian")
NAMES = (*OF_ANY_CODE, "sphere", "poincare")
# components of wide codes that fitted densities describe, and the fewest codes that each Gaussian of gmm has for one
_MOST_COMPONENTS = 64
# those of riemannian, whose metric is a matrix at every place
_MOST_CURVED = 16
_CODES_EACH = 5
# variances below this share of the largest are rounding errors of float32 codes
_NO_VARIANCE = 1e-10
# training of a network: seconds on one core, at most a minute
_EPOCHS, _STEPS, _BATCH, _PATIENCE, _LR = 200, 4_000, 256, 20, 5e-3
# importance samples of a code's density
_DRAWS = 200


class Prior(Protocol):
    """A distribution of codes."""

    def sample(self, n: int, seed: Seed) -> Array:
        """Draw n codes, (n, D) float32; advances the generator."""
        ...


class Density(Protocol):
    """A distribution of t, (N, K)."""

    def sample(self, n: int, rng: np.random.Generator) -> Array:
        """Draw n of t, (n, K)."""
        ...

    def log_prob(self, t: Array) -> Array:
        """Log-density of each, in nats."""
        ...


def fit(
    name: str,
    codes: Array,
    *,
    n_components: int = 10,
    n_neighbours: int = 5,
    radius: float = math.inf,
    log_vars: Array | None = None,
    seed: int = 0,
) -> Prior:
    """Fit a prior to codes.

    Args:
        name: one of `NAMES`.
        codes: (N, D), at least two.
        n_components: distributions in the mixtures of gmm, sphere and poincare.
        n_neighbours: neighbours that knn chooses from.
        radius: radius of the ball of codes, for poincare.
        log_vars: (N, D), for vamp, of the Gaussian posteriors with the codes as means; None without posteriors.
        seed: of random draws in the fit.

    Raises:
        AezooError: an unknown name, fewer than two codes, or codes that are not finite or outside the prior's support.
    """
    if name not in NAMES:
        raise AezooError(f"unknown prior {name!r}: take one of {', '.join(NAMES)}")
    if len(codes) < 2:
        raise AezooError(f"a prior is fitted to at least 2 codes, got {len(codes)}: give more samples as fit_on")
    if n_components < 1 or n_neighbours < 1:
        raise AezooError(f"n_components and n_neighbours must be at least 1, got {n_components} and {n_neighbours}")
    if not np.isfinite(codes).all():
        raise AezooError("some codes are NaN or infinite: the model is broken, train it again with a lower rate")
    if name == "knn":
        return Neighbours(codes, n_neighbours)
    if name == "vamp" and log_vars is not None:
        from aezoo.tasks.priors_vamp import Posteriors

        return Posteriors(codes, log_vars)
    if name == "sphere":
        from aezoo.tasks.priors_sphere import Sphere

        return Sphere(codes, n_components, seed)
    if name == "poincare":
        from aezoo.tasks.priors_poincare import Poincare

        return Poincare(codes, n_components, seed, radius)
    n, size = codes.shape
    if name == "gmm":
        n_components = min(n_components, n)
        size = min(size, _MOST_COMPONENTS, max(2, n // (_CODES_EACH * n_components)))
    elif name != "gaussian":
        size = min(size, _MOST_COMPONENTS if name != "riemannian" else _MOST_CURVED)
    return Principal(name, codes, size, n_components, seed)


class Principal:
    """z = mean + t S^1/2 V + r, see above.

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
            from aezoo.tasks.priors_vamp import Kernel

            self.density = Kernel(t, seed)
        elif len(variances) and name == "riemannian":
            from aezoo.tasks.priors_riemannian import Riemannian

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
            warnings.simplefilter("ignore", ConvergenceWarning)  # a fit that still improves after 500 rounds will do
            # the variance added keeps a Gaussian from collapsing to a single code; those of t are 1
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
        raise AezooError("prior maf needs zuko: pip install 'aezoo[flows]'") from error
    return zuko


class Neighbours:
    """z = a + u (b - a), see above.

    Args:
        codes: (N, D).
        k: neighbours that b is chosen from.
    """

    def __init__(self, codes: Array, k: int) -> None:
        from sklearn.neighbors import NearestNeighbors

        self.codes = codes.astype(np.float64)
        self.k = min(k, len(codes) - 1)
        self._search = NearestNeighbors(n_neighbors=self.k + 1).fit(self.codes)

    def sample(self, n: int, seed: Seed) -> Array:
        rng = np.random.default_rng(seed)
        a = rng.integers(len(self.codes), size=n)
        near = self._search.kneighbors(self.codes[a], return_distance=False)
        # a itself is among them, unless k others equal it
        others = np.stack([line[line != row][: self.k] for line, row in zip(near, a, strict=True)])
        b = others[np.arange(n), rng.integers(self.k, size=n)]
        u = rng.random((n, 1))
        return (self.codes[a] + u * (self.codes[b] - self.codes[a])).astype(np.float32)
