"""The mean of posteriors as a prior of codes, and a kernel density for codes without posteriors."""

import numpy as np
import pytest
import torch
import torch.distributions as D
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KernelDensity

import aezoo
from aezoo.tasks import priors
from aezoo.tasks.generate import generate
from aezoo.tasks.priors_vamp import Kernel, Posteriors


def posteriors(n=40, size=3):
    rng = np.random.default_rng(0)
    return 2 * rng.standard_normal((n, size)), rng.uniform(-3, 0.5, (n, size))


def test_mixture_density_is_independent_of_chunk_size(monkeypatch):
    means, log_vars = posteriors()
    parts = D.Independent(D.Normal(torch.from_numpy(means), torch.from_numpy(np.exp(log_vars / 2))), 1)
    mixture = D.MixtureSameFamily(D.Categorical(torch.ones(40)), parts)
    z = np.random.default_rng(1).standard_normal((57, 3))
    expected = mixture.log_prob(torch.from_numpy(z)).numpy()
    for limit in (10**9, 500, 1):
        monkeypatch.setattr("aezoo.tasks.priors_vamp._MAX_VALUES", limit)
        assert np.allclose(Posteriors(means, log_vars).log_prob(z), expected, atol=1e-10)


def test_samples_have_mixture_moments():
    means, log_vars = posteriors()
    drawn = Posteriors(means, log_vars).sample(200_000, seed=0)
    covariance = np.cov(means.T, bias=True) + np.diag(np.exp(log_vars).mean(0))
    assert np.abs(drawn.mean(0) - means.mean(0)).max() < 0.03
    assert np.abs(np.cov(drawn.T) - covariance).max() < 0.05


@pytest.mark.slow
def test_kernel_width_maximises_leave_one_out_likelihood(monkeypatch):
    rng = np.random.default_rng(0)
    t = np.where(rng.random((120, 2)) < 0.5, -1, 1) + 0.15 * rng.standard_normal((120, 2))
    monkeypatch.setattr("aezoo.tasks.priors_vamp._LEFT_OUT", 120)
    width = Kernel(t, 0).width

    def likelihood(h):
        return cross_val_score(KernelDensity(bandwidth=h), t, cv=LeaveOneOut()).mean()

    assert 0.03 < width < 0.3
    assert likelihood(width) > max(likelihood(0.9 * width), likelihood(1.1 * width))


@pytest.mark.parametrize("name", ["vae", "dense_ae"])
def test_generate_uses_posteriors_or_kernel_density(name, monkeypatch):
    torch.manual_seed(0)
    model = aezoo.create_model(name, (6,), latent_dim=2, hidden_dims=(8,), likelihood="gaussian")
    seen, fit = [], priors.fit

    def watched(*args, **kwargs):
        seen.append(fit(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(priors, "fit", watched)
    x = torch.randn(50, 6)
    found = generate(model, fit_on=x, prior="vamp", n=9)
    assert found.samples.shape == (9, 6) and "vamp, fitted to 50 codes" in found.source
    (fitted,) = seen
    if name == "dense_ae":
        assert isinstance(fitted.density, Kernel)
    else:
        with torch.no_grad():
            mean, log_var = model.posterior(x)
        assert np.allclose(fitted.means_ND, mean) and np.allclose(fitted.log_vars_ND, log_var)
        # the aggregate posterior is the prior that minimises the KL term
        z = Posteriors(mean.numpy(), log_var.numpy()).sample(20_000, 1)
        normal = D.Normal(0.0, 1.0).log_prob(torch.from_numpy(z)).sum(1).mean()
        assert fitted.log_prob(z).mean() > normal
