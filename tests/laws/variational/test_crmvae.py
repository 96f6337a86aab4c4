"""Laws of CRMVAE, with reconstructions from each expert (Suzuki & Matsuo 2023)."""

import itertools
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
    SCALE,
    SHAPE,
    SIZES,
    Exact,
    assert_same_terms,
    exact_model,
    given_noise,
    images,
    normal,
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
from torch import Tensor, nn

from aezoo import AezooError
from aezoo.models.variational.crmvae import CRMVAE
from aezoo.models.variational.mvtcae import MVTCAE


def with_draws(model: Any, x: Tensor, *draws: Tensor) -> Any:
    """The loss with the given noise in the order of its draws."""
    left = iter(draws)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: next(left).expand_as(like))
        return model.loss(x)


def mean_of(model: Any, x: Tensor, term: str) -> tuple[float, float]:
    """The mean of a term over draws, and its standard error."""
    with torch.no_grad():
        found = torch.stack([model.loss(x.repeat(500, 1))[term] for _ in range(10)])
    return found.mean().item(), found.std().item() / math.sqrt(10)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 0.7])
def test_loss_is_mean_of_bounds_by_torch_distributions(alpha: float | None, shifted: Any) -> None:
    """The bounds of the model's docstring one after the other: with the prior, and for each part."""
    model, x = small(CRMVAE, shifted, beta=3.0, alpha=alpha), images()
    draws = torch.randn(5, CODE, dtype=torch.float64), torch.randn(5, 3, CODE, dtype=torch.float64)
    terms = with_draws(model, x, *draws)
    own = [net(part).chunk(2, 1) for net, part in zip(model.encoder, x.split(PARTS, 1), strict=True)]
    precision = sum(1 / log_var.exp() for _, log_var in own)
    mean = sum(mu / log_var.exp() for mu, log_var in own) / precision
    q = D.Independent(D.Normal(mean, precision**-0.5), 1)

    def nll(z: Tensor) -> list[Tensor]:
        log_p = D.Bernoulli(probs=model.decode(z), validate_args=False).log_prob(x)
        return [-part.flatten(1).sum(1) for part in log_p.split(PARTS, 1)]

    joint = nll(mean + precision**-0.5 * draws[0])
    bounds = [sum(joint) + 3.0 * D.kl_divergence(q, PRIOR)]
    own_nll = []
    for i, (mu, log_var) in enumerate(own):
        own_nll.append(nll(mu + (0.5 * log_var).exp() * draws[1][:, i])[i])
        others = sum(joint[j] for j in range(3) if j != i)
        bounds.append(others + own_nll[i] + 3.0 * D.kl_divergence(q, normal(mu, log_var)))
    share = 0.75 if alpha is None else alpha
    fit, kl = sum(joint), D.kl_divergence(q, PRIOR)
    expected = {"loss": (1 - share) * bounds[0] + share / 3 * sum(bounds[1:]), "own_nll": sum(own_nll)}
    expected |= {
        "nll": fit,
        "kl": kl,
        "elbo": -(fit + kl),
        "parts_kl": sum(D.kl_divergence(q, normal(*o)) for o in own),
    }
    assert_same_terms(model, terms, {term: values.mean() for term, values in expected.items()})


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_default_alpha_weights_all_bounds_equally(m: int) -> None:
    model = CRMVAE((6,), parts=(1,) * (m - 1) + (7 - m,))
    assert 1 - model.alpha == pytest.approx(model.alpha / m) and model.hparams["alpha"] is None


@pytest.mark.parametrize("alpha", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("parts", [(2, 4), (1, 2, 3), (1,) * 6])
def test_likelihood_weights_sum_to_one_per_modality(parts: tuple[int, ...], alpha: float | None, shifted: Any) -> None:
    """With decoders that ignore the code all reconstructions are equal; with beta = 0 the loss is their NLL."""
    model, x = small(CRMVAE, shifted, parts=parts, alpha=alpha, beta=0.0, hidden_dims=()), images()
    with torch.no_grad():
        for p in model.decoder.parameters():
            p *= p.ndim == 1
    assert model.loss(x)["loss"].item() == pytest.approx(model.loss(x)["nll"].item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_without_own_reconstructions_equals_mvtcae(alpha: float, shifted: Any) -> None:
    model, other, x = small(CRMVAE, shifted, alpha=alpha, beta=3.0), small(MVTCAE, shifted, beta=3.0), images()
    other.load_state_dict(model.state_dict())
    other.alpha, found = alpha, []
    for each in (model, other):
        with pytest.MonkeyPatch.context() as patch:
            given_noise(patch)
            terms = each.loss(x)
        loss = terms["loss"] - alpha / 3 * terms.get("own_nll", 0.0)
        gradients = torch.autograd.grad(loss, [*each.parameters()])
        called = [getattr(each.eval(), call)(x) for call in ("encode", "forward", "score")]
        found.append([loss, *(terms[t] for t in ("nll", "kl", "parts_kl", "elbo")), *gradients, *called])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_modality_is_decoded_from_joint_and_own_code(shifted: Any) -> None:
    model, x = small(CRMVAE, shifted), images()
    whole = model.nll_of_part
    for only in range(3):
        model.nll_of_part = lambda i, z, x_i, only=only: whole(i, z, x_i) * (i == only)
        own_nll = model.loss(x)["own_nll"]
        for net, i in itertools.product((model.encoder, model.decoder), range(3)):
            reached = torch.autograd.grad(own_nll, [*net[i].parameters()], None, True, allow_unused=True)
            assert all((g is not None and g.abs().max() > 0) == (i == only) for g in reached)
    terms = model.loss(x)
    for net in model.encoder:
        for term in ("nll", "kl", "parts_kl", "own_nll"):
            assert all(g is not None for g in torch.autograd.grad(terms[term], [*net.parameters()], None, True))


# ---- relation to the evidence ----------------------------------------------------------------------------------------


def one_part_model() -> tuple[Any, Tensor, np.ndarray, np.ndarray]:
    """A linear model of one part with the encoder at the exact posterior, samples, their evidence, and KL(q || p)."""
    exact, _, x = exact_model(CRMVAE)
    w, m = exact.stacked(range(3))
    model: Any = CRMVAE((9,), parts=(9,), latent_dim=2, hidden_dims=(), likelihood=f"gaussian:{SCALE}").double()
    mean, covariance = exact.posterior(x.numpy(), range(3))
    variance = np.diag(covariance)
    (down,), (up,) = ([m for m in net.modules() if isinstance(m, nn.Linear)] for net in (model.encoder, model.decoder))
    with torch.no_grad():
        up.weight.copy_(torch.from_numpy(w))
        up.bias.copy_(torch.from_numpy(m))
        down.weight.zero_()
        down.weight[:2].copy_(torch.from_numpy(covariance @ w.T / SCALE**2))
        down.bias.copy_(torch.from_numpy(np.concatenate([-covariance @ w.T @ m / SCALE**2, np.log(variance)])))
    return model, x, exact.evidence(x.numpy(), range(3)), 0.5 * (mean**2 + variance - 1 - np.log(variance)).sum(1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_exact_posterior_bound_exceeds_evidence_by_omitted_terms(alpha: float) -> None:
    model, x, evidence, kl = one_part_model()
    model.alpha, model.all_alike = alpha, False
    for term, sign, expected in (("elbo", 1, evidence), ("loss", -1, evidence + alpha * kl)):
        found, error = mean_of(model, x, term)
        assert sign * found == pytest.approx(expected.mean(), abs=5 * error) and error < 0.05
    assert kl.mean() > 1.0


def of_parts(exact: Exact, mu: np.ndarray, variance: np.ndarray, chosen: Any, x: np.ndarray) -> float:
    """Log-evidence of some parts with N(mu, diag variance) as prior."""
    w, m = exact.stacked(chosen)
    x_S = np.concatenate([np.split(x, np.cumsum(SIZES)[:-1])[i] for i in chosen])
    covariance = w @ np.diag(variance) @ w.T + SCALE**2 * np.eye(len(m))
    return float(stats.multivariate_normal(w @ mu + m, covariance).logpdf(x_S))


def test_bound_is_below_evidence_with_encoder_prior(shifted: Any) -> None:
    for start in (True, False):
        exact, model, x = exact_model(CRMVAE)
        if not start:
            shifted(model.encoder)
        mu, log_var = (values.detach().numpy() for values in model.experts(x))
        total = 0.25 * exact.evidence(x.numpy(), range(3)).mean()
        for i in range(3):
            for chosen in ((i,), [j for j in range(3) if j != i]):
                each = [
                    of_parts(exact, mu[b, i], np.exp(log_var[b, i]), chosen, row) for b, row in enumerate(x.numpy())
                ]
                total += 0.25 * np.mean(each)
        found, error = mean_of(model, x, "loss")
        assert total + found > 5 * error


def test_linear_model_own_reconstructions_match_closed_form() -> None:
    """From E |x_i - W_i z - m_i|^2 over the posterior of encoder i, in numpy."""
    exact, model, x = exact_model(CRMVAE)
    expected = 9 / 2 * math.log(2 * math.pi * SCALE**2)
    for x_i, w, m in zip(np.split(x.numpy(), np.cumsum(SIZES)[:-1], 1), exact.w, exact.m, strict=True):
        precision = (w**2).sum(0)
        mu = (x_i - m) @ w / precision
        squares = ((x_i - mu @ w.T - m) ** 2).sum(1) + 2 * SCALE**2
        expected += squares.mean() / (2 * SCALE**2)
    found, error = mean_of(model, x, "own_nll")
    assert found == pytest.approx(expected, abs=5 * error) and error < 0.05


def test_invalid_alpha_is_refused() -> None:
    assert CRMVAE(SHAPE, alpha=1.0).alpha == 1.0 and CRMVAE((1,)).alpha == 0.5
    for alpha in (-0.1, 1.1):
        with pytest.raises(AezooError, match="alpha must be from 0 to 1"):
            CRMVAE(SHAPE, alpha=alpha)
    with pytest.raises(AezooError, match="alpha must be less than 1 for samples of one part: their loss"):
        CRMVAE((1,), alpha=1.0)
