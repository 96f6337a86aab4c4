"""The Poincare ball of geoopt (Kochurov et al. 2020).

Source: https://github.com/geoopt/geoopt
"""

import copy
import warnings

import pytest
import torch
from comparison import noise
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.nn import functional as F

import aezoo

# warnings of torch.jit.script
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import geoopt

SHAPE, LATENT, BATCH = (6,), 3, 5


def log_density(ball: geoopt.PoincareBall, mean: Tensor, std: Tensor, v: Tensor) -> Tensor:
    """The wrapped normal's density with respect to the Riemannian volume, at the v of a code, by geoopt's Jacobian."""

    def code(mean: Tensor, v: Tensor) -> Tensor:
        return ball.expmap(mean, v / ball.lambda_x(mean, keepdim=True))

    # rows are independent, so the Jacobian of their sum contains that of each
    jacobian = torch.autograd.functional.jacobian(lambda v: code(mean, v).sum(0), v, create_graph=True)
    log_det = torch.linalg.slogdet(jacobian.transpose(0, 1))[1]
    # the volume element is lambda^D
    volume = LATENT * torch.log(ball.lambda_x(code(mean, v)))
    return Independent(Normal(torch.zeros_like(v), std), 1).log_prob(v) - log_det - volume


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
def test_losses_in_the_ball(compare, c):
    model = aezoo.create_model("poincare_vae", SHAPE, latent_dim=LATENT, hidden_dims=(7,), curvature=c, beta=0.7)
    model = model.double()
    with torch.no_grad():
        model.encoder[-2].bias.add_(torch.randn(2 * LATENT))
    other, ball = copy.deepcopy(model), geoopt.PoincareBall(c=torch.tensor(c))
    x, eps = torch.rand(BATCH, *SHAPE).bernoulli(), torch.randn(BATCH, LATENT)
    with noise([eps]):
        found = model.loss(x)
    coordinates, log_var = other.encoder(x).chunk(2, 1)
    mean, std = ball.expmap0(coordinates / 2), torch.exp(0.5 * log_var)
    with noise([eps]):
        drawn = ball.wrapped_normal(BATCH, LATENT, mean=mean, std=std).as_subclass(Tensor)
    # theirs has no gradient
    z = ball.expmap(mean, std * eps / ball.lambda_x(mean, keepdim=True))
    v = ball.lambda_x(mean, keepdim=True) * ball.logmap(mean, z)
    at_0 = 2 * ball.logmap0(z)
    nll = F.binary_cross_entropy_with_logits(other.decoder[1](at_0), x, reduction="none").sum(1)
    origin = torch.zeros_like(z)
    log_q, log_p = log_density(ball, mean, std, v), log_density(ball, origin, torch.ones_like(std), at_0)
    expected = (nll + 0.7 * (log_q - log_p)).mean()
    with noise([eps]):
        ours, _ = model.draw(coordinates, log_var)
    row = compare("poincare_vae", "geoopt", "PoincareBall")
    row.equal("loss", found["loss"], expected)
    row.equal("nll", found["nll"], nll.mean())
    row.equal("kl", found["kl"], (log_q - log_p).mean())
    row.equal_gradients(found["loss"], expected, zip(model.parameters(), other.parameters(), strict=True))
    row.equal("codes", model.encode(x), mean)
    row.equal("draws from the posterior", ours, drawn)
    row.equal("log-density of the prior", model.log_prior(z.detach()), log_p)
    row.equal("distances from the centre", model.ball(z).norm(dim=1), ball.dist0(z))
    row.equal("distances from the mean", model.ball.log(mean, z).norm(dim=1), ball.dist(mean, z))
    with noise([eps]):
        sample = model.sample_prior(BATCH)
    with noise([eps]):
        drawn = ball.wrapped_normal(BATCH, LATENT, mean=origin, std=1.0)
    row.equal("draws from the prior", sample, drawn.as_subclass(Tensor))
