"""Laws of the importance weighted bounds: values, gradients of each estimator, exact bounds, known mistakes.

Bernoulli models are compared with formulas written in torch.distributions and differentiated by autograd; on
linear-Gaussian models log p(x) has a closed form, and the bounds for one code dimension are computed by quadrature.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from sklearn.decomposition import PCA
from torch import Tensor

import aezoo
from aezoo.models.variational.iwae import IWAE
from aezoo.models.variational.miwae import MIWAE
from aezoo.models.variational.piwae import PIWAE
from aezoo.models.variational.vae import VAE

SETTINGS: dict[str, dict[str, Any]] = {
    "iwae": {"n_samples": 6},
    "miwae": {"n_groups": 2, "n_samples": 3},
    "piwae": {"n_groups": 2, "n_samples": 3},
    "ciwae": {"n_samples": 6, "beta": 0.3},
}


ESTIMATORS = ("reparam", "stl", "dreg")


Make = Callable[..., Any]


def groups(settings: dict[str, Any]) -> tuple[int, int]:
    return settings.get("n_groups", 1), settings["n_samples"]


def small(name: str, **settings: Any) -> Any:
    """A model with the same weights for every name: q is far from p(z|x), and nll varies by several nats."""
    torch.manual_seed(7)
    size = {"input_shape": (2, 3, 3), "latent_dim": 4, "hidden_dims": (12,), "activation": "tanh"}
    model = aezoo.create_model(name, **size, **settings).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def data(n: int = 5) -> Tensor:
    return torch.rand(n, 2, 3, 3, dtype=torch.float64)


def codes(model: Any, x: Tensor, seed: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """The loss terms, and the input of the decoder's first call, (B, N, D)."""
    seen: list[Tensor] = []
    handle = model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    torch.manual_seed(seed)
    terms = model.loss(x)
    handle.remove()
    return terms, seen[0].unflatten(0, (len(x), -1))


def log_joint(model: Any, x: Tensor, z: Tensor) -> Tensor:
    """The sum of log p(x|z) and log p(z) of Bernoulli data by torch.distributions: (B, *), (B, N, D) -> (B, N)."""
    logits = model.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    log_px = D.Bernoulli(logits=logits, validate_args=False).log_prob(x[:, None].expand_as(logits))
    return log_px.flatten(2).sum(2) + D.Normal(0.0, 1.0).log_prob(z).sum(2)


def q(model: Any, x: Tensor, detach: bool = False) -> D.Normal:
    mu, log_var = (part[:, None] for part in model.posterior(x))
    return D.Normal(mu.detach(), (0.5 * log_var).exp().detach()) if detach else D.Normal(mu, (0.5 * log_var).exp())


def log_weights(model: Any, x: Tensor, drawn: Tensor) -> Tensor:
    """The logarithm of w, differentiable in all parameters: the codes are written as mu + sigma eps."""
    posterior = q(model, x)
    eps = ((drawn - posterior.mean) / posterior.stddev).detach()
    z = posterior.mean + posterior.stddev * eps
    return log_joint(model, x, z) - posterior.log_prob(z).sum(2)


def bound(log_w: Tensor, m: int, k: int) -> Tensor:
    """1/M sum_m log 1/K sum_k w_mk, by the plain formula in float64."""
    return log_w.unflatten(1, (m, k)).exp().mean(2).log().mean()


def objectives(name: str, settings: dict[str, Any], log_w: Tensor) -> tuple[Tensor, Tensor]:
    """The objective of the encoder, and that of the decoder."""
    m, k = groups(settings)
    if name == "ciwae":
        mixed = settings["beta"] * log_w.mean() + (1 - settings["beta"]) * bound(log_w, 1, k)
        return mixed, mixed
    return bound(log_w, m, k), bound(log_w, 1, m * k) if name == "piwae" else bound(log_w, m, k)


def encoder(model: Any) -> list[Tensor]:
    return [*model.encoder.parameters()]


def decoder(model: Any) -> list[Tensor]:
    return [*model.decoder.parameters(), *model.likelihood.parameters()]


def gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    found = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([part.flatten() for part in found])


# ---- values and gradients of one draw --------------------------------------------------------------------------------


def value_law(name: str, make: Make, estimator: str) -> None:
    """The loss is minus the bound for every gradient estimator; nll and kl are means over samples."""
    settings = SETTINGS[name]
    model, x = make(name, estimator=estimator, **settings), data()
    terms, z = codes(model, x)
    log_w = log_weights(model, x, z)
    assert log_w.std(1).min() > 0.3  # the mean of w is far from the mean of log w
    wanted = objectives(name, settings, log_w)[1]
    torch.testing.assert_close(terms["elbo"], wanted)
    assert torch.equal(terms["loss"], -terms["elbo"])
    log_ratio = (q(model, x).log_prob(z) - D.Normal(0.0, 1.0).log_prob(z)).sum(2)
    torch.testing.assert_close(terms["kl"], log_ratio.mean())
    torch.testing.assert_close(terms["nll"] + terms["kl"], -log_w.mean())
    if name == "piwae":
        torch.testing.assert_close(terms["miwae"], bound(log_w, *groups(settings)))
    if name == "ciwae":
        torch.testing.assert_close(terms["iwae"], bound(log_w, 1, 6))


def decoder_law(name: str, make: Make, estimator: str) -> None:
    """The decoder's gradient is that of its objective for every estimator."""
    model, x = make(name, estimator=estimator, **SETTINGS[name]), data()
    terms, z = codes(model, x)
    wanted = objectives(name, SETTINGS[name], log_weights(model, x, z))[1]
    torch.testing.assert_close(gradient(terms["loss"], decoder(model)), -gradient(wanted, decoder(model)))


def encoder_law(name: str, make: Make, estimator: str) -> None:
    """The encoder's gradient: of its objective by autograd, for stl and dreg a weighted sum of path derivatives."""
    settings = SETTINGS[name]
    model, x = make(name, estimator=estimator, **settings), data()
    terms, drawn = codes(model, x)
    log_w = log_weights(model, x, drawn)
    found = gradient(terms["loss"], encoder(model))
    if estimator == "reparam":
        wanted = gradient(objectives(name, settings, log_w)[0], encoder(model))
    else:
        m, k = groups(settings)
        w = log_w.detach().unflatten(1, (m, k)).exp()
        v = w / w.sum(2, keepdim=True)
        c = ((v if estimator == "stl" else v**2) / m).flatten(1)
        if name == "ciwae":
            c = 0.3 / 6 + 0.7 * c
        leaf = drawn.clone().requires_grad_()
        log_w_of_z = log_joint(model, x, leaf) - q(model, x, detach=True).log_prob(leaf).sum(2)
        (slope,) = torch.autograd.grad(log_w_of_z.sum(), leaf)
        posterior = q(model, x)
        z = posterior.mean + posterior.stddev * ((drawn - posterior.mean) / posterior.stddev).detach()
        wanted = gradient((c[:, :, None] * slope * z).sum() / len(x), encoder(model))
    torch.testing.assert_close(found, -wanted)


LAWS = (value_law, decoder_law, encoder_law)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_importance_bound_satisfies_every_law(law: Any, name: str, estimator: str) -> None:
    law(name, small, estimator)


def at(model: Any, mu: Tensor, log_var: Tensor) -> Any:
    """The model with a given posterior."""
    model.posterior = lambda x: (mu, log_var)
    return model


# ---- neutral settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "draws"),
    [
        ("iwae", {"n_samples": 1}, 1),
        ("miwae", {"n_groups": 3, "n_samples": 1}, 3),
        ("ciwae", {"n_samples": 1, "beta": 0.0}, 1),
        ("ciwae", {"n_samples": 3, "beta": 1.0}, 3),
    ],
)
def test_neutral_setting_equals_multi_sample_vae(name: str, settings: dict[str, Any], draws: int) -> None:
    """With the same noise; the losses differ by the VAE's analytic KL in place of the sampled one."""
    vae, x = small("vae"), data()
    vae_terms, z = codes(vae, x.repeat_interleave(draws, 0))
    sample_elbo = (log_joint(vae, x, z.reshape(5, draws, 4)) - q(vae, x).log_prob(z.reshape(5, draws, 4)).sum(2)).mean()
    for estimator in ESTIMATORS:
        terms, _ = codes(small(name, estimator=estimator, **settings), x)
        torch.testing.assert_close(terms["elbo"], sample_elbo)
        torch.testing.assert_close(terms["nll"], vae_terms["nll"])
        torch.testing.assert_close(terms["loss"] - terms["kl"] + vae_terms["kl"], vae_terms["loss"])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    ("name", "neutral"), [("miwae", {"n_groups": 1}), ("piwae", {"n_groups": 1}), ("ciwae", {"beta": 0.0})]
)
def test_neutral_setting_equals_iwae(name: str, neutral: dict[str, Any], estimator: str) -> None:
    model, parent, x = small(name, n_samples=6, estimator=estimator, **neutral), small("iwae", n_samples=6), data()
    parent.estimator = estimator
    found, wanted = codes(model, x)[0], codes(parent, x)[0]
    for term, value in wanted.items():
        torch.testing.assert_close(found[term], value)
    everything = [gradient(t["loss"], [*m.parameters()]) for t, m in ((found, model), (wanted, parent))]
    torch.testing.assert_close(*everything)


@pytest.mark.parametrize("name", SETTINGS)
def test_inference_equals_parent(name: str) -> None:
    model, vae, x = small(name, **SETTINGS[name]).eval(), small("vae").eval(), data()
    for call in ("encode", "score", "forward", "posterior"):
        torch.testing.assert_close(getattr(model, call)(x), getattr(vae, call)(x), rtol=0, atol=0)
    for part in (lambda m: m.log_likelihood(x, 30), lambda m: m.sample(6)):
        torch.manual_seed(0)
        found = part(model)
        torch.manual_seed(0)
        assert torch.equal(found, part(vae))
    # log_likelihood estimates the same bound; for a batch of one sample its noise has the same order
    if name == "iwae":
        torch.manual_seed(0)
        loss = model.loss(x[:1])["loss"]
        torch.manual_seed(0)
        torch.testing.assert_close(-loss, model.log_likelihood(x[:1], 6)[0])


# ---- linear-Gaussian models: closed forms ----------------------------------------------------------------------------


def linear(name: str, k: int, dims: int, **settings: Any) -> Any:
    size = {"input_shape": (dims,), "latent_dim": k, "hidden_dims": (), "likelihood": "gaussian:learned"}
    return aezoo.create_model(name, **size, **settings).double()


def true_posterior(name: str, k: int, dims: int, **settings: Any) -> Any:
    """A linear model with orthogonal columns in the decoder, so that p(z|x) is diagonal, and the encoder at p(z|x)."""
    model = linear(name, k, dims, **settings)
    lengths, s2 = torch.linspace(0.5, 2, k, dtype=torch.float64), math.exp(-0.8)
    with torch.no_grad():
        W = torch.linalg.qr(torch.randn(dims, k, dtype=torch.float64))[0] * lengths
        c = torch.randn(dims, dtype=torch.float64)
        gain = W.T / (lengths**2 + s2)[:, None]
        model.likelihood.log_scale.fill_(-0.4)
        model.decoder[1].weight.copy_(W)
        model.decoder[1].bias.copy_(c)
        model.encoder[1].weight.copy_(torch.cat([gain, 0 * gain]))
        model.encoder[1].bias.copy_(torch.cat([-gain @ c, (s2 / (lengths**2 + s2)).log()]))
    return model


def evidence(model: Any, x: Tensor) -> Tensor:
    """The exact log p(x) of x ~ N(c, W W' + s^2 I)."""
    W, c = model.decoder[1].weight.detach(), model.decoder[1].bias.detach()
    variance = (2 * model.likelihood.log_scale.detach()).exp().expand(len(c))
    return D.LowRankMultivariateNormal(c, W, variance).log_prob(x)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", SETTINGS)
def test_true_posterior_gives_evidence_without_noise(name: str, estimator: str) -> None:
    """All w are equal there, so every draw of the stl and dreg gradients is the true gradient, which is 0."""
    model = true_posterior(name, 3, 7, estimator=estimator, **SETTINGS[name])
    x = torch.randn(6, 7, dtype=torch.float64) * 2
    found = []
    for _ in range(20):
        terms = model.loss(x)
        assert terms["elbo"].item() == pytest.approx(evidence(model, x).mean().item(), abs=1e-10)
        found.append(gradient(terms["loss"], encoder(model)))
    noise = torch.stack(found).abs().max().item()
    assert noise > 0.1 if estimator == "reparam" else noise < 1e-12


def pathwise(model: Any, x: Tensor, mu: Tensor, log_var: Tensor, n: int) -> Tensor:
    """Independent gradients of one sample's bound by the posterior's mean and log-variance, (n, 2 D)."""
    mu, log_var = (part.expand(n, -1).clone().requires_grad_() for part in (mu, log_var))
    loss = at(model, mu, log_var).loss(x.expand(n, -1))["loss"]
    return -n * torch.cat(torch.autograd.grad(loss, (mu, log_var)), 1)


def agrees(draws: Tensor, exact: Tensor) -> bool:
    """Whether the mean of the draws is within 5 standard errors of the exact value in every coordinate."""
    error = draws.std(0) / math.sqrt(len(draws))
    return bool(((draws.mean(0) - exact).abs() < 5 * error).all())


POINT = torch.tensor([[1.3, -0.4, 0.9, 0.2]], dtype=torch.float64)


OFF_MU, OFF_LOG_VAR = torch.tensor([[-0.5]]).double(), torch.tensor([[-0.3]]).double()


def exact_bound(model: Any, k: int, mu: Tensor, log_var: Tensor, nodes: int = 40) -> Tensor:
    """L_K of POINT for one code dimension, by Gauss-Hermite quadrature over the noise of all K samples."""
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    weights = weights / weights.sum()
    z = mu + (0.5 * log_var).exp() * points[:, None]
    W, c = model.decoder[1].weight.detach(), model.decoder[1].bias.detach()
    log_px = D.Normal(z @ W.T + c, model.likelihood.log_scale.detach().exp()).log_prob(POINT).sum(1)
    log_q = D.Normal(mu, (0.5 * log_var).exp()).log_prob(z).sum(1)
    w = (log_px + D.Normal(0.0, 1.0).log_prob(z).sum(1) - log_q).exp()
    grids = torch.meshgrid(*[torch.arange(nodes)] * k, indexing="ij")
    return (torch.stack([weights[g] for g in grids]).prod(0) * torch.stack([w[g] for g in grids]).mean(0).log()).sum()


def exact_gradient(model: Any, shares: dict[int, float]) -> Tensor:
    mu, log_var = OFF_MU.clone().requires_grad_(), OFF_LOG_VAR.clone().requires_grad_()
    value = torch.stack([share * exact_bound(model, k, mu, log_var) for k, share in shares.items()]).sum()
    return torch.cat(torch.autograd.grad(value, (mu, log_var)), 1)[0]


# the encoder's objective as a weighted sum of the bounds L_K: {K: weight}
OBJECTIVES: list[tuple[str, dict[str, Any], dict[int, float]]] = [
    ("iwae", {"n_samples": 1}, {1: 1.0}),
    ("iwae", {"n_samples": 3}, {3: 1.0}),
    ("miwae", {"n_groups": 3, "n_samples": 2}, {2: 1.0}),
    ("piwae", {"n_groups": 3, "n_samples": 2}, {2: 1.0}),
    ("ciwae", {"n_samples": 2, "beta": 0.4}, {1: 0.4, 2: 0.6}),
    ("ciwae", {"n_samples": 3, "beta": 1.0}, {1: 1.0}),
]


def unbiased_law(name: str, settings: dict[str, Any], shares: dict[int, float], estimator: str, make: Make) -> None:
    """The mean of 60,000 gradients is within 5 standard errors, each below 2 % of the gradient, of the exact one."""
    model = make(name, 1, 4, estimator=estimator, **settings)
    exact = exact_gradient(model, shares)
    draws = pathwise(model, POINT, OFF_MU, OFF_LOG_VAR, 60_000)
    assert (draws.std(0) / math.sqrt(len(draws)) < 0.02 * exact.abs().max()).all()
    assert agrees(draws, exact)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["reparam", "dreg"])
@pytest.mark.parametrize(("name", "settings", "shares"), OBJECTIVES)
def test_reparam_and_dreg_are_unbiased(
    name: str, settings: dict[str, Any], shares: dict[int, float], estimator: str
) -> None:
    unbiased_law(name, settings, shares, estimator, true_posterior)


@pytest.mark.parametrize(("name", "settings", "shares"), OBJECTIVES)
def test_stl_is_unbiased_for_single_sample_bounds_only(
    name: str, settings: dict[str, Any], shares: dict[int, float]
) -> None:
    """Where the weights depend on z, the estimator without the score function is biased (Tucker et al. 2018)."""
    if set(shares) == {1}:
        unbiased_law(name, settings, shares, "stl", true_posterior)
    else:
        with pytest.raises(AssertionError):
            unbiased_law(name, settings, shares, "stl", true_posterior)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "estimator"),
    [("iwae", "reparam"), ("iwae", "stl"), ("iwae", "dreg"), ("miwae", "dreg"), ("piwae", "reparam"), ("ciwae", "stl")],
)
def test_a_linear_model_becomes_probabilistic_pca(name: str, estimator: str, adam: Any) -> None:
    """The evidence reaches the maximum likelihood of scikit-learn's PCA without exceeding it."""
    n = 200
    x = torch.randn(n, 2).double() @ (0.7 * torch.randn(2, 5).double()) + 0.5 * torch.randn(n, 5).double() + 1
    model = linear(name, 2, 5, estimator=estimator, **SETTINGS[name])
    adam(model, x, steps=200, lr=0.1, batch=n)
    # scikit-learn divides by N - 1: for samples scaled by sqrt((N - 1) / N) its fit is that of maximum likelihood
    top = PCA(2).fit(((x - x.mean(0)) * math.sqrt((n - 1) / n) + x.mean(0)).numpy()).score(x.numpy())
    reached = evidence(model, x).mean().item()
    assert top - 0.02 < reached < top + 1e-6
    with torch.no_grad():
        slack = reached - torch.stack([model.loss(x)["elbo"] for _ in range(30)]).mean().item()
    assert -0.005 < slack < 0.05


# ---- known mistakes -------------------------------------------------------------------------------------------------


class PyTorchVAE(IWAE):
    """As PyTorch-VAE: the analytic KL for every sample, weights that favour the worst sample and are not detached."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        _, nll, sampled = self.draw(x, self.n_samples)
        loss = nll + analytic_kl(self, x, sampled)
        value = (loss.softmax(1) * loss).sum(1).mean()
        return {"loss": value, "nll": nll.mean(), "kl": sampled.mean(), "elbo": -value}


class AnalyticKL(IWAE):
    """The analytic KL in place of log q - log p of each sample."""

    def draw(self, x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        z, nll, kl = super().draw(x, n)
        return z, nll, analytic_kl(self, x, kl)


class AttachedWeights(IWAE):
    """The right value, but weights that are not detached."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        torch.manual_seed(3)  # the same noise as in `codes`
        _, nll, kl = self.draw(x, self.n_samples)
        log_w = -(nll + kl)
        surrogate = (log_w.softmax(1) * log_w).sum(1).mean()
        value = terms["elbo"].detach() + (surrogate - surrogate.detach())
        return terms | {"elbo": value, "loss": -value}


class MeanOfLogs(IWAE):
    """The VAE's ELBO with K samples."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        return terms | {"loss": terms["nll"] + terms["kl"], "elbo": -(terms["nll"] + terms["kl"])}


class IWAEUnderMIWAE(MIWAE):
    """PyTorch-VAE's MIWAE: one bound over all samples."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        _, nll, kl = self.draw(x, self.n_groups * self.n_samples)
        value = (torch.logsumexp(-(nll + kl), 1) - math.log(nll.shape[1])).mean()
        return {"loss": -value, "nll": nll.mean(), "kl": kl.mean(), "elbo": value}


class SharedObjective(PIWAE):
    """PIWAE whose encoder and decoder both maximise the IWAE's bound."""

    def loss(self, x: Tensor, y: Any = None) -> dict[str, Tensor]:
        terms = super().loss(x)
        torch.manual_seed(3)
        _, nll, kl = self.draw(x, self.n_groups * self.n_samples)
        value = (torch.logsumexp(-(nll + kl), 1) - math.log(nll.shape[1])).mean()
        return terms | {"loss": -value, "elbo": value}


def analytic_kl(model: VAE, x: Tensor, like: Tensor) -> Tensor:
    posterior = q(model, x)
    prior = D.Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
    return D.kl_divergence(posterior, prior).sum(2).expand_as(like)


@pytest.mark.parametrize(
    ("name", "mistake", "law"),
    [
        ("iwae", PyTorchVAE, value_law),
        ("iwae", PyTorchVAE, encoder_law),
        ("iwae", AnalyticKL, value_law),
        ("iwae", AnalyticKL, encoder_law),
        ("iwae", AttachedWeights, encoder_law),
        ("iwae", AttachedWeights, decoder_law),
        ("iwae", MeanOfLogs, value_law),
        ("iwae", MeanOfLogs, decoder_law),
        ("miwae", IWAEUnderMIWAE, value_law),
        ("miwae", IWAEUnderMIWAE, encoder_law),
        ("piwae", SharedObjective, encoder_law),
    ],
)
def test_wrong_importance_bounds_are_detected(name: str, mistake: Any, law: Any) -> None:
    def make(name: str, **settings: Any) -> Any:
        model = small(name, **settings)
        model.__class__ = mistake
        return model

    with pytest.raises(AssertionError):
        law(name, make, "reparam")


# ---- extreme values, calls of the networks, noise --------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_that_underflow_leave_finite_gradients(name: str, estimator: str) -> None:
    """Samples that are thousands of nats apart, in float32, and log-variances at both ends of the clamp."""
    settings = SETTINGS[name] | ({"beta": 0.0} if name == "ciwae" else {})
    model = small(name, estimator=estimator, **settings).float()
    with torch.no_grad():
        model.decoder[1].weight *= 300
        model.decoder[3].weight *= 300
    for log_var in (-50.0, 0.0, 50.0):
        with torch.no_grad():
            model.encoder[-2].bias[4:] = log_var
            model.encoder[-2].weight[4:] = 0
        terms = model.loss(data().float())
        assert all(value.isfinite() for value in terms.values())
        assert gradient(terms["loss"], [*model.parameters()]).isfinite().all()


@pytest.mark.parametrize("name", SETTINGS)
def test_encoder_runs_once_and_codes_are_decoded_once(name: str) -> None:
    model, rows = small(name, **SETTINGS[name]), []
    model.encoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.decoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    model.loss(data(5))
    assert rows == [5, 30, 30] if name == "piwae" else rows == [5, 30]


@pytest.mark.parametrize("name", SETTINGS)
def test_noise_is_independent_per_sample_and_draw(name: str) -> None:
    model, n = small(name, **SETTINGS[name]), 2000
    mu, log_var = torch.tensor([[0.5, -2.0, 0.0, 1.0]]).double(), torch.tensor([[-3.0, 1.0, 0.0, -1.0]]).double()
    _, z = codes(at(model, mu.expand(n, 4), log_var.expand(n, 4)), data(n))
    eps = ((z - mu) / (0.5 * log_var).exp()).flatten(1)
    assert eps.shape == (n, 24)
    assert (eps.mean(0).abs() < 5 / math.sqrt(n)).all()
    assert (torch.cov(eps.T) - torch.eye(24).double()).abs().max() < 6 / math.sqrt(n)
    assert (eps[1:] * eps[:-1]).mean(0).abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize(
    ("name", "settings", "word"),
    [
        ("iwae", {"n_samples": 0}, "n_samples"),
        ("iwae", {"estimator": "score"}, "reparam, stl, dreg"),
        ("miwae", {"n_groups": 0}, "n_groups"),
        ("miwae", {"n_samples": 0}, "n_samples"),
        ("piwae", {"n_groups": 0}, "n_groups"),
        ("piwae", {"estimator": "STL"}, "reparam, stl, dreg"),
        ("ciwae", {"beta": 1.5}, "between 0 and 1"),
        ("ciwae", {"beta": -0.1}, "between 0 and 1"),
    ],
)
def test_invalid_values_are_refused(name: str, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(aezoo.AezooError, match=word):
        aezoo.create_model(name, input_shape=(4,), **settings)
