"""Laws of the variational autoencoder (Kingma & Welling 2013)."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from missing_modality_laws import (  # noqa: F401
    test_models_without_missing_support_suggest_others,
)
from sklearn.decomposition import PCA
from torch import Tensor

import aezoo
from aezoo.models.variational.vae import VAE

# log-likelihood in nats per image of probabilistic PCA on Fashion-MNIST / 255: latent size -> train, test
FASHION_PPCA = {8: (284.16, 285.37), 16: (370.50, 370.27)}


def linear_vae(input_shape: tuple[int, ...], k: int) -> Any:
    return aezoo.create_model(
        "vae", input_shape=input_shape, latent_dim=k, hidden_dims=(), likelihood="gaussian:learned"
    )


def small(**settings: Any) -> Any:
    return aezoo.create_model("vae", input_shape=(2, 3, 3), latent_dim=5, hidden_dims=(16,), **settings).double()


def exact(model: Any, x: Tensor) -> Tensor:
    """Log-density of x under a linear decoder: x ~ N(c, W W' + s^2 I), by torch.distributions in float64."""
    W, c = model.decoder[1].weight.detach().double(), model.decoder[1].bias.detach().double()
    variance = (2 * model.likelihood.log_scale.detach().double()).exp().expand(len(c))
    return D.LowRankMultivariateNormal(c, W, variance).log_prob(x.double().flatten(1))


def elbo(model: Any, x: Tensor, draws: int) -> Tensor:
    """The bound averaged over draws, in evaluation."""
    with torch.no_grad():
        return torch.stack([model.loss(x)["elbo"] for _ in range(draws)]).mean()


# ---- probabilistic PCA: Tipping & Bishop 1999, Lucas et al. 2019 -----------------------------------------------------


def ppca(train: Tensor, k: int, spectrum: Any, x: Tensor) -> float:
    """Mean log-likelihood of x under the maximum likelihood fit to train, in closed form."""
    mean, values, vectors = spectrum(train)
    noise = values[k:].mean()
    variances = np.r_[values[:k], np.full(len(values) - k, noise)]
    z = (x.flatten(1).double().numpy() - mean) @ vectors
    return float(-0.5 * (len(values) * np.log(2 * np.pi) + np.log(variances).sum() + (z**2 / variances).sum(1).mean()))


def assert_reaches_ppca(model: Any, train: Tensor, test: Tensor, k: int, spectrum: Any) -> tuple[float, float, float]:
    """Gaps in nats to the optimum on train and test, and of the ELBO to log p(x); the optimum is never exceeded."""
    gap = ppca(train, k, spectrum, train) - exact(model, train).mean().item()
    assert -1e-3 < gap < 1
    test_gap = ppca(train, k, spectrum, test) - exact(model, test).mean().item()
    assert abs(test_gap) < 1
    top = exact(model, train).mean().item()
    slack = top - elbo(model, train, 8).item()
    assert -0.1 < slack < 2
    some = train[:256]
    tight = exact(model, some).mean().item() - model.log_likelihood(some, 500).mean().item()
    assert tight == pytest.approx(0, abs=0.25)
    return gap, test_gap, slack


@pytest.fixture(scope="module")
def digits_vae(digits: Tensor, adam: Any) -> Any:
    torch.manual_seed(0)
    model = linear_vae((1, 8, 8), 8)
    adam(model, digits[:1437].float(), steps=2500, lr=1e-2, batch=512)
    return model


@pytest.mark.slow
def test_a_linear_vae_is_probabilistic_pca_on_digits(digits_vae: Any, digits: Tensor, spectrum: Any) -> None:
    train, test = digits[:1437].float(), digits[1437:].float()
    # scikit-learn estimates the variances with N - 1
    assert ppca(train, 8, spectrum, test) == pytest.approx(
        PCA(8).fit(train.flatten(1).double().numpy()).score(test.flatten(1).double().numpy()), abs=0.1
    )
    assert_reaches_ppca(digits_vae, train, test, 8, spectrum)


@pytest.mark.slow
def test_a_linear_vae_is_probabilistic_pca_on_mnist(mnist5k: Tensor, spectrum: Any, centred: Any, adam: Any) -> None:
    x = mnist5k.float()
    train, test = x[:3500], x[3500:]
    model = centred(linear_vae((1, 28, 28), 6), train)
    adam(model, train, steps=1500, lr=1e-2, batch=256)
    assert_reaches_ppca(model, train, test, 6, spectrum)


@pytest.mark.slow
def test_a_linear_vae_is_probabilistic_pca_on_fashion_mnist(
    fashion_mnist: Any, spectrum: Any, centred: Any, adam: Any
) -> None:
    train, test = fashion_mnist
    assert (len(train), len(test)) == (60_000, 10_000)
    found = spectrum(train)
    for k, (of_train, of_test) in FASHION_PPCA.items():
        assert ppca(train, k, lambda _: found, train) == pytest.approx(of_train, abs=6e-3)
        assert ppca(train, k, lambda _: found, test) == pytest.approx(of_test, abs=6e-3)
    model = centred(linear_vae((1, 28, 28), 8), train)
    adam(model, train, steps=3000, lr=1e-2, batch=512)
    assert_reaches_ppca(model, train, test, 8, lambda _: found)


# ---- bounds: Burda et al. 2015 ---------------------------------------------------------------------------------------


def bounds(model: Any, x: Tensor, ks: tuple[int, ...], rows: int) -> list[float]:
    """The importance-weighted bounds, each averaged over the same number of draws."""
    return [torch.stack([model.log_likelihood(x, k).mean() for _ in range(rows // k)]).mean().item() for k in ks]


@pytest.mark.slow
def test_the_bounds_of_the_fitted_linear_vae_are_tight(digits_vae: Any, digits: Tensor) -> None:
    x = digits[1437:].float()
    top = exact(digits_vae, x).mean().item()
    assert top - bounds(digits_vae, x, (500,), 500)[0] == pytest.approx(0, abs=0.05)
    assert elbo(digits_vae, x, 100) < top + 0.02


@pytest.mark.slow
def test_elbo_iwae_and_evidence_are_ordered(digits_vae: Any, digits: Tensor) -> None:
    model, x = copy.deepcopy(digits_vae), digits[:300].float()
    with torch.no_grad():  # a posterior that is off in its mean and in its variance
        model.encoder[1].bias += 0.25 * torch.randn_like(model.encoder[1].bias)
    top = exact(model, x).mean().item()
    low = elbo(model, x, 1000).item()
    ladder = bounds(model, x, (1, 5, 50, 500), 1000)
    assert ladder[0] == pytest.approx(low, abs=0.1)  # one sample: the ELBO, whose KL is the analytic one
    assert top - low > 0.5
    assert all(b - a > 0.02 for a, b in pairwise(ladder))
    assert ladder[-1] < top + 0.01
    assert top - ladder[-1] < 0.1 * (top - low)
    # the bound holds for every sample, on average over the noise
    each = torch.stack([model.log_likelihood(x, 5) for _ in range(200)]).mean(0)
    assert (exact(model, x) - each).min() > -0.2


def true_posterior(k: int, dims: int) -> Any:
    """A linear VAE with orthogonal columns of W, so that the posterior is diagonal, and the encoder at it."""
    model = linear_vae((dims,), k).double()
    lengths = torch.linspace(0.5, 2, k, dtype=torch.float64)
    with torch.no_grad():
        W = torch.linalg.qr(torch.randn(dims, k, dtype=torch.float64))[0] * lengths
        c = torch.randn(dims, dtype=torch.float64)
        model.likelihood.log_scale.fill_(-0.4)
        s2 = math.exp(-0.8)
        model.decoder[1].weight.copy_(W)
        model.decoder[1].bias.copy_(c)
        gain = W.T / (lengths**2 + s2)[:, None]
        model.encoder[1].weight.copy_(torch.cat([gain, 0 * gain]))
        model.encoder[1].bias.copy_(torch.cat([-gain @ c, (s2 / (lengths**2 + s2)).log()]))
    return model


def test_importance_weights_are_constant_at_true_posterior() -> None:
    model, x = true_posterior(4, 9), torch.randn(20, 9, dtype=torch.float64) * 2
    for n in (1, 3, 200):
        torch.testing.assert_close(model.log_likelihood(x, n), exact(model, x), rtol=0, atol=1e-9)
    with torch.no_grad():
        model.encoder[1].bias[-1] += 0.3
    assert (model.log_likelihood(x, 1) - exact(model, x)).abs().max() > 1e-2


def test_elbo_equals_evidence_at_true_posterior() -> None:
    """The mean ELBO is log p(x) there, and the decoder's gradient is that of log p(x)."""
    model = true_posterior(3, 6)
    x = torch.randn(5, 6, dtype=torch.float64)
    many = x.repeat(40_000, 1)
    terms = model.loss(many)
    assert terms["elbo"].item() == pytest.approx(exact(model, x).mean().item(), abs=0.02)
    W, c = model.decoder[1].weight, model.decoder[1].bias
    found = torch.autograd.grad(terms["elbo"], (W, c, model.likelihood.log_scale))
    variance = (2 * model.likelihood.log_scale).exp().expand(6)
    evidence = D.MultivariateNormal(c, W @ W.T + torch.diag(variance)).log_prob(x).mean()
    expected = torch.autograd.grad(evidence, (W, c, model.likelihood.log_scale))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)


# ---- the terms -------------------------------------------------------------------------------------------------------


def at(model: Any, mu: Tensor, log_var: Tensor) -> Any:
    """The model with a given posterior for a batch of zeros."""
    model.posterior = lambda x: (mu, log_var)
    return model


def reference_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    q = D.Normal(mu, (0.5 * log_var).exp())
    return D.kl_divergence(q, D.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)


POSTERIORS = {
    "start": lambda: (torch.zeros(4, 5), torch.zeros(4, 5)),
    "shifted mean": lambda: (torch.randn(4, 5) * 2, torch.zeros(4, 5)),
    "shifted variance": lambda: (torch.zeros(4, 5), torch.randn(4, 5) * 2),
    "both": lambda: (torch.randn(4, 5) * 2 + 1, torch.randn(4, 5) - 2),
}


def kl_law(make: Callable[..., Any]) -> None:
    """KL and its gradient equal those of torch.distributions, everywhere; it is never negative."""
    for draw in POSTERIORS.values():
        mu, log_var = (t.double().requires_grad_() for t in draw())
        terms = at(make(), mu, log_var).loss(torch.rand(4, 2, 3, 3, dtype=torch.float64))
        expected = reference_kl(mu, log_var).mean()
        torch.testing.assert_close(terms["kl"], expected)
        assert terms["kl"] >= 0
        for a, b in zip(
            torch.autograd.grad(terms["kl"], (mu, log_var), allow_unused=True),
            torch.autograd.grad(expected, (mu, log_var)),
            strict=True,
        ):
            torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


def elbo_law(make: Callable[..., Any]) -> None:
    """With beta = 1 the loss is the negative ELBO: summed cross-entropy at the drawn z plus KL, in nats per sample."""
    model, x = make(), torch.rand(6, 2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        model.encoder[-2].bias += torch.linspace(-1, 1, 10)
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    terms = model.loss(x)
    logits = model.decoder(seen[0])
    nll = -D.Bernoulli(logits=logits, validate_args=False).log_prob(x).flatten(1).sum(1).mean()
    kl = reference_kl(*model.posterior(x)).mean()
    torch.testing.assert_close(terms["loss"], nll + kl)
    torch.testing.assert_close(terms["nll"], nll)
    assert torch.equal(terms["elbo"], -(terms["nll"] + terms["kl"]))


def train_equals_evaluation_law(make: Callable[..., Any]) -> None:
    """With the same noise, training and evaluation compute the same loss."""
    model, x = make(), torch.rand(6, 2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        model.encoder[-2].bias += torch.linspace(-1, 1, 10)
    found = []
    for training in (True, False):
        torch.manual_seed(3)
        found.append(model.train(training).loss(x))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def capacity_law(make: Callable[..., Any]) -> None:
    """The penalty is beta |KL - C| (Burgess et al. 2018): above C the gradient lowers KL, below it raises KL."""
    for capacity, sign in ((0.0, 1), (1.0, 1), (50.0, -1)):
        model = make(beta=3.0)
        model.capacity = capacity
        mu, log_var = (t.double().requires_grad_() for t in POSTERIORS["both"]())
        kl = reference_kl(mu, log_var).mean()
        assert (kl > capacity) == (sign > 0)
        terms = at(model, mu, log_var).loss(torch.rand(4, 2, 3, 3, dtype=torch.float64))
        penalty = terms["loss"] - terms["nll"]
        torch.testing.assert_close(penalty, 3 * (kl - capacity).abs())
        # nll depends on both as well; it cancels up to rounding
        found = torch.autograd.grad(penalty, (mu, log_var))
        for a, b in zip(found, torch.autograd.grad(3 * sign * kl, (mu, log_var)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def log_likelihood_law(make: Callable[..., Any]) -> None:
    """Exactly n samples, each decoded once, and log p(x) rather than its negative."""
    model, x = make(), torch.rand(7, 2, 3, 3, dtype=torch.float64)
    rows: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for n in (1, 10, 150, 250, 3001):
        rows.clear()
        found = model.log_likelihood(x, n)
        assert found.shape == (7,)
        assert sum(rows) == n * len(x)
        assert len(rows) <= 1 + n * len(x) // 5000  # in a few large batches, not one image at a time
        assert not found.requires_grad
    assert (model.log_likelihood(x, 2000) < 0).all()  # a probability of binary data


def score_law(make: Callable[..., Any]) -> None:
    """The anomaly score is one number per sample, without noise: -log p(x | mu) + KL."""
    model, x = make().eval(), torch.rand(6, 2, 3, 3, dtype=torch.float64)
    with torch.no_grad():
        model.encoder[-2].bias += torch.linspace(-1, 1, 10)
    assert torch.equal(model.score(x), model.score(x))
    mu, log_var = model.posterior(x)
    nll = -D.Bernoulli(logits=model.decoder(mu), validate_args=False).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(model.score(x), nll + reference_kl(mu, log_var))
    assert torch.equal(model.encode(x), mu)
    torch.testing.assert_close(model(x), model.decoder(mu).sigmoid())


LAWS = (kl_law, elbo_law, train_equals_evaluation_law, capacity_law, log_likelihood_law, score_law)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_vae_satisfies_every_law(law: Any) -> None:
    law(small)


class PyOD(VAE):
    """clamp(KL, 0, C) with C = 0 by default: no KL at all; scores are noisy."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        kl = terms["kl"].clamp(torch.zeros(()), torch.tensor(float(self.capacity)))
        return terms | {"kl": kl, "loss": terms["nll"] + self.beta * kl}

    def score(self, x: Tensor) -> Tensor:
        mu, log_var = self.posterior(x)
        return self.nll(self.decoder(mu + (0.5 * log_var).exp() * torch.randn_like(mu)), x)


class PyTorchVAE(VAE):
    """Logs -KL, and weighs it by 0.00025 in training only."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {
            "loss": terms["nll"] + (0.00025 if self.training else 1.0) * terms["kl"],
            "kl": -terms["kl"],
        }


class Bolts(VAE):
    """The mean squared pixel error plus a tenth of the mean KL."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        mse = ((self(x) - x) ** 2).mean()
        return terms | {"loss": mse + 0.1 * terms["kl"] / self.code_shape[0]}


class Pythae(VAE):
    """Rounds the number of samples to hundreds and returns -log p(x)."""

    def log_likelihood(self, x: Tensor, n: int) -> Tensor:
        return -super().log_likelihood(x, 100 * max(1, n // 100))


@pytest.mark.parametrize(
    ("mistake", "law"),
    [
        (PyOD, kl_law),
        (PyOD, elbo_law),
        (PyOD, capacity_law),
        (PyOD, score_law),
        (PyTorchVAE, kl_law),
        (PyTorchVAE, train_equals_evaluation_law),
        (Bolts, elbo_law),
        (Pythae, log_likelihood_law),
    ],
    ids=lambda value: value.__name__,
)
def test_wrong_vae_formulas_are_detected(mistake: Any, law: Any) -> None:
    def make(**settings: Any) -> Any:
        return mistake((2, 3, 3), latent_dim=5, hidden_dims=(16,), **settings).double()

    with pytest.raises(AssertionError):
        law(make)


def test_beta_weights_only_the_kl() -> None:
    x = torch.rand(6, 2, 3, 3, dtype=torch.float64)
    found = []
    for beta in (0.0, 1.0, 4.0):
        torch.manual_seed(0)
        model = small(beta=beta)
        with torch.no_grad():
            model.encoder[-2].bias += torch.linspace(-1, 1, 10)
        found.append(model.loss(x))
        torch.testing.assert_close(found[-1]["loss"], found[-1]["nll"] + beta * found[-1]["kl"])
    assert torch.equal(found[0]["loss"], found[0]["nll"])
    assert torch.equal(found[1]["loss"], -found[1]["elbo"])
    assert len({f["elbo"].item() for f in found}) == 1
    assert found[0]["kl"] > 0.1


@pytest.mark.parametrize("shift", [-200.0, -50.0, 50.0, 200.0])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian:learned", "discretised_logistic", "beta_binomial"])
def test_extreme_log_variance_stays_finite(shift: float, likelihood: str) -> None:
    model = aezoo.create_model("vae", input_shape=(1, 4, 4), latent_dim=3, hidden_dims=(8,), likelihood=likelihood)
    with torch.no_grad():
        model.encoder[-2].bias[3:] = shift
    x = torch.rand(4, 1, 4, 4)
    terms = model.loss(x)
    terms["loss"].backward()
    values = [*terms.values(), *(p.grad for p in model.parameters()), model.score(x), model.log_likelihood(x, 3)]
    assert all(torch.isfinite(v).all() for v in values)


def test_posterior_samples_have_its_mean_and_deviation() -> None:
    mu = torch.tensor([[0.5, -2.0, 0.0, 1.0, 3.0]])
    log_var = torch.tensor([[-3.0, 1.0, 0.0, -1.0, 0.7]])
    model, draws = small().float(), 4000
    seen: list[Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    at(model, mu.expand(draws, 5), log_var.expand(draws, 5)).loss(torch.rand(draws, 2, 3, 3))
    z, std = seen[0], (0.5 * log_var[0]).exp()
    assert ((z.std(0) / std - 1).abs() < 5 / math.sqrt(2 * draws)).all()
    assert ((z.mean(0) - mu[0]).abs() < 5 * std / math.sqrt(draws)).all()
    assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(draws)
    seen.clear()
    model.log_likelihood(torch.rand(draws, 2, 3, 3), 1)
    assert ((seen[0].std(0) / std - 1).abs() < 5 / math.sqrt(2 * draws)).all()


def test_the_gradient_reaches_mean_and_variance_through_the_draw() -> None:
    """The gradients of nll by mu and log_var are 1 and eps exp(log_var / 2) / 2 times that by z."""
    mu, log_var = (t.double().requires_grad_() for t in POSTERIORS["both"]())
    model, seen = small(), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    nll = at(model, mu, log_var).loss(torch.rand(4, 2, 3, 3, dtype=torch.float64))["nll"]
    in_mu, in_log_var, in_z = torch.autograd.grad(nll, (mu, log_var, seen[0]))
    torch.testing.assert_close(in_mu, in_z)
    torch.testing.assert_close(in_log_var, in_z * 0.5 * (seen[0] - mu))
    assert in_z.abs().max() > 1e-4


def test_samples_are_means_of_the_likelihood_under_the_prior() -> None:
    model, seen = small().eval(), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = model.sample(4000)
    assert x.shape == (4000, 2, 3, 3)
    assert x.dtype == torch.float64
    torch.testing.assert_close(x, model.decoder(seen[0]).sigmoid())
    assert (seen[0].mean(0).abs() < 5 / math.sqrt(4000)).all()
    assert ((seen[0].var(0) - 1).abs() < 5 * math.sqrt(2 / 4000)).all()


@pytest.mark.parametrize(
    ("settings", "word"), [({"beta": -1.0}, "beta"), ({"beta": math.inf}, "beta"), ({"latent_dim": 0}, "latent_dim")]
)
def test_invalid_values_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        aezoo.create_model("vae", input_shape=(4,), **settings)
    with pytest.raises(aezoo.AezooError, match="at least 1"):
        small().log_likelihood(torch.rand(1, 2, 3, 3, dtype=torch.float64), 0)
