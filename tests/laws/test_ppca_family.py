"""Probabilistic PCA is the optimum of every bound on log p(x) for a linear model with Gaussian noise.

With a linear decoder and p(x|z) = N(W z + m, s^2 I) the likelihood has its maximum in closed form (Tipping & Bishop
1999, https://doi.org/10.1111/1467-9868.00196): W = U (L - s^2)^1/2 with the leading eigenvectors U and eigenvalues L of
the data's covariance, s^2 the mean of the others. The columns of W are orthogonal, so the posterior is a diagonal
Gaussian, which a linear encoder can represent. There each bound equals log p(x) for any draw, and a step away from
there cannot increase it. This is tested for all models that have a setting with a bound on this log p(x), with weights
from PCA.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import aezoo

K = 8


# settings at which a model's bound is one on log p(x) of the linear model
NEUTRAL: dict[str, dict[str, Any]] = {
    "vae": {},
    "beta_vae": {"beta": 1.0},
    "annealed_vae": {"gamma": 1.0, "max_capacity": 0.0},
    "dip_vae_i": {"off_diagonal": 0.0, "diagonal": 0.0},
    "dip_vae_ii": {"off_diagonal": 0.0, "diagonal": 0.0},
    "info_vae": {"alpha": 0.0, "mmd_weight": 1.0},
    "sigma_vae": {},
    "iwae": {"n_samples": 5},
    "miwae": {"n_groups": 2, "n_samples": 3},
    "piwae": {"n_groups": 2, "n_samples": 3},
    "ciwae": {"n_samples": 4, "beta": 0.3},
    "beta_tcvae": {"alpha": 1.0, "beta": 1.0, "gamma": 1.0},
    "factor_vae": {"gamma": 0.0},
    "mine_vae": {"mi_weight": 0.0},
    "joint_vae": {"n_variables": 0, "gamma": 1.0, "max_capacity": 0.0},
    "denoising_vae": {"corruption": "none"},
    "ada_gvae": {},
    "mlvae": {},
    "triplet_vae": {},
    "mmvae": {"parts": (64,)},
    "mopoe_vae": {"parts": (64,)},
    "mvtcae": {"parts": (64,), "alpha": 0.0},
    "crmvae": {"parts": (64,), "alpha": 0.0},
    "mmvae_plus": {"parts": (64,), "private_dim": 0},
    "semi_supervised_m1": {},
    "vae_flow": {"n_flows": 0},
    "vae_iaf": {"n_flows": 0},
    "flow_prior_vae": {"n_flows": 0},
    "hvae": {"n_leapfrog": 0},
    "rhvae": {"n_leapfrog": 0},
    "hierarchical_vae": {"latent_dims": (K,)},
    "ladder_vae": {"latent_dims": (K,)},
}


# why the other models are not tested here
OTHERS = {
    "mixture_vae": "its prior is learned: its own laws test it with N(0, I)",
    "vamp_vae": "its prior depends on the encoder",
    "cmvae": "its prior is learned: its own laws test it with N(0, I)",
    "mvae": "its posterior is the encoder's Gaussian times the prior: its own laws test the exact one",
    "mhvae": "its posterior is the encoders' Gaussians times the prior: its own laws test the exact ones",
    "dmvae": "its posterior of the shared code includes the prior: its own laws test the exact one",
    "telbo": "it has encoders of parts besides the joint one: its own laws test exact posteriors",
    "jmvae": "it has encoders of parts besides the joint one: its own laws test exact posteriors",
    "jnf": "it has encoders and flows of parts besides the joint encoder: its own laws compare it with the VAE",
    "nexus": "its bound is that of two levels, which are not trained on it together",
    "two_stage_vae": "its prior is a second model",
    "conditional_vae": "bounds log p(x|y)",
    "semi_supervised_vae": "bounds log p(x, y)",
    "categorical_vae": "codes are discrete",
    "hyperspherical_vae": "codes lie on a sphere",
    "poincare_vae": "codes lie in a ball",
    "gamma_vae": "codes are positive",
    "logcosh_vae": "the noise is not Gaussian",
    "msssim_vae": "its distance is not a likelihood",
    "perceptual_vae": "its distance is not a likelihood",
    "vae_gan": "the code is trained on features, not on the likelihood",
    "vdvae": "its networks have no linear limit",
}


ESTIMATORS = [
    (name, {**NEUTRAL[name], "estimator": estimator})
    for name in ("iwae", "miwae", "piwae", "ciwae")
    for estimator in ("reparam", "stl", "dreg")
]


CASES = [*NEUTRAL.items(), *ESTIMATORS]


# info_vae and beta_tcvae compare all pairs of 1,437 digits, which is slow, and their ELBO is that of the VAE
ON_AVERAGE = [case for case in CASES if case[0] not in ("info_vae", "beta_tcvae")]


ONE_DRAW = [case for case in CASES if case[0] in ("iwae", "miwae", "piwae")]


def name_of(case: Any) -> str:
    return "-".join([case[0], *map(str, case[1].values())]) if isinstance(case, tuple) else str(case)


class Solution:
    """Probabilistic PCA of samples (N, D) by numpy."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.mean = x, x.mean(0)
        values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
        values, vectors = values[::-1], vectors[:, ::-1]
        self.s2 = values[K:].mean()
        self.w = vectors[:, :K] * np.sqrt(values[:K] - self.s2)

    def log_likelihood(self) -> np.ndarray:
        covariance = self.w @ self.w.T + self.s2 * np.eye(len(self.w))
        centred = self.x - self.mean
        distance = (centred * np.linalg.solve(covariance, centred.T).T).sum(1)
        return -0.5 * (len(self.w) * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1] + distance)

    def copy_into(self, model: Any) -> Any:
        """Set the decoder, and the encoder to the posterior N(M^-1 W' (x - m), s^2 M^-1), M = W'W + s^2 I."""
        down, up = (
            next(m for m in net.modules() if isinstance(m, nn.Linear)) for net in (model.encoder, model.decoder)
        )
        m = np.diag(self.w.T @ self.w) + self.s2
        to_z = self.w.T / m[:, None]
        with torch.no_grad():
            up.weight.copy_(torch.from_numpy(self.w))
            up.bias.copy_(torch.from_numpy(self.mean))
            down.weight.zero_()
            down.weight[:K].copy_(torch.from_numpy(to_z))
            down.bias.copy_(torch.from_numpy(np.concatenate([-to_z @ self.mean, np.log(self.s2 / m)])))
            if model.likelihood.log_scale is not None:
                model.likelihood.log_scale.fill_(0.5 * math.log(self.s2))
        return model


@pytest.fixture(scope="module")
def solution(digits: Tensor) -> Solution:
    return Solution(digits[:1437].flatten(1).numpy())


def solved(solution: Solution, name: str, settings: dict[str, Any]) -> Any:
    scale = {} if name == "sigma_vae" else {"likelihood": f"gaussian:{math.sqrt(solution.s2)!r}"}
    size = {} if "latent_dims" in settings else {"latent_dim": K}
    model = aezoo.create_model(name, (64,), hidden_dims=(), **size, **scale, **settings).double()
    return solution.copy_into(model).eval()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_importance_weight_is_the_likelihood(case: Any, solution: Solution) -> None:
    """If q is the posterior, log p(x, z) - log q(z|x) does not depend on z, so one draw is enough."""
    x = torch.from_numpy(solution.x)[:200]
    found = solved(solution, *case).log_likelihood(x, 1)
    np.testing.assert_allclose(found.numpy(), solution.log_likelihood()[:200], rtol=1e-9)


@pytest.mark.parametrize("case", ONE_DRAW, ids=name_of)
def test_bound_equals_likelihood_for_any_draw(case: Any, solution: Solution) -> None:
    model, x = solved(solution, *case), torch.from_numpy(solution.x)
    for seed in range(3):
        torch.manual_seed(seed)
        assert model.loss(x)["elbo"].item() == pytest.approx(solution.log_likelihood().mean(), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_AVERAGE, ids=name_of)
def test_bound_is_likelihood_in_mean_and_stationary(case: Any, solution: Solution) -> None:
    """With 8 draws for each of 1,437 digits, the same for all compared weights."""
    model, x = solved(solution, *case), torch.from_numpy(solution.x)

    def bound(at: Any) -> tuple[float, float]:
        torch.manual_seed(0)
        with torch.no_grad():
            values = torch.stack([at.loss(x)["elbo"] for _ in range(8)])
        return values.mean().item(), values.std().item() / math.sqrt(8)

    best, error = bound(model)
    exact = solution.log_likelihood().mean()
    assert best == pytest.approx(exact, abs=5 * error + 1e-9)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    for _ in range(2):
        model.load_state_dict(weights)
        with torch.no_grad():
            for net in (model.encoder, model.decoder):
                for p in net.parameters():
                    p += 0.02 * torch.randn_like(p)
        assert bound(model)[0] < exact - 5 * error


# for ciwae see test_true_posterior_gives_evidence_without_noise
WITHOUT_NOISE = [case for case in ESTIMATORS if case[1]["estimator"] != "reparam" and case[0] != "ciwae"]


@pytest.mark.parametrize("case", WITHOUT_NOISE, ids=name_of)
def test_path_derivative_has_no_noise_at_the_solution(case: Any, solution: Solution) -> None:
    """Sticking the landing (Roeder et al. 2017): if q is the posterior, the encoder's gradient is 0 for every draw."""
    model, x = solved(solution, *case).train(), torch.from_numpy(solution.x)[:64]
    model.loss(x)["loss"].backward()
    largest = max(float(p.grad.abs().max()) for p in model.encoder.parameters())
    plain = solved(solution, case[0], NEUTRAL[case[0]]).train()
    plain.loss(x)["loss"].backward()
    noisy = max(float(p.grad.abs().max()) for p in plain.encoder.parameters())
    assert largest < 1e-9 * noisy


def test_every_variational_model_is_listed_or_excluded() -> None:
    assert {*NEUTRAL, *OTHERS} == set(aezoo.list_models(family="variational"))
    assert not NEUTRAL.keys() & OTHERS.keys()
