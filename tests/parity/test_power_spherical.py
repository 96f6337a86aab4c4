"""The power spherical distribution of its authors (De Cao & Aziz 2020).

Source: https://github.com/nicola-decao/power_spherical
"""

import copy
from unittest import mock

import pytest
import torch
from comparison import noise
from power_spherical import HypersphericalUniform, PowerSpherical
from scipy.differentiate import derivative
from scipy.special import betaincinv
from torch.nn import functional as F

import aezoo


@pytest.mark.parametrize("d", [3, 6])
def test_loss_at_equal_draws(compare, d):
    shape, n = (4,), 5
    model = aezoo.create_model("hyperspherical_vae", shape, latent_dim=d, hidden_dims=(6,), beta=0.7).double()
    with torch.no_grad():
        # their reflection equals ours where the mean points away from the first axis
        model.encoder[-2].bias[0] = -5.0
        model.encoder[-2].bias[-1] -= 8  # a small concentration, at which theirs loses no precision
    other, x = copy.deepcopy(model), torch.rand(n, *shape).bernoulli()
    u, side = torch.rand(n), torch.randn(n, d - 1)
    with mock.patch("torch.rand_like", return_value=u), noise([side]):
        found = model.loss(x)
    out = other.encoder(x)
    assert (out[:, 0] < 0).all()
    mean, kappa = F.normalize(out[:, :-1]), d * F.softplus(out[:, -1]) + 1
    # torch's gradient of a beta draw has about three digits, so that of kappa is compared with scipy's quantiles
    q = PowerSpherical(mean, kappa.detach())
    t = torch.cos(model.family.quantile(kappa.detach(), u))
    # theirs draws (1 + t) / 2 from a beta distribution
    beta = torch.stack([(1 + t) / 2, (1 - t) / 2], -1)
    direction = F.normalize(side)
    with (
        mock.patch("torch._sample_dirichlet", return_value=beta),
        mock.patch.object(HypersphericalUniform, "rsample", return_value=direction),
    ):
        z = q.rsample()
    uniform = HypersphericalUniform(d, dtype=x.dtype)
    kl = torch.distributions.kl_divergence(PowerSpherical(mean, kappa), uniform)
    nll = F.binary_cross_entropy_with_logits(other.decoder(z), x, reduction="none").sum(1)
    expected = (nll + 0.7 * kl).mean()
    row = compare("hyperspherical_vae", "power-spherical", "PowerSpherical")
    row.equal("loss", found["loss"], expected)
    row.equal("nll", found["nll"], nll.mean())
    row.equal("kl", found["kl"], kl.mean())
    row.equal("log-density of codes", model.family.log_prob(z, mean, kappa), q.log_prob(z))
    row.equal("log-density of the prior", model.log_prior(z), uniform.log_prob(z))
    decoders = zip(model.decoder.parameters(), other.decoder.parameters(), strict=True)
    row.equal_gradients(found["loss"], expected, decoders, "gradient of the decoder")
    encoders = [*zip(model.encoder.parameters(), other.encoder.parameters(), strict=True)]
    row.equal_gradients(found["kl"], kl.mean(), encoders, "gradient of the kl")
    ours, weight = model.posterior(x)[0], torch.randn_like(z)
    with mock.patch("torch.rand_like", return_value=u), noise([side]):
        drawn = model.family.sample(ours, kappa.detach())
    row.equal("codes", drawn, z)
    row.equal_gradients((weight * drawn).sum(), (weight * z).sum(), encoders, "gradient of the codes by the mean")
    slopes = torch.autograd.grad(model.family.quantile(kappa, u).cos().sum(), kappa)
    b = (d - 1) / 2
    quantile = derivative(
        lambda kappa, u: 2 * betaincinv(b + kappa, b, 1 - u) - 1, kappa.detach().numpy(), args=(u.numpy(),)
    )
    row = compare("hyperspherical_vae", "scipy", "special.betaincinv, differentiate.derivative")
    row.equal("gradient of the draw's cosine by kappa", slopes[0], quantile.df)
