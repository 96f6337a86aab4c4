"""Laws of DMVAE, the private-shared disentangled multimodal VAE (Lee & Pavlovic 2021)."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from multimodal_laws import (  # noqa: F401
    CODE,
    PARTS,
    PRIOR,
    SHAPE,
    assert_same_terms,
    given_noise,
    images,
    normal,
    small_vae,
    test_inconsistent_part_sizes_are_refused,
    test_other_experts_get_no_reconstruction_gradient,
    test_part_sizes_may_be_list_and_capacity_is_refused,
    test_partial_reconstruction_ignores_other_modalities,
    test_score_is_noise_free_bound_of_all_parts,
    test_unknown_parts_are_refused,
)
from torch import Tensor, nn

from aezoo import AezooError
from aezoo.models.variational.dmvae import DMVAE
from aezoo.models.variational.mvae import MVAE

M, P = 3, 2


C = CODE + M * P


SUBSETS = [chosen for n in (1, 2, 3) for chosen in itertools.combinations(range(M), n)]


TERMS = ("loss", "nll", "kl", "elbo", "cross_nelbo")


def small(shifted: Any, **settings: Any) -> Any:
    given = {"parts": PARTS, "latent_dim": CODE, "private_dim": P, "hidden_dims": (8,), **settings}
    return shifted(DMVAE(SHAPE, **given).double())


def with_noise(model: Any, x: Tensor, eps: Tensor | None = None) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        return model.loss(x)


def own(model: Any, x: Tensor) -> list[tuple[Tensor, ...]]:
    """For each part mean and log-variance of u, then of w."""
    found = []
    for net, part in zip(model.encoder, x.split(PARTS, 1), strict=True):
        (mu, mu_w), (log_var, log_var_w) = (v.split([CODE, P], 1) for v in net(part).chunk(2, 1))
        found.append((mu, log_var, mu_w, log_var_w))
    return found


def product(experts: list[tuple[Tensor, ...]]) -> D.Independent:
    """The product of the experts of the shared code and the prior."""
    precision = 1 + sum(1 / log_var.exp() for _, log_var, *_ in experts)
    mean = sum(mu / log_var.exp() for mu, log_var, *_ in experts) / precision
    return D.Independent(D.Normal(mean, precision**-0.5), 1)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_is_joint_elbo_plus_shared_code_elbos(shifted: Any) -> None:
    model, x, eps = small(shifted, beta=3.0), images(), torch.randn(5, 1 + M, C, dtype=torch.float64)
    terms, parts = with_noise(model, x, eps), own(model, x)
    private = D.Independent(D.Normal(torch.zeros(P).double(), torch.ones(P).double()), 1)
    kl_w = sum(D.kl_divergence(normal(*expert[2:]), private) for expert in parts)
    nll, kl = [], []
    for s, chosen in enumerate([parts, parts[:1], parts[1:2], parts[2:]]):
        q, (eps_u, *eps_w) = product(chosen), eps[:, s].split([CODE, P, P, P], 1)
        w = [mu + (0.5 * log_var).exp() * e for (*_, mu, log_var), e in zip(parts, eps_w, strict=True)]
        u = q.mean + q.stddev * eps_u
        x_hat = torch.cat([model.decoder[i](torch.cat([u, w[i]], 1)) for i in range(M)], 1).sigmoid()
        nll.append(-D.Bernoulli(probs=x_hat, validate_args=False).log_prob(x).flatten(1).sum(1))
        kl.append(D.kl_divergence(q, PRIOR) + kl_w)
    cross = sum(n + 3.0 * k for n, k in zip(nll[1:], kl[1:], strict=True))
    expected = (nll[0] + 3.0 * kl[0] + cross, nll[0], kl[0], -(nll[0] + kl[0]), cross)
    means = {term: values.mean() for term, values in zip(TERMS, expected, strict=True)}
    assert_same_terms(model, terms, means)


@pytest.mark.parametrize("training", [True, False])
def test_without_private_codes_joint_elbo_equals_mvae(training: bool, shifted: Any) -> None:
    """Only the joint ELBO: MVAE's ELBO of a single part decodes this part alone."""
    model, x = small(shifted, private_dim=0, beta=3.0), images()
    other = MVAE(SHAPE, parts=PARTS, latent_dim=CODE, hidden_dims=(8,), beta=3.0, n_subsets=0).double()
    other.load_state_dict(model.state_dict())
    found: list[Any] = []
    for each in (model, other):
        terms = with_noise(each.train(training), x, torch.full((5, 1 + M, CODE), 0.3, dtype=torch.float64))
        called = [getattr(each.eval(), call)(x) for call in ("encode", "forward", "score")]
        gradients = torch.autograd.grad(terms["elbo"], [*each.parameters()])
        subsets = [values for chosen in SUBSETS for values in each.infer(x, chosen)]
        found.append([terms["nll"], terms["kl"], terms["elbo"], *called, *gradients, *subsets])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_one_modality_equals_vae_with_prior_expert(training: bool, shifted: Any) -> None:
    vae = small_vae(shifted, beta=3.0)
    model = small(shifted, parts=(6,), latent_dim=CODE - 1, private_dim=1, beta=3.0)
    model.load_state_dict({name.replace("coder.", "coder.0.", 1): value for name, value in vae.state_dict().items()})
    plain = vae.posterior

    def with_prior(x: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = plain(x)
        precision = 1 / log_var.exp() + torch.tensor([1.0] * (CODE - 1) + [0.0])
        return mu / log_var.exp() / precision, -precision.log()

    vae.posterior = with_prior
    x, found = images(), []
    for each in (model, vae):
        torch.manual_seed(3)
        terms = each.train(training).loss(x)
        called = [getattr(each.eval(), call)(x) for call in ("encode", "forward", "score")]
        found.append([terms[term] for term in TERMS[:4]] + called)
        found[-1] += [*torch.autograd.grad(terms["loss"], [*each.parameters()])]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert model.loss(x)["cross_nelbo"] == 0


def test_private_codes_affect_their_own_part_only(shifted: Any) -> None:
    """Gradients of the likelihood of each part by the means and log-variances of the three encoders."""
    model, x = small(shifted, beta=0.0), images()
    values = [v.detach().requires_grad_() for v in model.experts(x)]
    model.experts = lambda x, parts=None: tuple(values)
    weight = torch.zeros(SHAPE).double()
    model.nll = lambda params, x: (params * weight).flatten(1).sum(1)
    for only, rows in enumerate(torch.arange(6).split(PARTS)):
        weight.zero_()[rows] = 1.0
        for term in ("nll", "cross_nelbo"):
            for grad in torch.autograd.grad(with_noise(model, x, torch.ones(5, 1 + M, C).double())[term], values):
                shared, private = grad[..., :CODE], grad[..., CODE:]
                assert [(g.abs().max() > 0).item() for g in private.unbind(1)] == [i == only for i in range(M)]
                assert all(g.abs().max() > 0 for g in shared.unbind(1))


# ---- codes -----------------------------------------------------------------------------------------------------------


def test_codes_are_shared_product_and_private_or_prior(shifted: Any) -> None:
    model, x = small(shifted).eval(), images()
    parts = own(model, x)
    for chosen in [order for subset in SUBSETS for order in itertools.permutations(subset)]:
        q = product([parts[i] for i in chosen])
        mean, log_var = model.infer(x, chosen)
        torch.testing.assert_close(mean[:, :CODE], q.mean)
        torch.testing.assert_close(log_var[:, :CODE].exp(), q.variance)
        for values, k in ((mean, 2), (log_var, 3)):
            for i, w in enumerate(values[:, CODE:].split(P, 1)):
                torch.testing.assert_close(w, parts[i][k] if i in chosen else torch.zeros_like(w), rtol=0, atol=0)
    assert model.encode(x).shape == (5, C) == (5, *model.code_shape)


def test_posterior_draw_densities_match(shifted: Any) -> None:
    model, x = small(shifted), images(2)
    z, log_q = model.sample_posterior(x, 50)
    torch.testing.assert_close(log_q, normal(*model.infer(x)).log_prob(z))
    assert model.sample(3).shape == (3, *SHAPE)


# ---- exact evidence --------------------------------------------------------------------------------------------------


SIZES, SCALE = (3, 4, 2), 0.6


class Linear:
    """x_i = U_i u + W_i w_i + m_i + noise with orthogonal columns of each [U_i W_i], for diagonal posteriors; in numpy.

    Codes are (u, w_1, w_2, w_3), one number each.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.own = [np.linalg.qr(rng.normal(size=(n, 2)))[0] * rng.uniform(0.5, 1.5, 2) for n in SIZES]
        self.m = rng.normal(size=9)
        self.loads, row = np.zeros((9, 4)), 0
        for i, own in enumerate(self.own):
            self.loads[row : row + len(own), [0, 1 + i]] = own
            row += len(own)
        self.x = rng.normal(size=(4, 4)) @ self.loads.T + self.m + SCALE * rng.normal(size=(4, 9))

    def evidence(self) -> np.ndarray:
        covariance = self.loads @ self.loads.T + SCALE**2 * np.eye(9)
        off = self.x - self.m
        distance = (off * np.linalg.solve(covariance, off.T).T).sum(1)
        return -0.5 * (distance + np.linalg.slogdet(2 * np.pi * covariance)[1])

    def posterior(self, rows: Any = range(9)) -> tuple[np.ndarray, np.ndarray]:
        """Means (4, C) and variances (C,) of all codes by these rows of x."""
        loads = self.loads[[*rows]]
        precision = np.eye(4) + loads.T @ loads / SCALE**2
        np.testing.assert_allclose(precision, np.diag(np.diag(precision)), atol=1e-12)
        variance = 1 / np.diag(precision)
        return (self.x - self.m)[:, [*rows]] @ loads * variance / SCALE**2, variance

    def model(self) -> Any:
        """A DMVAE with these decoders, and encoders at p(x_i|u) as a function of u, and p(w_i|x_i)."""
        made: Any = DMVAE(
            (9,), parts=SIZES, latent_dim=1, private_dim=1, hidden_dims=(), likelihood=f"gaussian:{SCALE}"
        ).double()
        for i, rows in enumerate(np.split(np.arange(9), np.cumsum(SIZES)[:-1])):
            (down,), (up,) = (
                [m for m in nets[i].modules() if isinstance(m, nn.Linear)] for nets in (made.encoder, made.decoder)
            )
            precision = (self.own[i] ** 2).sum(0) / SCALE**2 + [0, 1]
            to_mean = self.own[i].T / precision[:, None] / SCALE**2
            with torch.no_grad():
                up.weight.copy_(torch.from_numpy(self.own[i]))
                up.bias.copy_(torch.from_numpy(self.m[rows]))
                down.weight.copy_(torch.from_numpy(np.concatenate([to_mean, 0 * to_mean])))
                down.bias.copy_(torch.from_numpy(np.concatenate([-to_mean @ self.m[rows], -np.log(precision)])))
        return made.eval()


ROWS = [[*rows] for rows in np.split(np.arange(9), np.cumsum(SIZES)[:-1])]


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
def test_exact_likelihood_experts_give_any_posterior(chosen: tuple[int, ...]) -> None:
    linear = Linear()
    mean, variance = linear.posterior([row for i in chosen for row in ROWS[i]])
    found_mean, found_log_var = linear.model().infer(torch.from_numpy(linear.x), chosen)
    np.testing.assert_allclose(found_mean.detach().numpy(), mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found_log_var.exp().detach().numpy(), variance[None].repeat(4, 0), rtol=1e-9)


def test_exact_posterior_weights_equal_evidence() -> None:
    """Each ELBO is below the evidence by the KL of its posterior from the exact one."""
    linear = Linear()
    model, x, evidence = linear.model(), torch.from_numpy(linear.x), linear.evidence()
    np.testing.assert_allclose(model.log_likelihood(x, 1).numpy(), evidence, rtol=1e-7)
    (mean, variance), missed = linear.posterior(), 0.0
    for rows in ROWS:
        own_mean, own_variance = (values[..., 0] for values in linear.posterior(rows))
        ratio = own_variance / variance[0]
        missed += 0.5 * (ratio - 1 - math.log(ratio) + ((own_mean - mean[:, 0]) ** 2).mean() / variance[0])
    assert missed > 1
    with torch.no_grad():
        found = [model.loss(x.repeat(500, 1)) for _ in range(10)]
    for term, expected in (("elbo", evidence.mean()), ("cross_nelbo", missed - 3 * evidence.mean())):
        values = torch.stack([terms[term] for terms in found])
        error = float(values.std()) / math.sqrt(10)
        assert float(values.mean()) == pytest.approx(expected, abs=5 * error) and error < 0.1


def test_bounds_hold_and_importance_samples_find_evidence(shifted: Any) -> None:
    linear = Linear()
    model, x, evidence = linear.model(), torch.from_numpy(linear.x), linear.evidence()
    shifted(model.encoder)
    with torch.no_grad():
        for net in model.encoder:
            (down,) = (m for m in net.modules() if isinstance(m, nn.Linear))
            down.bias[2:] += 1.0  # wider than the exact posteriors
        found = torch.stack([model.loss(x.repeat(500, 1))["elbo"] for _ in range(10)])
    assert evidence.mean() - found.mean() > 5 * found.std() / math.sqrt(10)
    np.testing.assert_allclose(model.log_likelihood(x, 20_000).numpy(), evidence, atol=0.1)


@pytest.mark.slow
def test_training_separates_shared_and_private_factors() -> None:
    """For two parts with one common factor and one private factor each."""
    common, *alone = torch.randn(3, 500)
    loads = [torch.linalg.qr(torch.randn(3, 2))[0] for _ in alone]
    x = torch.cat([torch.stack([common, own], 1) @ w.T for own, w in zip(alone, loads, strict=True)], 1)
    x += 0.3 * torch.randn(500, 6)
    model = DMVAE((6,), latent_dim=1, private_dim=1, hidden_dims=(), likelihood="gaussian:0.3")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        codes = torch.cat([torch.stack([common, *alone]), model.encode(x).T])
        from_first = model.reconstruct_from(x, (0,))[:, 3:]
    correlations = torch.corrcoef(codes)[:3, 3:].abs()
    assert (correlations.diagonal() > 0.9).all() and (correlations - torch.diag(correlations.diagonal()) < 0.2).all()
    # the first part predicts the common factor in the second part
    wanted = common[:, None] * loads[1][:, 0]
    assert (from_first - wanted).square().sum() < 0.15 * wanted.square().sum()


# ---- invalid values --------------------------------------------------------------------------------------------------


def test_invalid_code_sizes_are_refused() -> None:
    model = DMVAE((6,), latent_dim=3, private_dim=2)
    assert model.code_shape == (7,) and model.hparams["latent_dim"] == 3
    assert DMVAE((6,), private_dim=0).code_shape == (16,)
    with pytest.raises(AezooError, match="latent_dim must be at least 1"):
        DMVAE((6,), latent_dim=0)
    with pytest.raises(AezooError, match="private_dim must be at least 0"):
        DMVAE((6,), private_dim=-1)
