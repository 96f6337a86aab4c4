"""Likelihoods and densities on the sphere compared with scipy.stats, or torch.distributions where scipy has none."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.differentiate import derivative
from scipy.integrate import quad
from scipy.special import expit, hyp1f1, logit
from torch import Tensor

import aezoo
from aezoo.manifolds.sphere import FAMILIES

SHAPE, BATCH, SCALE = (4,), 6, 0.3


def create(name: str, likelihood: str | None) -> Any:
    settings = {} if likelihood is None else {"likelihood": likelihood}
    return aezoo.create_model(name, SHAPE, latent_dim=3, **settings).double()


def levels() -> Tensor:
    """Bytes divided by 255, with both ends."""
    x = torch.randint(256, (BATCH, *SHAPE))
    x[0, 0], x[0, 1] = 0, 255
    return x / 255


def discretised_logistic(x: Any, loc: Any) -> Any:
    upper, lower = stats.logistic.cdf(x + 0.5 / 255, loc, SCALE), stats.logistic.cdf(x - 0.5 / 255, loc, SCALE)
    return np.log(np.where(x == 1, 1.0, upper) - np.where(x == 0, 0.0, lower))


def beta_binomial(x: Any, params: Any) -> Any:
    return stats.betabinom.logpmf(np.rint(255 * x), 255, SCALE * expit(params), SCALE * expit(-params))


def logit_laplace(x: Any, params: Any) -> Any:
    y = 0.8 * x + 0.1
    # change of variables from x to logit y
    return stats.laplace.logpdf(logit(y), params, SCALE) + np.log(0.8 / (y * (1 - y)))


# model, likelihood, log-density of values given decoder outputs, kind of data, function of scipy
DENSITIES = [
    ("vae", "bernoulli", lambda x, p: stats.bernoulli.logpmf(x, expit(p)), "binary", "bernoulli"),
    ("vae", f"gaussian:{SCALE}", lambda x, p: stats.norm.logpdf(x, p, SCALE), "unit", "norm"),
    ("linear_ae", None, lambda x, p: stats.norm.logpdf(x, p, np.sqrt(0.5)), "unit", "norm"),
    ("vae", f"laplace:{SCALE}", lambda x, p: stats.laplace.logpdf(x, p, SCALE), "unit", "laplace"),
    ("logcosh_vae", None, lambda x, p: stats.hypsecant.logpdf(x, p, 0.1), "unit", "hypsecant"),
    ("vae", f"discretised_logistic:{SCALE}", discretised_logistic, "levels", "logistic.cdf"),
    ("vae", f"beta_binomial:{SCALE}", beta_binomial, "levels", "betabinom"),
    ("vae", f"logit_laplace:{SCALE}", logit_laplace, "unit", "laplace"),
]


@pytest.mark.parametrize(("name", "likelihood", "log_density", "data", "part"), DENSITIES)
def test_log_likelihoods_of_values(compare, name, likelihood, log_density, data, part):
    model = create(name, likelihood)
    x = {"binary": torch.rand(BATCH, *SHAPE).bernoulli(), "unit": torch.rand(BATCH, *SHAPE), "levels": levels()}[data]
    params = torch.randn(BATCH, *SHAPE, requires_grad=True)
    found, at = model.nll(params, x), params.detach().numpy()
    row = compare(name, "scipy", f"stats.{part}")
    named = "" if likelihood is None else f" of {likelihood.split(':')[0]}"
    row.equal(f"nll{named}", found, -log_density(x.numpy(), at).sum(1))
    expected = derivative(lambda p, x: -log_density(x, p), at, args=(x.numpy(),), initial_step=0.01)
    (gradient,) = torch.autograd.grad(found.sum(), params)
    row.equal(f"gradient of nll{named} by the decoder's output", gradient, expected.df)


def test_log_likelihood_of_continuous_bernoulli(compare):
    model, x, params = create("vae", "continuous_bernoulli"), torch.rand(BATCH, *SHAPE), torch.randn(BATCH, *SHAPE)
    params.requires_grad_(True)
    theirs = torch.distributions.ContinuousBernoulli(logits=params)
    found, expected = model.nll(params, x), -theirs.log_prob(x).sum(1)
    row = compare("vae", "torch", "distributions.ContinuousBernoulli")
    row.equal("nll of continuous_bernoulli", found, expected)
    row.equal("mean of continuous_bernoulli", model.likelihood.mean(params), theirs.mean)
    gradients = [torch.autograd.grad(loss.sum(), params)[0] for loss in (found, expected)]
    row.equal("gradient of nll of continuous_bernoulli by the decoder's output", *gradients)


def test_means_of_discrete_likelihoods(compare):
    params = torch.randn(*SHAPE)
    model = create("vae", f"discretised_logistic:{SCALE}")
    # the mean of a logistic variable clipped to [0, 1]
    expected = [quad(stats.logistic(p, SCALE).sf, 0, 1)[0] for p in params.tolist()]
    row = compare("vae", "scipy", "stats.logistic, integrate.quad")
    row.equal("mean of discretised_logistic", model.likelihood.mean(params), np.array(expected))
    model, p = create("vae", f"beta_binomial:{SCALE}"), params.numpy()
    expected = stats.betabinom(255, SCALE * expit(p), SCALE * expit(-p)).mean() / 255
    compare("vae", "scipy", "stats.betabinom").equal("mean of beta_binomial", model.likelihood.mean(params), expected)


@pytest.mark.parametrize("d", [2, 3, 5, 16])
def test_densities_of_von_mises_and_fisher(compare, d):
    model = aezoo.create_model("hyperspherical_vae", SHAPE, latent_dim=d, hidden_dims=(5,), posterior="vmf").double()
    mean, kappa = torch.nn.functional.normalize(torch.randn(BATCH, d)), torch.tensor([0.01, 0.5, 2.0, 9.0, 60.0, 300.0])
    z = torch.nn.functional.normalize(mean + 0.5 * torch.randn(BATCH, d))
    theirs = [stats.vonmises_fisher(m, k) for m, k in zip(mean.numpy(), kappa.tolist(), strict=True)]
    row = compare("hyperspherical_vae", "scipy", "stats.vonmises_fisher")
    density = [one.logpdf(at) for one, at in zip(theirs, z.numpy(), strict=True)]
    row.equal("log-density of codes, vmf", FAMILIES["vmf"](d).log_prob(z, mean, kappa), np.array(density))
    entropy = np.array([one.entropy() for one in theirs])
    # the log-density of the uniform distribution is minus the logarithm of the sphere's area
    at_zero = stats.vonmises_fisher(mean[0].numpy(), 1e-12).logpdf(z[0].numpy())
    row.equal("log-density of the prior", model.log_prior(z)[0], at_zero)
    row.equal("kl of vmf", model.kl(mean, kappa[:, None].expand(BATCH, d)), -entropy - at_zero)


class Kummer(torch.autograd.Function):
    """scipy's 1F1(1/2; b; -s), with its derivative (https://dlmf.nist.gov/13.3.E15)."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, b: float) -> Tensor:
        ctx.save_for_backward(s)
        ctx.b = b
        return torch.from_numpy(hyp1f1(0.5, b, -s.numpy()))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        slope = -0.5 / ctx.b * hyp1f1(1.5, ctx.b + 1, -s.numpy())
        return gradients[0] * torch.from_numpy(slope), None


@pytest.mark.parametrize("d", [2, 5, 24])
def test_cramer_wold_distance(compare, d):
    n = 9
    model = aezoo.create_model("cw_ae", SHAPE, latent_dim=d, hidden_dims=(5,), cw_weight=2.0).double()
    other, x = copy.deepcopy(model), torch.rand(n, *SHAPE)
    found, z = model.loss(x), other.encoder(x)
    c = (4 / (3 * n)) ** 0.4
    squares = (z[:, None] - z).square().sum(2)
    within = Kummer.apply(squares / (4 * c), d / 2).mean() / math.sqrt(c)
    across = Kummer.apply(z.square().sum(1) / (2 + 4 * c), d / 2).mean() / math.sqrt(c + 0.5)
    distance = (within + 1 / math.sqrt(1 + c) - 2 * across) / (2 * math.sqrt(math.pi))
    nll = (x - other.decoder(z)).square().sum(1).mean() + 0.5 * SHAPE[0] * math.log(math.pi)
    expected = nll + 2 * torch.log(distance)
    row = compare("cw_ae", "scipy", "special.hyp1f1")
    if d >= 20:
        reason = "from 20 dimensions on ours has the paper's approximation of 1F1"
        row.deviates("log_cw in 24 dimensions", found["log_cw"], torch.log(distance), reason, follows="both")
        return
    row.equal("log_cw", found["log_cw"], torch.log(distance))
    row.equal("loss", found["loss"], expected)
    row.equal_gradients(found["loss"], expected, zip(model.parameters(), other.parameters(), strict=True))
