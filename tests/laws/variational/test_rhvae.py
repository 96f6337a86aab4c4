"""Laws of the Riemannian Hamiltonian VAE (Chadebec et al. 2022)."""

import math
from typing import Any

import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from hamiltonian_laws import (  # noqa: F401
    SHAPE,
    draws_of,
    images,
    normals,
    small,
    test_evaluation_needs_no_gradients,
    test_score_is_bound_at_mean_without_momentum,
    test_zero_leapfrog_steps_equal_vae,
)
from torch import Tensor

import aezoo
from aezoo import AezooError
from aezoo.manifolds.hamiltonian import kinetic_gradient
from aezoo.manifolds.riemannian import half_log_det, velocity

# ---- the metric ------------------------------------------------------------------------------------------------------


def curved(**settings: Any) -> Any:
    """A model whose centroids lie among the codes, so that the metric varies there."""
    torch.manual_seed(4)
    model = small("rhvae", **{"n_centroids": 7, "latent_dim": 3, "metric_floor": 0.3, "step_size": 0.1, **settings})
    with torch.no_grad():
        for p in model.metric.parameters():
            p += 0.2 * torch.randn_like(p)
    return model.eval()


def explicit_metric(model: Any, z: Tensor) -> Tensor:
    """G^-1 of one code, term by term."""
    d = len(z)
    total = model.metric_floor * torch.eye(d, dtype=torch.float64)
    for c in model.centroids_MD:
        entries = model.metric[2](model.metric[0](c).relu())
        L = torch.diag(torch.nn.functional.softplus(entries[:d]))
        rest = iter(entries[d:])
        for i in range(d):
            for j in range(i):
                L[i, j] = next(rest)
        total = total + L @ L.T * torch.exp(-(z - c).square().sum() / model.temperature**2)
    return total


def test_metric_matches_centroid_sum_and_is_positive() -> None:
    model, z = curved(), normals(5, 3)
    inverse = model.current_metric().inverse
    found = inverse(z)
    torch.testing.assert_close(found, torch.stack([explicit_metric(model, row) for row in z]))
    torch.testing.assert_close(found, found.mT)
    values = torch.linalg.eigvalsh(found)
    assert values.min() > 0.3 and values.max() > 0.6  # above the floor
    torch.testing.assert_close(half_log_det(found), 0.5 * torch.logdet(found.inverse()))
    torch.testing.assert_close(inverse(z + 100), 0.3 * torch.eye(3, dtype=torch.float64).expand(5, 3, 3))
    v = normals(5, 3)
    torch.testing.assert_close(velocity(found, v), torch.einsum("bij,bj->bi", found, v))


def test_kinetic_gradient_matches_autograd() -> None:
    model, z, v = curved(), normals(4, 3).requires_grad_(), normals(4, 3)
    kinetic = sum(
        0.5 * torch.logdet(torch.linalg.inv(explicit_metric(model, a))) + 0.5 * b @ explicit_metric(model, a) @ b
        for a, b in zip(z, v, strict=True)
    )
    found = kinetic_gradient(z, v, model.current_metric().inverse)
    torch.testing.assert_close(found, torch.autograd.grad(kinetic, z)[0])


@pytest.mark.slow
def test_the_generalised_leapfrog_is_reversible_and_keeps_volume() -> None:
    model, x, start = curved(n_leapfrog=2, beta_0=0.4, n_fixed_point=25), images(1), normals(6)
    metric = model.current_metric()
    metric = metric._replace(c_MD=metric.c_MD.detach(), S_MDD=metric.S_MDD.detach())

    def flow(state: Tensor) -> Tensor:
        return torch.cat(model.integrate(x, state[None, :3], state[None, 3:], metric.inverse), 1)[0]

    jacobian = torch.autograd.functional.jacobian(flow, start)
    assert (flow(start) - start).abs().max() > 0.1
    assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(1.5 * math.log(0.4), abs=1e-8)
    model.cooling = [1.0, 1.0, 1.0]
    back = flow(flow(start) * torch.tensor([1, 1, 1, -1, -1, -1]))
    torch.testing.assert_close(back * torch.tensor([1, 1, 1, -1, -1, -1]), start, rtol=1e-8, atol=1e-8)


def test_flat_metric_equals_hamiltonian_vae(shifted: Any) -> None:
    x = images(6)
    model = shifted(small("rhvae", n_centroids=5, metric_floor=1.0, step_size=0.1, beta_0=0.4)).double()
    plain = small("hvae", step_size=0.1, beta_0=0.4)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
    found = []
    for moved in (0.0, 1e3):
        model.centroids_MD += moved
        torch.manual_seed(0)
        found.append(model.eval().loss(x))
    torch.manual_seed(0)
    expected = plain.loss(x)
    for term, value in expected.items():
        torch.testing.assert_close(found[1][term], value)
    assert (found[0]["loss"] - expected["loss"]).abs() > 1e-3
    torch.testing.assert_close(model.score(x), plain.score(x))


def test_riemannian_bound_matches_joint_density() -> None:
    """With N(v; 0, G) by torch.distributions for the first and the last momentum."""
    model, x = curved(n_leapfrog=2, beta_0=0.5, n_fixed_point=30), images(6)
    z, log_q, gamma = draws_of(model, x, 5)
    terms = model.loss(x)
    inverse = model.current_metric().inverse

    def momentum(z: Tensor, heat: float) -> D.Distribution:
        return D.MultivariateNormal(torch.zeros(3).double(), precision_matrix=inverse(z) / heat)

    root = torch.linalg.cholesky(inverse(z))
    v = torch.stack([torch.linalg.inv(a).T @ b for a, b in zip(root, gamma, strict=True)]) / 0.5**0.5
    z_k, v_k = model.integrate(x, z, v, inverse)
    log_px = D.Bernoulli(logits=model.decoder(z_k), validate_args=False).log_prob(x).flatten(1).sum(1)
    bound = log_px + D.Normal(0, 1).log_prob(z_k).sum(1) + momentum(z_k, 1.0).log_prob(v_k)
    bound = bound - log_q - momentum(z, 2.0).log_prob(v) + 1.5 * math.log(0.5)
    torch.testing.assert_close(terms["elbo"], bound.mean())


@pytest.mark.slow
def test_importance_weights_of_the_riemannian_flow_are_unbiased() -> None:
    """E[w] = p(x), whose sum over all binary images is 1."""
    torch.manual_seed(0)
    model = aezoo.create_model(
        "rhvae", (3,), latent_dim=2, hidden_dims=(), n_centroids=4, n_fixed_point=8, metric_floor=0.5, step_size=0.1
    ).double()
    with torch.no_grad():
        model.decoder[1].weight *= 3
        model.encoder[1].weight *= 0.3
    images = torch.cartesian_prod(*[torch.arange(2.0, dtype=torch.float64)] * 3)
    total = model.log_likelihood(images, 2500).exp().sum().item()
    assert total == pytest.approx(1, abs=0.05)


def test_centroids_are_the_most_recent_codes() -> None:
    model = small("rhvae", n_centroids=5).train()
    before = model.centroids_MD.clone()
    x, other = images(2), images(2)
    model.loss(x)
    torch.testing.assert_close(model.centroids_MD, torch.cat([before[2:], model.posterior(x)[0]]))
    model.loss(other)
    kept = torch.cat([before[4:], model.posterior(x)[0], model.posterior(other)[0]])
    torch.testing.assert_close(model.centroids_MD, kept)
    model.eval().loss(images(3))
    torch.testing.assert_close(model.centroids_MD, kept)
    many = images(9)
    model.train().loss(many)
    torch.testing.assert_close(model.centroids_MD, model.posterior(many)[0][-5:])


@pytest.mark.slow
def test_samples_follow_root_inverse_metric_determinant() -> None:
    """For a single centroid in one dimension this is a Gaussian with standard deviation T, except for the floor."""
    model = small("rhvae", latent_dim=1, n_centroids=1, temperature=0.7, metric_floor=1e-6)
    model.centroids_MD.fill_(2.0)
    z = model.sample_prior(3000)[:, 0]
    inner = z[(z - 2).abs() < 2]
    assert len(inner) > 0.98 * len(z)
    assert inner.mean().item() == pytest.approx(2, abs=0.05)
    assert inner.std().item() == pytest.approx(0.7, abs=0.04)
    assert model.sample(4).shape == (4, *SHAPE)


def test_invalid_rhvae_settings_are_refused() -> None:
    for setting in ({"n_centroids": 0}, {"temperature": 0.0}, {"metric_floor": 0.0}, {"n_fixed_point": 0}):
        with pytest.raises(AezooError, match=next(iter(setting))):
            small("rhvae", **setting)
