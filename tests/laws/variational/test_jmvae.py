"""Laws of JMVAE, the joint multimodal VAE (Suzuki et al. 2016)."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from joint_encoder_laws import (  # noqa: F401
    SIZES,
    K,
    drawn,
    gradients,
    test_kl_is_float32_for_half_precision_encoders,
    vae_of,
)
from missing_modality_laws import (  # noqa: F401
    test_models_without_missing_support_suggest_others,
)
from multimodal_laws import (  # noqa: F401
    CODE,
    PARTS,
    PRIOR,
    SUBSETS,
    Exact,
    assert_same_terms,
    experts,
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
from torch import nn

from aezoo import AezooError
from aezoo.distributions import gaussians
from aezoo.models.variational.jmvae import JMVAE
from aezoo.models.variational.vae import VAE

# ---- the KL of two Gaussians -----------------------------------------------------------------------------------------


def test_gaussian_kl_matches_torch_distributions() -> None:
    p, q = experts(6), experts(6)
    torch.testing.assert_close(gaussians.kl(*p, *q), D.kl_divergence(normal(*p), normal(*q)))
    torch.testing.assert_close(gaussians.kl(*p, *map(torch.zeros_like, p)), VAE.kl(*p))
    assert (gaussians.kl(*p, *p) == 0).all()


def test_kl_of_extreme_gaussians_is_finite_in_float32() -> None:
    narrow, wide, mu = torch.full((1, CODE), -30.0), torch.full((1, CODE), 20.0), torch.ones(1, CODE)
    for p, q in ((narrow, wide), (wide, narrow)):
        expected = D.kl_divergence(normal(mu.double(), p.double()), normal(-mu.double(), q.double()))
        torch.testing.assert_close(gaussians.kl(mu, p, -mu, q).double(), expected, rtol=1e-5, atol=0)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_is_joint_elbo_plus_unimodal_kls(shifted: Any) -> None:
    model, x = small(JMVAE, shifted, beta=3.0, alpha=0.7), images()
    eps = torch.randn(5, CODE, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        terms = model.loss(x)
    mu, log_var = model.joint_encoder(x).chunk(2, 1)
    q = normal(mu, log_var)
    x_hat = model.decode(mu + (0.5 * log_var).exp() * eps)
    nll = -D.Bernoulli(probs=x_hat, validate_args=False).log_prob(x).flatten(1).sum(1)
    of_parts = zip(model.encoder, x.split(PARTS, 1), strict=True)
    parts_kl = sum(D.kl_divergence(q, normal(*net(part).chunk(2, 1))) for net, part in of_parts)
    kl = D.kl_divergence(q, PRIOR)
    expected = {
        "loss": nll + 3.0 * kl + 0.7 * parts_kl,
        "nll": nll,
        "kl": kl,
        "parts_kl": parts_kl,
        "elbo": -(nll + kl),
    }
    assert_same_terms(model, terms, {term: values.mean() for term, values in expected.items()})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parts", [(6,), PARTS])
def test_alpha_0_equals_joint_vae_exactly(parts: tuple[int, ...], training: bool, shifted: Any) -> None:
    model, x = small(JMVAE, shifted, parts=parts, beta=3.0, alpha=0.0), images()
    found = []
    for each in (model, vae_of(model, beta=3.0)):
        torch.manual_seed(3)
        terms = each.train(training).loss(x)
        nets = nn.ModuleList([model.joint_encoder, model.decoder])
        called = [each.eval().encode(x), each(x), each.score(x), each.sample(2) * 0]
        found.append([terms[t] for t in ("loss", "nll", "kl", "elbo")] + gradients(terms["loss"], nets) + called)
        if each is model:
            assert all((g == 0).all() for g in gradients(terms["loss"], model.encoder))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_one_modality_with_joint_encoder_equals_vae(alpha: float, shifted: Any) -> None:
    model, x = small(JMVAE, shifted, parts=(6,), alpha=alpha), images()
    away = model.loss(x)
    model.encoder[0].load_state_dict(model.joint_encoder.state_dict())
    vae = vae_of(model)
    torch.manual_seed(3)
    terms = model.loss(x)
    torch.manual_seed(3)
    torch.testing.assert_close(terms["loss"], vae.loss(x)["loss"], rtol=0, atol=0)
    assert terms["parts_kl"] == 0 < away["parts_kl"]
    assert all(g.abs().max() < 1e-12 for g in gradients(terms["parts_kl"], model.encoder))


def test_unimodal_encoders_learn_from_alpha_term_only(shifted: Any) -> None:
    model, x = small(JMVAE, shifted, beta=3.0, alpha=0.7), images()
    terms = model.loss(x)
    reached = {
        term: [any(g is not None for g in gradients(terms[term], net)) for net in (model.encoder, model.decoder)]
        for term in ("nll", "kl", "elbo", "parts_kl")
    }
    assert reached == {"nll": [False, True], "kl": [False, False], "elbo": [False, True], "parts_kl": [True, False]}
    for net in model.encoder:
        for whole, part in zip(gradients(terms["loss"], net), gradients(terms["parts_kl"], net), strict=True):
            torch.testing.assert_close(whole, 0.7 * part)
            assert part.abs().max() > 0
    # the joint encoder learns from every term, parts_kl included
    assert all(g.abs().max() > 0 for t in ("nll", "kl", "parts_kl") for g in gradients(terms[t], model.joint_encoder))


def test_negative_alpha_is_refused() -> None:
    JMVAE((6,), alpha=50.0)
    with pytest.raises(AezooError, match="alpha must be at least 0 and finite"):
        JMVAE((6,), alpha=-0.1)


# ---- codes from some parts -------------------------------------------------------------------------------------------


def exact_model() -> tuple[Exact, Any]:
    """A linear model with Gaussian noise in numpy, and a JMVAE with all encoders at its exact posteriors."""
    exact = Exact()
    model: Any = JMVAE((9,), parts=SIZES, latent_dim=K, hidden_dims=(), likelihood="gaussian:0.6").double()
    exact.copy_into(model)
    with torch.no_grad():
        for i, net in enumerate([*model.encoder, model.joint_encoder]):
            chosen = range(3) if i == 3 else (i,)
            zero = np.zeros((1, 9))
            mean, covariance = exact.posterior(zero, chosen)
            w, _ = exact.stacked(chosen)
            (linear,) = (m for m in net.modules() if isinstance(m, nn.Linear))
            linear.weight.zero_()
            linear.weight[:K].copy_(torch.from_numpy((w @ covariance / 0.6**2).T))
            linear.bias.copy_(torch.from_numpy(np.concatenate([mean[0], np.log(np.diag(covariance))])))
    return exact, model.eval()


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
def test_exact_posterior_experts_give_any_posterior(
    chosen: tuple[int, ...],
) -> None:
    exact, model = exact_model()
    x = drawn(exact, 4)
    mean, covariance = exact.posterior(x.numpy(), chosen)
    for order in itertools.permutations(chosen):
        found_mean, found_log_var = (values.detach().numpy() for values in model.infer(x, order))
        np.testing.assert_allclose(found_mean, mean, rtol=1e-9)
        np.testing.assert_allclose(np.exp(found_log_var), np.diag(covariance)[None].repeat(4, 0), rtol=1e-9)
    reconstruction = model.reconstruct_from(x, chosen).detach().numpy()
    w, m = exact.stacked(range(3))
    np.testing.assert_allclose(reconstruction, mean @ w.T + m, rtol=1e-9)


def test_exact_posterior_weights_equal_evidence() -> None:
    exact, model = exact_model()
    x = drawn(exact, 50)
    np.testing.assert_allclose(model.log_likelihood(x, 1).numpy(), exact.evidence(x.numpy(), range(3)), rtol=1e-7)
    mean, covariance = exact.posterior(x.numpy(), range(3))
    expected = 0.0
    for i in range(3):
        own_mean, own = exact.posterior(x.numpy(), (i,))
        inverse, off = np.linalg.inv(own), mean - own_mean
        log_det = np.linalg.slogdet(own)[1] - np.linalg.slogdet(covariance)[1]
        expected += 0.5 * (np.trace(inverse @ covariance) - K + log_det + ((off @ inverse) * off).sum(1).mean())
    assert model.loss(x)["parts_kl"].item() == pytest.approx(expected, rel=1e-9)


def test_unimodal_posterior_is_a_minimum() -> None:
    """p(z|x_i) minimises the mean KL(p(z|x) || q_i(z|x_i)), so the mean gradient there is 0 up to sampling error."""
    exact, model = exact_model()
    x = drawn(exact, 20_000)
    mu, log_var = (values.detach() for values in model.infer(x))
    for i in range(3):
        own = [values[:, i].detach().requires_grad_() for values in model.experts(x)]
        for g in torch.autograd.grad(gaussians.kl(mu, log_var, *own).sum(), own):
            for of in (g, g * x.split(SIZES, 1)[i][:, :1]):
                assert (of.mean(0).abs() < 4 * of.std(0) / len(x) ** 0.5).all() and of.std() > 0.01


def test_expert_variance_is_clamped_to_prior() -> None:
    mu, log_var = experts(6, 2)
    log_var -= 2.0
    wide = (torch.cat([mu, torch.zeros(6, 1, CODE)], 1), torch.cat([log_var, torch.full((6, 1, CODE), 20.0)], 1))
    for found, expected in zip(JMVAE.product(*wide), JMVAE.product(mu, log_var), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    # two experts with the prior's variance give the prior's variance and the sum of their means
    mean, log_var = JMVAE.product(mu, torch.zeros_like(mu))
    torch.testing.assert_close(mean, mu.sum(1))
    assert (log_var == 0).all()


def test_product_of_extreme_experts_is_finite_in_float32() -> None:
    log_var = torch.tensor([-30.0, -30.0, 20.0])[None, :, None]
    mean, log_var = JMVAE.product(torch.tensor([2.0, 2.0, -50.0])[None, :, None], log_var)
    assert mean.item() == pytest.approx(2.0, rel=1e-5) and log_var.item() == pytest.approx(-30 - np.log(2), rel=1e-5)


def test_single_and_joint_codes_use_their_encoders(shifted: Any) -> None:
    model, x = small(JMVAE, shifted), images()
    for i, part in enumerate(x.split(PARTS, 1)):
        assert torch.equal(model.infer(x, (i,))[0], model.encoder[i](part).chunk(2, 1)[0])
    for parts in (None, (0, 1, 2), (2, 0, 1)):
        assert torch.equal(model.infer(x, parts)[0], model.joint_encoder(x).chunk(2, 1)[0])
    one = small(JMVAE, shifted, parts=(6,))
    assert torch.equal(one.reconstruct_from(x), one(x))
