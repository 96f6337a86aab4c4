"""Laws of JNF, the joint VAE with normalising flows for its parts (Senellart et al. 2023)."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import (  # noqa: F401
    test_gradients_are_derivatives_of_the_terms,
    test_loss_gradient_is_the_weighted_sum_of_terms,
)
from joint_encoder_laws import (
    gradients,
    vae_of,
)
from missing_modality_laws import (  # noqa: F401
    test_models_without_missing_support_suggest_others,
)
from multimodal_laws import (  # noqa: F401
    CODE,
    PARTS,
    PRIOR,
    SHAPE,
    SUBSETS,
    assert_same_terms,
    experts,
    given_noise,
    images,
    normal,
    small,
    test_inconsistent_part_sizes_are_refused,
    test_other_experts_get_no_reconstruction_gradient,
    test_part_sizes_may_be_list_and_capacity_is_refused,
    test_partial_reconstruction_ignores_other_modalities,
    test_score_is_noise_free_bound_of_all_parts,
    test_unknown_parts_are_refused,
)
from scipy import stats
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from aezoo import AezooError
from aezoo.distributions import gaussians
from aezoo.models.variational.jmvae import JMVAE
from aezoo.models.variational.jnf import JNF
from aezoo.nets.blocks.flows import AutoregressiveFlow


def made(shifted: Any, **settings: Any) -> Any:
    return small(JNF, shifted, flow_width=8, **settings)


# ---- the density -----------------------------------------------------------------------------------------------------


def log_density(model: Any, x: Tensor, z_BD: Tensor, i: int) -> Tensor:
    """Log q_i(z|x_i) with autograd's Jacobian of the flow."""
    base = normal(*model.encoder[i](x.split(PARTS, 1)[i]).chunk(2, 1))
    flow = model.flows[i]
    J_DBD = jacobian(lambda z: flow(z)[0].sum(0), z_BD, create_graph=True)
    return base.log_prob(flow(z_BD)[0]) + J_DBD.transpose(0, 1).det().abs().log()


def test_loss_is_joint_elbo_plus_unimodal_log_ratios(shifted: Any) -> None:
    model, x = made(shifted, beta=3.0), images()
    eps = torch.randn(5, CODE, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        terms = model.loss(x)
    q = normal(*model.joint_encoder(x).chunk(2, 1))
    z = q.mean + q.stddev * eps
    nll = -D.Bernoulli(probs=model.decode(z), validate_args=False).log_prob(x).flatten(1).sum(1)
    parts_kl = sum(q.log_prob(z).detach() - log_density(model, x, z.detach(), i) for i in range(3))
    kl = D.kl_divergence(q, PRIOR)
    expected = {"loss": nll + 3.0 * kl + parts_kl, "nll": nll, "kl": kl, "parts_kl": parts_kl, "elbo": -(nll + kl)}
    assert_same_terms(model, terms, {term: values.mean() for term, values in expected.items()})


def test_expert_densities_integrate_to_one(shifted: Any) -> None:
    model, step = made(shifted, latent_dim=2), 0.1
    side = torch.arange(-12, 12, step, dtype=torch.float64)
    z = torch.cartesian_prod(side, side)
    with torch.no_grad():
        total = model.log_experts(z, images(1).expand(len(z), *SHAPE)).exp().sum(0) * step**2
    torch.testing.assert_close(total, torch.ones(3).double(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("n_flows", [0, 1, 3])
def test_flow_is_invertible_with_alternating_order(size: int, n_flows: int) -> None:
    flow, z = AutoregressiveFlow(size, n_flows, 8).double(), 2 * torch.randn(4, 3, size, dtype=torch.float64)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3 * torch.randn_like(p)
        u, log_det = flow(z)
        torch.testing.assert_close(flow.inverse(u), z)
    assert u.shape == z.shape and log_det.shape == (4, 3) and torch.equal(u, z) == (not n_flows)
    J = jacobian(lambda one: flow(one)[0], z[0, 0])
    assert (J.triu(1).abs().max() > 0) == (n_flows > 1 and size > 1) and (J.diagonal() != 0).all()


# ---- which term trains which network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parts", [(6,), PARTS])
def test_joint_vae_equals_vae_of_whole_samples_exactly(parts: tuple[int, ...], training: bool, shifted: Any) -> None:
    """In terms, codes and gradients; the encoders and flows of the parts do not affect them."""
    model, x, found = made(shifted, parts=parts, beta=3.0), images(), []
    for each in (model, vae_of(model, beta=3.0)):
        torch.manual_seed(3)
        terms = each.train(training).loss(x)
        nets = nn.ModuleList([model.joint_encoder, model.decoder])
        called = [each.eval().encode(x), each(x), each.score(x)]
        found.append([terms[t] for t in ("nll", "kl", "elbo")] + gradients(terms["loss"], nets) + called)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_last_term_trains_only_encoders_and_flows(shifted: Any) -> None:
    model, x = made(shifted, beta=3.0), images()
    terms = model.loss(x)
    of_parts, of_all = [*model.encoder, *model.flows], [model.joint_encoder, *model.decoder]
    assert not any(g is not None for net in of_all for g in gradients(terms["parts_kl"], net))
    assert not any(g is not None for net in of_parts for t in ("nll", "kl", "elbo") for g in gradients(terms[t], net))
    for net in of_parts:
        whole, last = gradients(terms["loss"], net), gradients(terms["parts_kl"], net)
        assert all(torch.equal(a, b) for a, b in zip(whole, last, strict=True))
        assert all(g.abs().max() > 0 for g, p in zip(last, net.parameters(), strict=True) if p.ndim > 1)


def test_no_flow_layers_equal_jmvae_in_the_mean(shifted: Any) -> None:
    model, x = made(shifted, n_flows=0), images()
    other: Any = JMVAE(SHAPE, parts=PARTS, latent_dim=CODE, hidden_dims=(8,)).double()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        found = torch.stack([model.loss(x.repeat(400, 1, 1, 1))["parts_kl"] for _ in range(10)])
        error = float(found.std()) / math.sqrt(10)
        assert float(found.mean()) == pytest.approx(other.loss(x)["parts_kl"].item(), abs=5 * error)
        for chosen in SUBSETS:
            for a, b in zip(model.infer(x, chosen), other.infer(x, chosen), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_flow_fits_non_gaussian_posterior() -> None:
    """A noisy parabola has an entropy of 1.23 nats, the Gaussian with its moments one of 3.19."""
    torch.manual_seed(0)
    model, x = JNF((2,), parts=(1, 1), latent_dim=2, hidden_dims=(), flow_width=16), torch.zeros(256, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        first, noise = torch.randn(2, 256, 1)
        nll = -model.log_experts(torch.cat([first, first**2 - 1 + 0.2 * noise], 1), x).mean()
        optimizer.zero_grad()
        nll.backward()
        optimizer.step()
    assert 1.0 < nll.item() < 2.2


# ---- codes from some parts -------------------------------------------------------------------------------------------


SIZES, K, SCALE = (3, 4, 2, 3), 2, 0.6


OF_FOUR = [chosen for n in (1, 2, 3) for chosen in itertools.combinations(range(4), n)]


class Affine(nn.Module):
    """f(z) = L z."""

    def __init__(self, L: np.ndarray) -> None:
        super().__init__()
        self.L = torch.from_numpy(L)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z @ self.L.T, self.L.det().abs().log().expand(z.shape[:-1])

    def inverse(self, u: Tensor) -> Tensor:
        return u @ self.L.inverse().T


class Linear:
    """x_i = W_i z + m_i + noise in numpy, and a JNF with q_i = p(z|x_i), whose dimensions are correlated."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.w = [rng.normal(size=(n, K)) + 0.7 for n in SIZES]
        self.m = [rng.normal(size=n) for n in SIZES]
        self.x = rng.normal(size=(4, sum(SIZES)))
        self.model: Any = JNF((sum(SIZES),), parts=SIZES, latent_dim=K, hidden_dims=()).double().eval()
        for i, net in enumerate(self.model.encoder):
            _, covariance = self.posterior((i,))
            scale = np.array([0.5, 2.0])
            L = scale[:, None] * np.linalg.cholesky(np.linalg.inv(covariance)).T
            gain = L @ covariance @ self.w[i].T / SCALE**2
            (layer,) = (module for module in net.modules() if isinstance(module, nn.Linear))
            with torch.no_grad():
                layer.weight.zero_()
                layer.weight[:K].copy_(torch.from_numpy(gain))
                layer.bias.copy_(torch.from_numpy(np.concatenate([-gain @ self.m[i], 2 * np.log(scale)])))
            self.model.flows[i] = Affine(L)

    def posterior(self, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
        w, m = np.concatenate([self.w[i] for i in chosen]), np.concatenate([self.m[i] for i in chosen])
        x_S = np.concatenate([np.split(self.x, np.cumsum(SIZES)[:-1], 1)[i] for i in chosen], 1)
        covariance = np.linalg.inv(np.eye(K) + w.T @ w / SCALE**2)
        return (x_S - m) @ w @ covariance / SCALE**2, covariance


@pytest.mark.parametrize("chosen", OF_FOUR, ids=str)
def test_exact_posterior_experts_give_any_posterior(
    chosen: tuple[int, ...],
) -> None:
    """With correlated dimensions, which the q_i of jmvae cannot have."""
    exact = Linear()
    mean, covariance = exact.posterior(chosen)
    assert abs(covariance[0, 1]) > 0.05 * math.sqrt(covariance[0, 0] * covariance[1, 1])
    for order in itertools.permutations(chosen):
        found_mean, found_log_var = (v.detach().numpy() for v in exact.model.infer(torch.from_numpy(exact.x), order))
        np.testing.assert_allclose(found_mean, mean, rtol=1e-9)
        np.testing.assert_allclose(np.exp(found_log_var), np.diag(covariance)[None].repeat(4, 0), rtol=1e-9)


def test_expert_densities_match_exact_posteriors() -> None:
    exact = Linear()
    z = np.random.default_rng(2).normal(size=(4, K))
    found = exact.model.log_experts(torch.from_numpy(z), torch.from_numpy(exact.x)).detach().numpy()
    for i in range(4):
        mean, covariance = exact.posterior((i,))
        expected = [stats.multivariate_normal(mean[b], covariance).logpdf(z[b]) for b in range(4)]
        np.testing.assert_allclose(found[:, i], expected, rtol=1e-9)


def test_variances_above_one_are_clamped_along_principal_axes() -> None:
    rng = np.random.default_rng(0)
    roots, precisions, mu = [], [], rng.normal(size=(2, 3))
    for variances in ((9.0, 0.25, 0.5), (0.1, 1.5, 4.0)):
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        roots.append(turn @ np.diag(np.sqrt(variances)) @ axes.T)
        precisions.append(axes @ np.diag(1 / np.minimum(variances, 1)) @ axes.T)
    covariance = np.linalg.inv(sum(precisions) - np.eye(3))
    mean = covariance @ sum(P @ m for P, m in zip(precisions, mu, strict=True))
    found = gaussians.product_of_posteriors(torch.from_numpy(mu), torch.from_numpy(np.stack(roots)))
    np.testing.assert_allclose(found[0].numpy(), mean, rtol=1e-9)
    np.testing.assert_allclose(found[1].exp().numpy(), np.diag(covariance), rtol=1e-9)


def test_axis_aligned_product_matches_jmvae_and_is_finite() -> None:
    mu, log_var = experts(6, 3)
    root = torch.diag_embed((0.5 * log_var).exp())
    for a, b in zip(gaussians.product_of_posteriors(mu, root), JMVAE.product(mu, log_var), strict=True):
        torch.testing.assert_close(a, b)
    mu, root = torch.tensor([[2.0], [2.0], [-50.0]]), torch.tensor([0.0, 0.0, 1e4])
    found = gaussians.product_of_posteriors(mu, root[:, None, None])
    assert found[0].item() == pytest.approx(2.0, rel=1e-5) and found[1].isfinite().all()


def test_single_code_inverts_its_flow_at_encoder_mean(shifted: Any) -> None:
    model, x = made(shifted), images()
    for i, part in enumerate(x.split(PARTS, 1)):
        mean, log_var = model.infer(x, (i,))
        mu, base = model.encoder[i](part).chunk(2, 1)
        torch.testing.assert_close(model.flows[i](mean)[0], mu)
        assert torch.equal(model.reconstruct_from(x, (i,)), model.decode(mean))
        for b in range(5):
            J = jacobian(lambda z, i=i: model.flows[i](z[None])[0][0], mean[b]).inverse()
            # by linearisation, which is inaccurate for a large sigma
            near = torch.log((J**2 * base[b].exp()).sum(1))
            torch.testing.assert_close(log_var[b], near, rtol=0, atol=1.0)
    for parts in (None, (0, 1, 2), (2, 0, 1)):
        assert torch.equal(model.infer(x, parts)[0], model.joint_encoder(x).chunk(2, 1)[0])


def test_invalid_flow_settings_are_refused() -> None:
    for settings, message in (
        ({"n_flows": -1}, "n_flows must be from 0 to 256"),
        ({"n_flows": 257}, "n_flows must be from 0 to 256"),
        ({"flow_width": 0}, "flow_width must be at least 1"),
    ):
        with pytest.raises(AezooError, match=message):
            JNF((6,), **settings)
    assert not hasattr(JNF((6,)), "alpha") and [len(flow) for flow in JNF((6,), n_flows=3).flows] == [3, 3]
