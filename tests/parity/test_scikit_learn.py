"""Principal components, mixtures, kernels, matching pursuit, networks and one-class machines of scikit-learn.

Source: https://github.com/scikit-learn/scikit-learn (Pedregosa et al. 2011)
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from comparison import noise
from sklearn.decomposition import PCA
from sklearn.gaussian_process.kernels import RationalQuadratic
from sklearn.linear_model import orthogonal_mp
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.mixture import GaussianMixture
from sklearn.mixture._gaussian_mixture import _compute_precision_cholesky, _estimate_gaussian_parameters
from sklearn.neural_network import MLPRegressor
from sklearn.svm import OneClassSVM
from torch import Tensor

import aezoo


def data(n: int, d: int) -> Tensor:
    return torch.randn(n, d) @ torch.randn(d, d) / d + torch.rand(d)


# ---- principal components --------------------------------------------------------------------------------------------


def test_linear_model_at_the_principal_components(compare):
    n, d, k = 30, 6, 2
    x = data(n, d)
    pca, model = PCA(k).fit(x.numpy()), aezoo.create_model("linear_ae", (d,), latent_dim=k).double()
    components, mean = torch.from_numpy(pca.components_), torch.from_numpy(pca.mean_)
    with torch.no_grad():
        model.encoder[1].weight.copy_(components)
        model.encoder[1].bias.copy_(-components @ mean)
        model.decoder[0].weight.copy_(components.T)
        model.decoder[0].bias.copy_(mean)
    codes = pca.transform(x.numpy())
    back = pca.inverse_transform(codes)
    loss = model.loss(x)["loss"]
    row = compare("linear_ae", "scikit-learn", "decomposition.PCA")
    row.equal("codes", model.encode(x), codes)
    row.equal("reconstructions", model(x), back)
    row.equal("loss", loss, np.square(x.numpy() - back).sum(1).mean() + d / 2 * math.log(math.pi))
    # its gradient is 0
    gradients = torch.autograd.grad(loss, [*model.parameters()])
    row.equal("1 + size of the gradient at the optimum", 1 + sum(g.abs().sum() for g in gradients), torch.tensor(1.0))


def test_probabilistic_principal_components(compare):
    n, d, k = 30, 6, 2
    x = data(n, d)
    pca = PCA(k).fit(x.numpy())
    noise_std = math.sqrt(pca.noise_variance_)
    model = aezoo.create_model("vae", (d,), latent_dim=k, hidden_dims=(), likelihood=f"gaussian:{noise_std!r}").double()
    # Tipping & Bishop 1999: the maximum likelihood with orthogonal axes, whose posterior is diagonal
    axes = torch.from_numpy(pca.components_.T * np.sqrt(pca.explained_variance_ - pca.noise_variance_))
    mean, inverse = torch.from_numpy(pca.mean_), torch.from_numpy(1 / pca.explained_variance_)
    with torch.no_grad():
        weights = {p.shape: p for p in model.parameters()}
        weights[d, k].copy_(axes)
        weights[d,].copy_(mean)
        weights[2 * k, d].copy_(torch.cat([inverse[:, None] * axes.T, torch.zeros(k, d)]))
        log_var = torch.log(pca.noise_variance_ * inverse)
        weights[2 * k,].copy_(torch.cat([-inverse * (axes.T @ mean), log_var]))
    expected, eps = pca.score_samples(x.numpy()), torch.randn(3, n, k)
    row = compare("vae", "scikit-learn", "decomposition.PCA")
    with noise([eps]):
        # all weights are equal, since the posterior is exact
        row.equal("log_likelihood", model.log_likelihood(x, 3), expected)
    signs = torch.randn(n, k).sign()
    losses = []
    for draw in (signs, -signs):
        with noise([draw]):
            losses.append(model.loss(x)["loss"])
    # for a quadratic function with orthogonal axes, the mean over noise of both signs is that over N(0, I)
    row.equal("loss", sum(losses) / 2, -expected.mean())
    gradients = torch.autograd.grad(sum(losses), [*model.encoder.parameters()])
    row.equal("1 + size of the gradient at the optimum", 1 + sum(g.abs().sum() for g in gradients), torch.tensor(1.0))


# ---- mixtures --------------------------------------------------------------------------------------------------------


def fitted(kind: str, weights: Tensor, means: Tensor, covariances: Tensor) -> GaussianMixture:
    mixture = GaussianMixture(len(weights), covariance_type=kind)
    mixture.weights_, mixture.means_ = weights.numpy(), means.numpy()
    mixture.covariances_ = covariances.numpy()
    mixture.precisions_cholesky_ = _compute_precision_cholesky(mixture.covariances_, kind)
    return mixture


@pytest.mark.parametrize("name", ["mixture_vae", "vamp_vae"])
def test_mixtures_as_priors(compare, name):
    d, k = 3, 4
    model = aezoo.create_model(name, (6,), latent_dim=d, hidden_dims=(5,), n_components=k).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    z = torch.randn(9, d)
    log_w, means, log_vars = (part.detach() for part in model.mixture())
    theirs = fitted("diag", log_w.exp(), means, log_vars.exp())
    row = compare(name, "scikit-learn", "mixture.GaussianMixture")
    row.equal("log-density of the prior", model.log_prior(z), theirs.score_samples(z.numpy()))
    shares = model.log_joint(z, torch.zeros_like(z)).softmax(1)
    row.equal("responsibilities", shares, theirs.predict_proba(z.numpy()))


def test_mixture_of_codes_and_errors(compare):
    n, d, k = 20, 2, 3
    model = aezoo.create_model("dagmm", (6,), latent_dim=d, hidden_dims=(5,), n_components=k, dropout=0.0).double()
    z = torch.randn(n, d + 2)
    gamma = model.estimation(z).softmax(1)
    phi, mu, sigma = (part.detach() for part in model.mixture(z))
    totals, means, covariances = _estimate_gaussian_parameters(z.numpy(), gamma.detach().numpy(), 0.0, "full")
    row = compare("dagmm", "scikit-learn", "mixture.GaussianMixture")
    row.equal("phi", phi, totals / n)
    row.equal("mu", mu, means)
    row.equal("Sigma", sigma, covariances)
    theirs = fitted("full", phi, mu, sigma + 1e-6 * torch.eye(d + 2))
    row.equal("energy", model.energy(z, phi, mu, sigma), -theirs.score_samples(z.numpy()))


# ---- kernels ---------------------------------------------------------------------------------------------------------


def discrepancy(kernel: Any, a: np.ndarray, b: np.ndarray, unbiased: bool) -> float:
    """Gretton et al. 2012, equations 3 and 5."""
    n = len(a)
    own = [kernel(x, x) for x in (a, b)]
    means = [(k.sum() - np.trace(k)) / (n * (n - 1)) if unbiased else k.mean() for k in own]
    return sum(means) - 2 * kernel(a, b).mean()


def kernel_of(kind: str, c: float) -> Any:
    if kind == "rbf":
        return lambda a, b: rbf_kernel(a, b, gamma=1 / c)
    return RationalQuadratic(alpha=1.0, length_scale=math.sqrt(c / 2))


@pytest.mark.parametrize("kind", ["inverse_multiquadratic", "rbf"])
@pytest.mark.parametrize("name", ["wae_mmd", "wae_mmd, V-statistic", "info_vae"])
def test_discrepancies(compare, name, kind):
    name, _, biased = name.partition(", ")
    n, d = 9, 3
    settings = {"unbiased": not biased} if name == "wae_mmd" else {"bandwidth": 0.7}
    model = aezoo.create_model(name, (6,), latent_dim=d, hidden_dims=(5,), kernel=kind, **settings).double()
    codes, prior = torch.randn(n, d) + 0.5, torch.randn(n, d)
    if name == "wae_mmd":
        kernels = [kernel_of(kind, 2 * d * s) for s in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)]
    else:
        kernels = [kernel_of(kind, 2 * d * 0.7**2)]
    unbiased = name == "wae_mmd" and not biased
    expected = sum(discrepancy(kernel, codes.numpy(), prior.numpy(), unbiased) for kernel in kernels)
    part = "metrics.pairwise.rbf_kernel" if kind == "rbf" else "gaussian_process.kernels.RationalQuadratic"
    row = compare(name, "scikit-learn", part)
    row.equal(f"mmd{', V-statistic' if biased else ''}", model.mmd(codes, prior), np.float64(expected))


# ---- sparse codes ----------------------------------------------------------------------------------------------------


def test_orthogonal_matching_pursuit(compare):
    n, d, latents, k = 12, 8, 20, 4
    model = aezoo.create_model("omp_sae", (d,), latent_dim=latents, k=k).double()
    with torch.no_grad():
        model.decoder.b_X.copy_(0.3 * torch.randn(d))
    x = torch.randn(n, d)
    dictionary = model.decoder.W_NX.detach().T.numpy()
    shift = model.decoder.b_X.detach().numpy()
    expected = orthogonal_mp(dictionary, (x.numpy() - shift).T, n_nonzero_coefs=k).T
    row = compare("omp_sae", "scikit-learn", "linear_model.orthogonal_mp")
    row.equal("codes", model.encode(x), expected)
    back = expected @ dictionary.T + shift
    row.equal("reconstructions", model(x), back)
    loss = np.square(x.numpy() - back).sum(1).mean() + d / 2 * math.log(math.pi)
    row.equal("loss", model.loss(x)["nll"], np.float64(loss))


# ---- networks --------------------------------------------------------------------------------------------------------


NETWORKS = [
    ("dense_ae", "relu", {"hidden_dims": (4,), "code_activation": "relu"}),
    ("dense_ae", "tanh", {"hidden_dims": (4,), "code_activation": "tanh"}),
    ("linear_ae", "identity", {}),
    ("denoising_ae", "identity", {"hidden_dims": (4,)}),
]


class Shrink(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x + 0.1


@pytest.mark.parametrize(("name", "activation", "settings"), NETWORKS)
def test_networks_as_regressions(compare, name, activation, settings):
    n, d, code = 7, 5, 2
    if name != "linear_ae":
        settings = settings | {"activation": activation}
    model = aezoo.create_model(name, (d,), latent_dim=code, likelihood="gaussian", **settings).double()
    x = torch.randn(n, d)
    seen = x
    if name == "denoising_ae":
        model.corruption = Shrink()
        seen = model.corruption(x)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    widths = tuple(m.out_features for m in linears[:-1])
    lr = 1e-3
    descent = {"solver": "sgd", "momentum": 0.0, "learning_rate_init": lr, "alpha": 0.0, "batch_size": n}
    theirs = MLPRegressor(hidden_layer_sizes=widths, activation=activation, **descent)
    theirs.partial_fit(seen.numpy(), x.numpy())
    before = [m.weight.detach().numpy().T.copy() for m in linears], [m.bias.detach().numpy().copy() for m in linears]
    theirs.coefs_, theirs.intercepts_ = ([part.copy() for part in parts] for parts in before)
    back = theirs.predict(seen.numpy())
    found = model.loss(x)["loss"]
    row = compare(name, "scikit-learn", "neural_network.MLPRegressor")
    row.equal("reconstructions", model(seen), back)
    theirs.partial_fit(seen.numpy(), x.numpy())
    reason = "theirs is half the mean squared error, ours the sum over a sample's values"
    constant = d / 2 * math.log(math.pi)
    row.scaled("loss without its constant", found - constant, np.float64(theirs.loss_), 2 * d, reason)
    # the gradient of one step of gradient descent, which is that of the sum, unlike the value
    pairs, surrogate = [], torch.zeros(())
    for part, now, was in (("weight", theirs.coefs_, before[0]), ("bias", theirs.intercepts_, before[1])):
        for new, old, layer in zip(now, was, linears, strict=True):
            leaf, gradient = (torch.from_numpy(np.ascontiguousarray(v.T)) for v in (old, (old - new) / lr))
            surrogate = surrogate + (leaf.requires_grad_(True) * gradient).sum()
            pairs.append((getattr(layer, part), leaf))
    row.equal_gradients(found, surrogate, pairs, scale=2, reason="theirs is of half the squared error")


# ---- one-class machines ----------------------------------------------------------------------------------------------


def test_one_class_machine(compare):
    n, d, nu = 40, 2, 0.25
    model = aezoo.create_model("ae1svm", (6,), latent_dim=d, hidden_dims=(5,), nu=nu, n_frequencies=8).double()
    x = torch.rand(n, 6)
    phi = model.features(model.encode(x)).detach().numpy()
    theirs = OneClassSVM(kernel="linear", nu=nu, tol=1e-12).fit(phi)
    # libsvm's multipliers sum to nu n, those of the paper's problem to 1
    scale = nu * n
    with torch.no_grad():
        model.w_F.copy_(torch.from_numpy(theirs.coef_[0] / scale))
        model.rho.fill_(float(theirs.offset_[0]) / scale)
    found = model.loss(x)
    row = compare("ae1svm", "scikit-learn", "svm.OneClassSVM")
    # strong duality: the optimal objective equals that of the dual problem
    dual = -0.5 * np.square(theirs.coef_[0] / scale).sum()
    row.equal("svm at its optimum", found["svm"], dual)
    reason = "libsvm's multipliers sum to nu times the number of samples, the paper's to 1"
    row.scaled("score", model.score(x), theirs.decision_function(phi), -1 / scale, reason)
