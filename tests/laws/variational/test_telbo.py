"""Laws of TELBO, the triple ELBO (Vedantam et al. 2018)."""

import copy
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
    drawn,
    gradients,
    vae_of,
)
from multimodal_laws import (  # noqa: F401
    CODE,
    PARTS,
    PRIOR,
    SHAPE,
    SUBSETS,
    Exact,
    assert_same_terms,
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
from torch import Tensor, nn

from aezoo import AezooError
from aezoo.models.variational.telbo import TELBO

M, K, SIZES, SCALE = 3, 2, (3, 4, 2), 0.6


def with_noise(model: Any, x: Tensor, eps: Tensor | None = None) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        return model.loss(x)


def with_prior(mu: Tensor, log_var: Tensor) -> D.Independent:
    precision = 1 + 1 / log_var.exp()
    return D.Independent(D.Normal(mu / log_var.exp() / precision, precision**-0.5), 1)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_is_joint_elbo_plus_unimodal_elbos(shifted: Any) -> None:
    model, x = small(TELBO, shifted, beta=3.0, gamma=0.7), images()
    eps = torch.randn(5, 1 + M, CODE, dtype=torch.float64)
    terms = with_noise(model, x, eps)
    q = normal(*model.joint_encoder(x).chunk(2, 1))
    log_p = D.Bernoulli(probs=model.decode(q.mean + q.stddev * eps[:, 0]), validate_args=False).log_prob(x)
    nll, kl, own = -log_p.flatten(1).sum(1), D.kl_divergence(q, PRIOR), torch.zeros(5).double()
    # decoders do not learn from the ELBOs of parts
    fixed = copy.deepcopy(model)
    for i, part in enumerate(x.split(PARTS, 1)):
        q_i = with_prior(*model.encoder[i](part).chunk(2, 1))
        x_hat = fixed.decoder[i](q_i.mean + q_i.stddev * eps[:, 1 + i]).sigmoid()
        own_nll = -D.Bernoulli(probs=x_hat, validate_args=False).log_prob(part).flatten(1).sum(1)
        own += 0.7 * own_nll + 3.0 * D.kl_divergence(q_i, PRIOR)
    expected = {"loss": nll + 3.0 * kl + own, "nll": nll, "kl": kl, "parts_nelbo": own, "elbo": -(nll + kl)}
    assert_same_terms(model, terms, {term: values.mean() for term, values in expected.items()})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian:learned"])
def test_joint_vae_part_equals_vae_of_whole_samples(likelihood: str, training: bool, shifted: Any) -> None:
    """With its gradients, since decoders and the scale are constant in the ELBOs of the parts."""
    model, x = small(TELBO, shifted, beta=3.0, likelihood=likelihood), images()
    vae = vae_of(model, beta=3.0, likelihood=likelihood)
    vae.likelihood = model.likelihood
    nets, found = nn.ModuleList([model.joint_encoder, model.decoder, model.likelihood]), []
    eps = torch.randn(5, 1 + M, CODE, dtype=torch.float64)
    for each, noise in ((model, eps), (vae, eps[:, 0])):
        terms = with_noise(each.train(training), x, noise)
        called = [each.eval().encode(x), each(x), each.score(x)]
        whole = terms["loss"] - terms.get("parts_nelbo", 0)
        found.append([whole, *(terms[t] for t in ("nll", "kl", "elbo")), *gradients(terms["loss"], nets), *called])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("likelihood", ["bernoulli", "laplace:learned"])
def test_unimodal_encoder_learns_from_its_elbo(likelihood: str, shifted: Any) -> None:
    model, x = small(TELBO, shifted, beta=3.0, likelihood=likelihood), images()
    eps = torch.randn(5, 1 + M, CODE, dtype=torch.float64)
    terms = with_noise(model, x, eps)
    for term, reached in (("nll", False), ("kl", False), ("elbo", False), ("parts_nelbo", True)):
        assert all((g is not None and g.any().item()) == reached for g in gradients(terms[term], model.encoder))
    rest = nn.ModuleList([model.joint_encoder, model.decoder, model.likelihood])
    assert all(g is None or (g == 0).all() for g in gradients(terms["parts_nelbo"], rest))
    for i, part in enumerate(x.split(PARTS, 1)):
        q = with_prior(*model.encoder[i](part).chunk(2, 1))
        nll = model.nll(model.decoder[i](q.mean + q.stddev * eps[:, 1 + i]), part)
        loss = (nll + 3.0 * D.kl_divergence(q, PRIOR)).mean()
        for mine, theirs in zip(
            gradients(terms["loss"], model.encoder[i]), gradients(loss, model.encoder[i]), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
            assert mine.abs().max() > 0


@pytest.mark.parametrize("net", ["conv", "resnet", "gdn", "vit", "lstm"])
def test_every_decoder_type_is_frozen_in_unimodal_elbos(net: str, shifted: Any) -> None:
    """Including recurrent networks, attention, and networks whose weights are computed from parameters."""
    model = shifted(TELBO((3, 8, 8), latent_dim=2, net=net, hidden_dims=(4, 4)))
    terms = model.loss(torch.rand(2, 3, 8, 8))
    assert all(g is None or (g == 0).all() for g in gradients(terms["parts_nelbo"], model.decoder))
    assert all(g is not None for g in gradients(terms["nll"], model.decoder))


def test_gamma_weighs_unimodal_likelihoods_only(shifted: Any) -> None:
    model, x = small(TELBO, shifted, beta=3.0, gamma=0.0), images()
    found = []
    for gamma in (0.0, 1.0, 5.0):
        model.gamma = gamma
        found.append(with_noise(model, x))
    without, plain, more = found
    assert all(torch.equal(without[t], more[t]) for t in ("nll", "kl", "elbo"))
    own = plain["parts_nelbo"] - without["parts_nelbo"]
    torch.testing.assert_close(more["parts_nelbo"] - without["parts_nelbo"], 5 * own)
    kls = [D.kl_divergence(with_prior(*(v[:, i] for v in model.experts(x))), PRIOR).mean() for i in range(M)]
    torch.testing.assert_close(without["parts_nelbo"], 3.0 * torch.stack(kls).sum())
    with pytest.raises(AezooError, match="gamma must be at least 0 and finite"):
        TELBO((6,), gamma=-0.1)


def test_kl_is_float32_for_half_precision_encoders() -> None:
    model, x = TELBO(SHAPE, parts=PARTS, latent_dim=CODE, gamma=0.0), torch.rand(5, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        terms, found, own = model.loss(x), model.infer(x), model.experts(x)
    assert all(values.dtype == torch.float32 for values in (*found, *terms.values()))
    kl = D.kl_divergence(normal(*(v.double() for v in found)), PRIOR).mean()
    torch.testing.assert_close(terms["kl"].double(), kl, rtol=1e-5, atol=0)
    kls = [D.kl_divergence(with_prior(*(v[:, i].double() for v in own)), PRIOR).mean() for i in range(M)]
    torch.testing.assert_close(terms["parts_nelbo"].double(), torch.stack(kls).sum(), rtol=1e-5, atol=0)


# ---- exact evidence --------------------------------------------------------------------------------------------------


def exact_model(**settings: Any) -> tuple[Exact, Any]:
    """A linear model in numpy, and a TELBO with experts at p(x_i|z) as functions of z, the joint encoder at p(z|x)."""
    exact = Exact()
    model: Any = TELBO((9,), parts=SIZES, latent_dim=K, hidden_dims=(), likelihood=f"gaussian:{SCALE}", **settings)
    exact.copy_into(model.double())
    mean, covariance = exact.posterior(np.zeros((1, 9)), range(3))
    w, _ = exact.stacked(range(3))
    (linear,) = (m for m in model.joint_encoder.modules() if isinstance(m, nn.Linear))
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight[:K].copy_(torch.from_numpy((w @ covariance / SCALE**2).T))
        linear.bias.copy_(torch.from_numpy(np.concatenate([mean[0], np.log(np.diag(covariance))])))
    return exact, model.eval()


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
def test_exact_likelihood_experts_give_any_posterior(chosen: tuple[int, ...]) -> None:
    exact, model = exact_model()
    x = drawn(exact, 4)
    mean, covariance = exact.posterior(x.numpy(), chosen)
    for order in itertools.permutations(chosen):
        found_mean, found_log_var = (values.detach().numpy() for values in model.infer(x, order))
        np.testing.assert_allclose(found_mean, mean, rtol=1e-9)
        np.testing.assert_allclose(np.exp(found_log_var), np.diag(covariance)[None].repeat(4, 0), rtol=1e-9)


def test_exact_posterior_weights_equal_evidence() -> None:
    exact, model = exact_model()
    x = drawn(exact, 4)
    everything = exact.evidence(x.numpy(), range(3))
    np.testing.assert_allclose(model.log_likelihood(x, 1).numpy(), everything, rtol=1e-7)
    singles = sum(exact.evidence(x.numpy(), (i,)) for i in range(3))
    with torch.no_grad():
        found = [model.loss(x.repeat(500, 1)) for _ in range(10)]
    for term, expected in (("elbo", everything), ("parts_nelbo", -singles)):
        values = torch.stack([terms[term] for terms in found])
        error = float(values.std()) / math.sqrt(10)
        assert float(values.mean()) == pytest.approx(expected.mean(), abs=5 * error) and error < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_training_finds_unimodal_posteriors(beta: float) -> None:
    """The posteriors for the likelihood raised to gamma / beta."""
    exact, model = exact_model(beta=beta, gamma=2.0)
    x, sharper = drawn(exact, 400), math.sqrt(SCALE**2 * beta / 2.0)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.mul_(0.5)

    def gaps() -> list[float]:
        """KL of each part's posterior from the exact one."""
        experts, found = model.experts(x), []
        for i, part in enumerate(x.split(SIZES, 1)):
            w, m = exact.stacked((i,))
            covariance = np.linalg.inv(np.eye(K) + w.T @ w / sharper**2)
            mean = torch.from_numpy((part.numpy() - m) @ w @ covariance / sharper**2)
            p = D.Independent(D.Normal(mean, torch.from_numpy(np.sqrt(np.diag(covariance)))), 1)
            found.append(D.kl_divergence(with_prior(*(v[:, i] for v in experts)), p).mean().item())
        return found

    assert min(gaps()) > 0.1
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        optimizer.step()
    assert max(gaps()) < 0.01, gaps()


def test_joint_code_ignores_order_of_modalities(shifted: Any) -> None:
    model, x = small(TELBO, shifted), images()
    for parts in (None, (0, 1, 2), (2, 0, 1)):
        assert torch.equal(model.infer(x, parts)[0], model.joint_encoder(x).chunk(2, 1)[0])
    for i, part in enumerate(x.split(PARTS, 1)):
        q = with_prior(*model.encoder[i](part).chunk(2, 1))
        torch.testing.assert_close(model.infer(x, (i,))[0], q.mean)
        torch.testing.assert_close(model.infer(x, (i,))[1].exp(), q.variance)
    one = small(TELBO, shifted, parts=(6,))
    assert torch.equal(one.reconstruct_from(x), one(x))
