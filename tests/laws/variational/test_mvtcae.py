"""Laws of MVTCAE (Hwang et al. 2021)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from joint_encoder_laws import (  # noqa: F401
    test_kl_is_float32_for_half_precision_encoders,
)
from missing_modality_laws import (  # noqa: F401
    test_loss_matches_models_of_present_modalities,
    test_missing_modality_gets_no_gradient,
    test_outputs_equal_model_of_present_modalities,
    test_partly_missing_modalities_are_refused,
)
from multimodal_laws import (  # noqa: F401
    CODE,
    PARTS,
    PRIOR,
    SHAPE,
    assert_same_terms,
    exact_model,
    given_noise,
    images,
    normal,
    one_part_model_and_vae,
    small,
    test_each_modality_has_its_own_decoder,
    test_importance_sampling_estimates_evidence,
    test_inconsistent_part_sizes_are_refused,
    test_no_bound_is_above_the_evidence,
    test_other_experts_get_no_reconstruction_gradient,
    test_part_sizes_may_be_list_and_capacity_is_refused,
    test_partial_reconstruction_ignores_other_modalities,
    test_score_is_noise_free_bound_of_all_parts,
    test_unknown_parts_are_refused,
)
from scipy import stats
from scipy.integrate import quad
from torch import Tensor

from aezoo import AezooError
from aezoo.models.variational.mopoe_vae import MoPoEVAE
from aezoo.models.variational.mvtcae import MVTCAE

TERMS = ("loss", "nll", "kl", "parts_kl", "elbo")


def with_experts(model: Any, mu_BMD: Tensor, log_var_BMD: Tensor) -> Any:
    model.experts = lambda x, parts=None: (mu_BMD, log_var_BMD)
    return model


def test_loss_matches_torch_distributions(shifted: Any) -> None:
    model, x = small(MVTCAE, shifted, beta=3.0, alpha=0.7), images()
    eps = torch.randn(5, CODE, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        terms = model.loss(x)
    own = [net(part).chunk(2, 1) for net, part in zip(model.encoder, x.split(PARTS, 1), strict=True)]
    precision = sum(1 / log_var.exp() for _, log_var in own)
    mean = sum(mu / log_var.exp() for mu, log_var in own) / precision
    q = D.Independent(D.Normal(mean, precision**-0.5), 1)
    x_hat = model.decode(mean + precision**-0.5 * eps)
    nll = -D.Bernoulli(probs=x_hat, validate_args=False).log_prob(x).flatten(1).sum(1)
    kl, parts_kl = D.kl_divergence(q, PRIOR), sum(D.kl_divergence(q, normal(*expert)) for expert in own)
    expected = (3 - 0.7) / 3 * nll + 3.0 * ((1 - 0.7) * kl + 0.7 / 3 * parts_kl)
    means = (values.mean() for values in (expected, nll, kl, parts_kl, -(nll + kl)))
    assert_same_terms(model, terms, dict(zip(TERMS, means, strict=True)))


@pytest.mark.parametrize("training", [True, False])
def test_alpha_0_equals_vae_of_expert_product(training: bool, shifted: Any) -> None:
    """Which is MoPoE-VAE with the subset of all parts only."""
    model, other, x = small(MVTCAE, shifted, alpha=0.0, beta=3.0), small(MoPoEVAE, shifted, beta=3.0), images()
    other.load_state_dict(model.state_dict())
    other.subsets = lambda m, device: torch.ones(1, m, dtype=torch.bool, device=device)
    found = []
    for each in (model, other):
        with pytest.MonkeyPatch.context() as patch:
            given_noise(patch)
            terms = each.train(training).loss(x)
        called = [getattr(each.eval(), call)(x) for call in ("encode", "forward", "score")]
        gradients = torch.autograd.grad(terms["loss"], [*each.parameters()])
        found.append([*(terms[term] for term in ("loss", "nll", "kl", "elbo")), *called, *gradients])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_one_part_equals_vae_weighted_by_one_minus_alpha(alpha: float, shifted: Any) -> None:
    model, vae = one_part_model_and_vae(MVTCAE, shifted, beta=3.0)
    model.alpha = alpha
    x, found = images(), []
    for each in (model, vae):
        torch.manual_seed(3)
        terms = each.train().loss(x)
        gradients = torch.autograd.grad(terms["loss"], [*each.parameters()])
        found.append([*gradients, *(terms[term] for term in ("loss", "nll", "kl", "elbo"))])
        found[-1] += [getattr(each.eval(), call)(x) for call in ("encode", "forward", "score")]
    weighed = len([*vae.parameters()]) + 1
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(a, (1 - alpha) * b if i < weighed else b, rtol=1e-9, atol=1e-12)
    assert model.loss(x)["parts_kl"] == 0


@pytest.mark.parametrize("distance", [0.0, 1.0, 6.0])
def test_kl_of_product_to_experts_matches_integration(distance: float) -> None:
    mu, sigma = distance * np.array([-1.0, 0.2, 1.0]) + 0.3, np.array([0.5, 0.8, 0.4])
    own = [torch.from_numpy(values)[None, :, None] for values in (mu, 2 * np.log(sigma))]
    model = with_experts(MVTCAE((3,), parts=(1, 1, 1), latent_dim=1, hidden_dims=()).double(), *own)
    total = quad(lambda z: np.prod(stats.norm.pdf(z, mu, sigma)), -9, 9, epsabs=0, points=[*mu], limit=400)[0]

    def integrand(z: float) -> float:
        log_q = stats.norm.logpdf(z, mu, sigma).sum() - np.log(total)
        return float(np.exp(log_q) * (log_q - stats.norm.logpdf(z, mu, sigma)).sum())

    exact = quad(integrand, -9, 9, points=[*mu], limit=400)[0]
    assert model.loss(torch.rand(1, 3).double())["parts_kl"].item() == pytest.approx(exact, rel=1e-6)


def test_kl_of_agreeing_experts_is_precision_gain() -> None:
    """The product of M equal experts has 1 / M of their variance."""
    mu = 5 * torch.randn(4, 1, CODE, dtype=torch.float64).expand(4, 3, CODE)
    log_var = torch.randn(4, 1, CODE, dtype=torch.float64).expand(4, 3, CODE)
    terms = with_experts(MVTCAE((3,), parts=(1, 1, 1), latent_dim=CODE).double(), mu, log_var).loss(
        torch.rand(4, 3).double()
    )
    assert terms["parts_kl"].item() == pytest.approx(3 * CODE / 2 * (1 / 3 - 1 + math.log(3)), rel=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_alpha_1_loss_is_independent_of_prior(alpha: float, shifted: Any) -> None:
    """Shifted codes, with decoders that shift them back, change the loss only by the KL to the prior."""
    model, x = small(MVTCAE, shifted, alpha=alpha, hidden_dims=()), images()
    found = []
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            given_noise(patch)
            found.append(model.loss(x)["loss"])
        with torch.no_grad():
            for down, up in zip(model.encoder, model.decoder, strict=True):
                (to_code,), (to_x,) = (
                    [m for m in net.modules() if isinstance(m, torch.nn.Linear)] for net in (down, up)
                )
                to_code.bias[:CODE] += 2.0
                to_x.bias -= to_x.weight @ torch.full((CODE,), 2.0, dtype=torch.float64)
    assert torch.isclose(*found, rtol=1e-9) == (alpha == 1.0)


def test_linear_model_loss_matches_closed_form() -> None:
    """For the mean of the loss over draws, from E_q |x - W z - m|^2 of a Gaussian q in numpy."""
    scale, alpha, beta = 0.6, 0.7, 2.0
    exact, model, x = exact_model(MVTCAE, alpha=alpha, beta=beta)
    w, m = exact.stacked(range(3))
    own = [
        ((x_i - m_i) @ w_i / (w_i**2).sum(0), scale**2 / (w_i**2).sum(0))
        for x_i, w_i, m_i in zip(np.split(x.numpy(), (3, 7), 1), exact.w, exact.m, strict=True)
    ]
    variance = 1 / sum(1 / v for _, v in own)
    mean = variance * sum(mu / v for mu, v in own)
    squares = ((x.numpy() - mean @ w.T - m) ** 2).sum(1) + ((w**2) * variance).sum()
    nll = squares / (2 * scale**2) + 9 / 2 * math.log(2 * math.pi * scale**2)
    kl = 0.5 * (mean**2 + variance - 1 - np.log(variance)).sum(1)
    parts_kl = sum(0.5 * (variance / v + (mean - mu) ** 2 / v - 1 - np.log(variance / v)).sum(1) for mu, v in own)
    expected = (1 - alpha / 3) * nll + beta * ((1 - alpha) * kl + alpha / 3 * parts_kl)
    with torch.no_grad():
        found = torch.stack([model.loss(x.repeat(500, 1))["loss"] for _ in range(10)])
    error = found.std().item() / math.sqrt(10)
    assert found.mean().item() == pytest.approx(expected.mean(), abs=5 * error) and error < 0.05


def test_every_expert_learns_and_kl_skips_decoders(shifted: Any) -> None:
    model, x = small(MVTCAE, shifted), images()
    terms = model.loss(x)
    for term in ("nll", "kl", "parts_kl"):
        for net in model.encoder:
            assert all(g.abs().max() > 0 for g in torch.autograd.grad(terms[term], [*net.parameters()], None, True))
    for term in ("kl", "parts_kl"):
        found = torch.autograd.grad(terms[term], [*model.decoder.parameters()], None, True, allow_unused=True)
        assert all(g is None for g in found)


def test_expert_kl_gradient_matches_finite_differences() -> None:
    model, x = MVTCAE((3,), parts=(1, 1, 1), latent_dim=2, hidden_dims=()).double(), torch.rand(2, 3).double()
    own = [torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *own: with_experts(model, *own).loss(x)["parts_kl"], own)


def test_invalid_alpha_is_refused() -> None:
    assert MVTCAE(SHAPE, alpha=1.0).alpha == 1.0
    for alpha in (-0.1, 1.1):
        with pytest.raises(AezooError, match="alpha must be from 0 to 1"):
            MVTCAE(SHAPE, alpha=alpha)
    with pytest.raises(AezooError, match="alpha must be less than 1 for samples of one part"):
        MVTCAE((1,), alpha=1.0)
