"""Laws of DAGMM, a deep autoencoding Gaussian mixture model (Zong et al. 2018)."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from anomaly_laws import (  # noqa: F401
    SHAPE,
    images,
    test_every_input_shape_is_scored,
)
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from torch import Tensor
from two_ranks import on_two_ranks

import aezoo

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


def dagmm(**settings: Any) -> Any:
    settings = {"input_shape": SHAPE, "latent_dim": 3, "hidden_dims": (16,), "dropout": 0.0, **settings}
    return aezoo.create_model("dagmm", **settings).double()


def mixture_of(seed: int, k: int = 3, z: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, means and well-conditioned covariances."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(0, 1, (k, z, z))
    sigma = roots @ roots.transpose(0, 2, 1) + 0.5 * np.eye(z)
    return (
        torch.from_numpy(rng.dirichlet(np.full(k, 2.0))),
        torch.from_numpy(rng.normal(0, 2, (k, z))),
        torch.from_numpy(sigma),
    )


def sklearn_mixture(phi: Any, mu: Any, sigma: Any) -> GaussianMixture:
    """A mixture of given parameters."""
    found = GaussianMixture(len(phi))
    found.weights_, found.means_, found.covariances_ = (np.asarray(v, np.float64) for v in (phi, mu, sigma))
    found.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(found.covariances_)).transpose(0, 2, 1)
    return found


def z_by_hand(model: Any, x: Tensor) -> np.ndarray:
    """[z_c, relative Euclidean distance, cosine similarity] (section 3.2), sample by sample."""
    with torch.no_grad():
        z_c, x_hat = model.encoder(x), model(x)
    rows = []
    for code, one, other in zip(z_c.numpy(), x.flatten(1).numpy(), x_hat.flatten(1).numpy(), strict=True):
        length = np.linalg.norm(one)
        cosine = one @ other / (length * np.linalg.norm(other))
        rows.append([*code, np.linalg.norm(one - other) / length, cosine])
    return np.array(rows)


# ---- DAGMM: the energy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_energy_is_mixture_negative_log_density(seed: int) -> None:
    phi, mu, sigma = mixture_of(seed)
    z = 3 * torch.randn(50, 5, dtype=torch.float64)
    energy = dagmm().energy(z, phi, mu, sigma)
    jittered = sigma + 1e-6 * torch.eye(5, dtype=torch.float64)
    learn = sklearn_mixture(phi, mu, jittered)
    torch.testing.assert_close(energy, torch.from_numpy(-learn.score_samples(z.numpy())), rtol=1e-9, atol=1e-9)
    law = D.MixtureSameFamily(D.Categorical(phi), D.MultivariateNormal(mu, jittered))
    torch.testing.assert_close(energy, -law.log_prob(z), rtol=1e-9, atol=1e-9)
    # the jitter changes little
    plain = -sklearn_mixture(phi, mu, sigma).score_samples(z.numpy())
    torch.testing.assert_close(energy, torch.from_numpy(plain), rtol=1e-4, atol=1e-4)
    # without the square root of the determinant |2 pi Sigma|
    rooted = -torch.logsumexp(law.component_distribution.log_prob(z[:, None]) - jittered.logdet() / 2 + phi.log(), 1)
    assert (rooted - energy).abs().max() > 0.1


def test_far_samples_have_ordered_finite_energies() -> None:
    """-log(sum + 1e-12), as in https://github.com/danieltan07/dagmm, is at most 27.6 for any distance."""
    phi, mu, sigma = mixture_of(0)
    z = torch.arange(1, 6, dtype=torch.float64)[:, None] * 100 * torch.ones(5, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        energy = dagmm().energy(*(v.to(dtype) for v in (z, phi, mu, sigma)))
        assert (energy.diff() > 100).all() and energy.isfinite().all() and energy.dtype == dtype
    density = D.MixtureSameFamily(D.Categorical(phi), D.MultivariateNormal(mu, sigma)).log_prob(z).exp()
    assert (-(density + 1e-12).log()).diff().abs().max() < 1e-6


def test_the_score_is_the_energy_of_code_distance_and_cosine(shifted: Any) -> None:
    model, x = shifted(dagmm()).eval(), images(20)
    for _ in range(3):
        model.train().loss(images(40, seed=3))
    phi, mu, sigma = model.eval().stored_mixture()
    z = z_by_hand(model, x)
    torch.testing.assert_close(phi.sum().item(), 1.0)
    learn = sklearn_mixture(phi, mu, sigma + 1e-6 * torch.eye(5, dtype=torch.float64))
    with torch.no_grad():
        score = model.score(x)
    torch.testing.assert_close(score, torch.from_numpy(-learn.score_samples(z)), rtol=1e-8, atol=1e-8)
    # a score of the code without the errors differs
    alone = sklearn_mixture(phi, mu[:, :3], sigma[:, :3, :3])
    assert np.abs(alone.score_samples(z[:, :3]) + score.numpy()).max() > 0.1


# ---- DAGMM: statistics of a batch ------------------------------------------------------------------------------------


def weighted(gamma: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equation 5 by NumPy's own weighted averages and covariances."""
    mu = np.stack([np.average(z, axis=0, weights=g) for g in gamma.T])
    sigma = np.stack([np.cov(z.T, aweights=g, ddof=0) for g in gamma.T])
    return gamma.mean(0), mu, sigma


def gamma_by_hand(model: Any, z: np.ndarray) -> np.ndarray:
    """The estimation network, a hidden layer with tanh and a softmax (section 4.3)."""
    weights = [p.detach().numpy() for p in model.estimation.parameters()]
    logits = np.tanh(z @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_mixture_moments_are_weighted_by_assignment(shifted: Any) -> None:
    model, x = shifted(dagmm()).train(), images(30)
    z = z_by_hand(model, x)
    expected = weighted(gamma_by_hand(model, z), z)
    found = model.mixture(torch.from_numpy(z))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.detach(), torch.from_numpy(theirs), rtol=1e-9, atol=1e-12)
    # a single component has the mean and covariance of the batch
    one = shifted(dagmm(n_components=1))
    phi, mu, sigma = one.mixture(torch.from_numpy(z))
    assert phi.item() == 1
    torch.testing.assert_close(mu[0].detach(), torch.from_numpy(z.mean(0)))
    torch.testing.assert_close(sigma[0].detach(), torch.from_numpy(np.cov(z.T, bias=True)))


def test_the_loss_is_error_energy_and_inverse_variances(shifted: Any) -> None:
    model, x = shifted(dagmm(energy_weight=0.3, covariance_weight=0.02)).train(), images(30)
    z = z_by_hand(model, x)
    phi, mu, sigma = weighted(gamma_by_hand(model, z), z)
    error = (x - model(x)).detach().flatten(1).square().sum(1).mean().item() + 9 * math.log(math.pi)
    energy = -sklearn_mixture(phi, mu, sigma + 1e-6 * np.eye(5)).score_samples(z).mean()
    inverse = (1 / (np.diagonal(sigma, axis1=1, axis2=2) + 1e-6)).sum()
    terms = model.loss(x)
    for name, value in {"nll": error, "energy": energy, "inverse_variances": inverse}.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-7), name
    assert terms["loss"].item() == pytest.approx(error + 0.3 * energy + 0.02 * inverse, rel=1e-7)


def test_zero_weights_equal_dense_autoencoder(shifted: Any) -> None:
    """lambda_1 = lambda_2 = 0: the loss and the gradients of dense_ae with the same weights."""
    model, x = shifted(dagmm(energy_weight=0.0, covariance_weight=0.0)), images(30)
    parent = aezoo.create_model(
        "dense_ae", SHAPE, latent_dim=3, hidden_dims=(16,), activation="tanh", likelihood="gaussian"
    ).double()
    for mine, theirs in ((model.encoder, parent.encoder), (model.decoder, parent.decoder)):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            q.data.copy_(p)
    found, expected = model.train().loss(x), parent.train().loss(x)
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    found["loss"].backward()
    expected["loss"].backward()
    for p, q in zip(model.encoder.parameters(), parent.encoder.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-9)


def test_energy_gradient_matches_finite_differences(shifted: Any) -> None:
    model, x = shifted(dagmm(energy_weight=1.0)).train(), images(12)
    energy = model.loss(x)["energy"]
    for net in (model.encoder, model.decoder, model.estimation):
        grads = torch.autograd.grad(energy, [*net.parameters()], retain_graph=True)
        assert all(g.norm() > 1e-6 for g in grads)
    p = model.estimation[0].weight
    (grad,) = torch.autograd.grad(energy, [p])
    off = torch.zeros_like(p)
    off[1, 2] = 1e-5
    values = []
    for sign in (1, -1):
        other = copy.deepcopy(model)
        other.estimation[0].weight.data.add_(sign * off)
        values.append(other.loss(x)["energy"].item())
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(grad[1, 2].item(), rel=1e-4)


def test_two_ranks_equal_one_process(shifted: Any) -> None:
    model, x = shifted(dagmm(covariance_weight=0.1, energy_weight=0.5)).train(), images(16)
    whole = copy.deepcopy(model)
    terms = whole.loss(x)
    together = on_two_ranks(model, x)
    for name, value in terms.items():
        torch.testing.assert_close(together.terms[name], value, rtol=1e-9, atol=1e-12)
    expected = torch.autograd.grad(terms["loss"], [*whole.parameters()])
    for mine, theirs in zip(together.gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)
    for own in together.copies:
        for name, buffer in own.named_buffers():
            torch.testing.assert_close(buffer, whole.get_buffer(name), rtol=1e-9, atol=1e-12)
    # without exchange each rank has statistics of its own
    separate = on_two_ranks(model, x, exchange=False)
    assert (separate.terms["energy"] - terms["energy"]).abs() > 0.01


# ---- DAGMM: evaluation -----------------------------------------------------------------------------------------------


def test_evaluation_uses_pooled_statistics_of_training(shifted: Any) -> None:
    """Shares, means and covariances of all samples by NumPy, with batch weights that decay by 19/20."""
    model, parts = shifted(dagmm()).train(), [images(20 + i, seed=i) for i in range(5)]
    for x in parts:
        model.loss(x)
    z = [z_by_hand(model, x) for x in parts]
    weights = [np.full(len(x), 0.95 ** (4 - i) / len(x)) for i, x in enumerate(parts)]
    gamma = np.concatenate([gamma_by_hand(model, part) * w[:, None] for part, w in zip(z, weights, strict=True)])
    phi, mu, sigma = weighted(gamma, np.concatenate(z))
    found = model.stored_mixture()
    for mine, theirs in zip(found, (phi / phi.sum(), mu, sigma), strict=True):
        # the initial statistics have a weight of about 1e-5
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=1e-3, atol=1e-4)
    averaged = np.mean([weighted(gamma_by_hand(model, part), part)[2] for part in z], axis=0)
    assert np.abs(averaged - sigma).max() > 1e-3  # a mean of covariances misses the variance between means


def test_evaluation_is_stateless_and_per_sample(shifted: Any) -> None:
    model, x = shifted(dagmm()), images(20)
    model.train().loss(images(20, seed=1))
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    whole, terms = model.score(x), model.loss(x)
    assert torch.equal(model.score(x), whole)
    torch.testing.assert_close(model.score(x[3:4]), whole[3:4], rtol=1e-12, atol=0)
    torch.testing.assert_close(terms["energy"], whole.mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # the batch's own statistics give another energy
    assert (model.energy(torch.from_numpy(z_by_hand(model, x)), *model.mixture(torch.from_numpy(z_by_hand(model, x))))
            - whole).abs().max() > 0.1  # fmt: skip


def test_untrained_mixture_is_standard_gaussian() -> None:
    model, x = dagmm(n_components=3).eval(), images()
    z = torch.from_numpy(z_by_hand(model, x))
    expected = -D.Normal(0.0, 1.0).log_prob(z).sum(1)
    torch.testing.assert_close(model.score(x).detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_fewer_samples_than_dimensions_have_finite_energy(n: int, scale: float, dtype: torch.dtype) -> None:
    """A covariance of rank n - 1 has no Cholesky factor without the jitter, nor with one below rounding errors."""
    torch.manual_seed(n)
    model = dagmm().to(dtype)
    z = (scale * (torch.randn(n, 5) + 3)).to(dtype)
    phi, mu, sigma = model.mixture(z)
    energy = model.energy(z, phi, mu, sigma)
    energy.sum().backward()
    assert energy.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(RuntimeError, match="not positive-definite"):
        torch.linalg.cholesky(sigma - 1e-12 * scale**2 * torch.eye(5, dtype=dtype))


def test_nan_codes_give_nan_energy_without_error() -> None:
    model, (phi, mu, sigma) = dagmm(), mixture_of(0)
    assert (
        model.energy(torch.zeros(4, 5).double(), phi, mu, sigma.index_fill(0, torch.tensor([1]), torch.nan))
        .isnan()
        .all()
    )
    lost = sigma.clone()
    lost[1] = -lost[1]  # not positive definite
    assert model.energy(torch.zeros(4, 5).double(), phi, mu, lost).isnan().all()


def test_empty_mixture_component_stays_finite() -> None:
    model, x = dagmm(n_components=2), images(12)
    with torch.no_grad():
        model.estimation[-1].bias.copy_(torch.tensor([2000.0, -2000.0]))
    terms = model.train().loss(x)
    terms["loss"].backward()
    assert all(value.isfinite() for value in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.eval().score(x).isfinite().all()


def test_black_samples_have_a_finite_distance(shifted: Any) -> None:
    model, x = shifted(dagmm()), torch.zeros(4, *SHAPE, dtype=torch.float64)
    x[1:] = images(3)
    z = model.features(model.encoder(x), x, model(x))
    rms = model(x)[0].square().mean().sqrt()
    torch.testing.assert_close(z[0, -2], rms / 1e-3)
    assert z[0, -1] == 0
    terms = model.train().loss(x)
    terms["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# ---- detection -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dagmm_detects_malignant_tumours(adam: Any) -> None:
    """On tabular data, as in the paper; far better than the relative reconstruction error alone."""
    found = load_breast_cancer()
    benign, malignant = found.data[found.target == 1], found.data[found.target == 0]
    train, x = (
        torch.from_numpy((part - benign.mean(0)) / benign.std(0)).float()
        for part in (benign[:250], np.concatenate([benign[250:], malignant]))
    )
    model: Any = aezoo.create_model("dagmm", (30,), hidden_dims=(32,))
    adam(model, train, steps=400, lr=2e-3, batch=64)
    y = np.repeat([0, 1], [len(benign) - 250, len(malignant)])
    with torch.no_grad():
        z = model.features(model.encode(x), x, model(x))
        auroc, relative = roc_auc_score(y, model.score(x)), roc_auc_score(y, z[:, -2])
        # the mixture of all training samples at the final weights gives nearly the same result
        whole = model.energy(z, *model.mixture(model.features(model.encode(train), train, model(train))))
    assert auroc > 0.9 and auroc > relative + 0.2
    assert roc_auc_score(y, whole) == pytest.approx(auroc, abs=0.03)
