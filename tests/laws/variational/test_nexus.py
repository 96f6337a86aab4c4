"""Laws of Nexus, the hierarchical multimodal VAE (Vasco et al. 2022)."""

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
)
from missing_modality_laws import CODE as MISSING_MODALITY_CODE
from missing_modality_laws import images as images_missing_modality
from missing_modality_laws import (  # noqa: F401
    of_parts,
    smaller,
    test_loss_matches_models_of_present_modalities,
    test_missing_modality_gets_no_gradient,
    test_outputs_equal_model_of_present_modalities,
    test_partly_missing_modalities_are_refused,
    without,
)
from missing_modality_laws import small as small_missing_modality
from multimodal_laws import (  # noqa: F401
    CODE,
    PARTS,
    PRIOR,
    SHAPE,
    SUBSETS,
    assert_same_terms,
    given_noise,
    images,
    normal,
    test_inconsistent_part_sizes_are_refused,
    test_other_experts_get_no_reconstruction_gradient,
    test_part_sizes_may_be_list_and_capacity_is_refused,
    test_partial_reconstruction_ignores_other_modalities,
    test_score_is_noise_free_bound_of_all_parts,
    test_unknown_parts_are_refused,
)
from scipy import stats
from torch import Tensor
from torch.autograd.functional import jacobian

from aezoo import AezooError
from aezoo.models.variational.nexus import Nexus
from aezoo.models.variational.vae import VAE

M, P = 3, 2


PRIOR_OF_PART = D.Independent(D.Normal(torch.zeros(P).double(), torch.ones(P).double()), 1)


def small(shifted: Any, **settings: Any) -> Any:
    given = {"parts": PARTS, "latent_dim": CODE, "part_dim": P, "level_dim": 7, "hidden_dims": (8,), **settings}
    return shifted(Nexus(SHAPE, **given).double())


def with_noise(model: Any, x: Tensor, eps: Tensor | None = None) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        return model.loss(x)


def own(model: Any, x: Tensor) -> list[Any]:
    """Each part's mean and log-variance."""
    return [net(part).chunk(2, 1) for net, part in zip(model.encoder, x.split(PARTS, 1), strict=True)]


def above(model: Any, z: Any, chosen: Any = range(M)) -> D.Independent:
    """q(u|z_S), given the codes of all parts."""
    return normal(*model.top.node(sum(model.top.messages[i](z[i]) for i in chosen) / len(chosen)))


def below(model: Any, u: Tensor) -> list[D.Independent]:
    scales = model.top.s_log_var_MP
    return [normal(net(u), scale.expand(len(u), P)) for net, scale in zip(model.top.downward, scales, strict=True)]


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [None, (1,), (0, 2)])
def test_loss_matches_torch_distributions_with_joint_u(chosen: Any, shifted: Any) -> None:
    """With messages of all parts, or of some as with dropout; the upper level has no gradient for the codes below."""
    model, x = small(shifted, beta=3.0, top_beta=2.0), images()
    eps = torch.randn(5, M * P + CODE, dtype=torch.float64)
    if chosen:
        model.top.senders = lambda seen: torch.tensor([i in chosen for i in range(M)]).expand_as(seen)
    terms = with_noise(model.train(chosen is not None), x, eps)
    q = [normal(*pair) for pair in own(model, x)]
    z = [q_i.mean + q_i.stddev * e for q_i, e in zip(q, eps[:, : M * P].split(P, 1), strict=True)]
    logits = torch.cat([net(z_i) for net, z_i in zip(model.decoder, z, strict=True)], 1)
    nll = -D.Bernoulli(logits=logits, validate_args=False).log_prob(x).flatten(1).sum(1)
    fixed = [z_i.detach() for z_i in z]
    q_u = above(model, fixed, chosen or range(M))
    u = q_u.mean + q_u.stddev * eps[:, M * P :]
    top_nll = -sum(p.log_prob(z_i) for p, z_i in zip(below(model, u), fixed, strict=True))
    kl, top_kl = sum(D.kl_divergence(q_i, PRIOR_OF_PART) for q_i in q), D.kl_divergence(q_u, PRIOR)
    elbo = sum(q_i.entropy() for q_i in q) - nll - top_nll - top_kl
    expected = {"loss": nll + 3.0 * kl + top_nll + 2.0 * top_kl, "nll": nll, "kl": kl, "top_nll": top_nll}
    expected |= {"top_kl": top_kl, "elbo": elbo}
    silent = tuple(f"top.messages.{i}." for i in range(M) if chosen and i not in chosen)
    assert_same_terms(model, terms, {term: values.mean() for term, values in expected.items()}, silent)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_first_level_vaes_train_independently(dropout: float, shifted: Any) -> None:
    model, x = small(shifted, beta=3.0, dropout=dropout), images()
    eps = torch.randn(5, M * P + CODE, dtype=torch.float64)
    terms = with_noise(model, x, eps)
    nll, kl = 0.0, 0.0
    for i, part in enumerate(x.split(PARTS, 1)):
        vae: Any = VAE(tuple(part.shape[1:]), latent_dim=P, hidden_dims=(8,), beta=3.0).double()
        vae.encoder, vae.decoder = model.encoder[i], model.decoder[i]
        alone = with_noise(vae, part, eps[:, i * P : (i + 1) * P])
        nll, kl = nll + alone["nll"], kl + alone["kl"]
        for net in (vae.encoder, vae.decoder):
            for a, b in zip(gradients(terms["loss"], net), gradients(alone["loss"], net), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(terms["nll"], nll)
    torch.testing.assert_close(terms["kl"], kl)


def test_the_levels_share_no_parameter_and_no_gradient(shifted: Any) -> None:
    model, x = small(shifted), images()
    terms = model.loss(x)
    for term in ("top_nll", "top_kl"):
        assert not any(g is not None for net in (model.encoder, model.decoder) for g in gradients(terms[term], net))
    assert not any(g is not None for term in ("nll", "kl") for g in gradients(terms[term], model.top))
    assert all(g.abs().max() > 0 for g in gradients(terms["loss"], model.top))


# ---- forced perceptual dropout ---------------------------------------------------------------------------------------


def test_dropout_draws_number_then_subset_of_senders() -> None:
    model, n = Nexus((5,), parts=(1,) * 5, dropout=0.4, hidden_dims=()), 30_000
    sent = model.top.senders(torch.ones(n, 5, dtype=torch.bool))
    sizes = sent.sum(1)
    assert sizes.unique().tolist() == [1, 2, 3, 4, 5]
    assert stats.binomtest(int((sizes < 5).sum()), n, 0.4).pvalue > 1e-3
    assert stats.chisquare(sizes.bincount()[1:5].numpy()).pvalue > 1e-3
    for size in range(1, 5):
        numbers = (sent[sizes == size] * 2 ** torch.arange(5)).sum(1).bincount()
        counts = numbers[numbers > 0].numpy()
        assert len(counts) == math.comb(5, size) and stats.chisquare(counts).pvalue > 1e-3


def test_no_dropout_or_one_modality_sends_all() -> None:
    of = torch.ones(100, 2, dtype=torch.bool)
    assert Nexus((6,), dropout=0.0).top.senders(of).all()
    assert Nexus((6,), parts=(6,), dropout=1.0).top.senders(of[:, :1]).all()
    assert Nexus((6,), dropout=1.0).top.senders(of).sum(1).eq(1).all()


def test_dropout_applies_to_training_loss_only(shifted: Any) -> None:
    model, x, asked = small(shifted, dropout=1.0), images(), []
    model.top.senders = lambda seen: asked.append(len(seen)) or seen
    for training in (True, False):
        model.train(training)
        for call in (model.encode, model, model.score, lambda x: model.sample_posterior(x, 2)):
            call(x)
    model.loss(x)
    assert asked == []
    model.train().loss(x)
    assert asked == [5]


# ---- codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
def test_codes_of_missing_modalities_come_from_top_level(chosen: Any, shifted: Any) -> None:
    model, x = small(shifted).eval(), images()
    pairs = own(model, x)
    q_u = above(model, [mu for mu, _ in pairs], chosen)
    predicted = below(model, q_u.mean)
    for order in itertools.permutations(chosen):
        mean, log_var = model.infer(x, order)
        torch.testing.assert_close(mean[:, :CODE], q_u.mean)
        torch.testing.assert_close(log_var[:, :CODE].exp(), q_u.variance)
        for i in range(M):
            expected = normal(*pairs[i]) if i in chosen else predicted[i]
            z_i = slice(CODE + i * P, CODE + (i + 1) * P)
            torch.testing.assert_close(mean[:, z_i], expected.mean)
            torch.testing.assert_close(log_var[:, z_i].exp(), expected.variance)
    assert mean.shape == (5, *model.code_shape) == (5, CODE + M * P)


def test_parts_are_decoded_from_own_code_only(shifted: Any) -> None:
    model, z = small(shifted), torch.randn(4, CODE + M * P, dtype=torch.float64)
    before = model.decode(z)
    expected = [net(z_i) for net, z_i in zip(model.decoder, z[:, CODE:].split(P, 1), strict=True)]
    torch.testing.assert_close(before, torch.cat(expected, 1).sigmoid())
    z[:, :CODE] += 1.0
    assert torch.equal(model.decode(z), before)


def test_posterior_draw_densities_match(shifted: Any) -> None:
    model, x, n = small(shifted), images(2), 5_000
    code, log_q = model.sample_posterior(x, n)
    u, *z = code.split([CODE, *[P] * M], 2)
    q_z, q_u = [normal(*pair) for pair in own(model, x)], above(model, z)
    torch.testing.assert_close(log_q, q_u.log_prob(u) + sum(q.log_prob(z_i) for q, z_i in zip(q_z, z, strict=True)))
    for noise in ((u - q_u.mean) / q_u.stddev, *((z_i - q.mean) / q.stddev for q, z_i in zip(q_z, z, strict=True))):
        assert all(stats.kstest(d.detach().numpy(), stats.norm.cdf).pvalue > 1e-4 for d in noise.flatten(0, 1).T)


def test_prior_matches_torch_and_draws_u_first(shifted: Any) -> None:
    model, n = small(shifted), 5_000
    code = model.sample_prior(n)
    u, *z = code.split([CODE, *[P] * M], 1)
    p = below(model, u)
    expected = PRIOR.log_prob(u) + sum(p_i.log_prob(z_i) for p_i, z_i in zip(p, z, strict=True))
    torch.testing.assert_close(model.log_prior(code), expected)
    torch.testing.assert_close(model.log_prior(code[:6].view(2, 3, -1)), expected[:6].view(2, 3))
    for noise in (u, *((z_i - p_i.mean) / p_i.stddev for p_i, z_i in zip(p, z, strict=True))):
        assert all(stats.kstest(d.detach().numpy(), stats.norm.cdf).pvalue > 1e-4 for d in noise.T)


# ---- exact evidence --------------------------------------------------------------------------------------------------


SIZES, SCALE = (3, 4, 2), 2.0


def linear(shifted: Any) -> tuple[Any, Any, Any]:
    """A linear model with one value for u and each z_i, mean and covariance of z, and W and b of E[x|z] = W z + b."""
    given = {"latent_dim": 1, "part_dim": 1, "level_dim": 2, "hidden_dims": (), "activation": "identity"}
    torch.manual_seed(0)
    model: Any = shifted(Nexus((9,), parts=SIZES, likelihood=f"gaussian:{SCALE}", **given).double()).eval()
    with torch.no_grad():
        model.top.s_log_var_MP.copy_(torch.tensor([[-0.5], [-0.2], [0.2]]))
        for net, load in zip(model.top.downward, (0.3, 0.5, -0.4), strict=True):
            net[0].weight.fill_(0.8)
            net[2].weight.fill_(load)
    zero_u, zero = torch.zeros(1).double(), torch.zeros(4).double()
    A, a = jacobian(lambda u: model.top.down(u)[0][:, 0], zero_u), model.top.down(zero_u)[0][:, 0]
    W = jacobian(lambda z: model.decoder(z[None])[0], zero)[:, 1:]
    b = model.decoder(zero[None])[0]
    S = model.top.s_log_var_MP[:, 0].exp().diag()
    return model, (a.detach().numpy(), (A @ A.T + S).detach().numpy()), (W.detach().numpy(), b.detach().numpy())


def test_bounds_and_importance_samples_against_evidence(shifted: Any) -> None:
    """With encoders that depend little on x, with the mean of the prior and about its width."""
    model, (mean, covariance), (W, b) = linear(shifted)
    law = stats.multivariate_normal(W @ mean + b, W @ covariance @ W.T + SCALE**2 * np.eye(9))
    x = law.rvs(4, random_state=1)
    with torch.no_grad():
        for net, m in zip((*model.encoder, model.top.node), (*mean, 0.0), strict=True):
            for p in net.parameters():
                p *= 0.1
            p.copy_(torch.tensor([m, 0.5]))  # the last parameter is the bias of a mean and a log-variance
        found = model.log_likelihood(torch.from_numpy(x), 20_000).numpy()
        np.testing.assert_allclose(found, law.logpdf(x), rtol=0, atol=0.05)
        bounds = torch.stack([model.loss(torch.from_numpy(x).repeat(500, 1))["elbo"] for _ in range(10)])
    gap = law.logpdf(x).mean() - bounds.mean().item()
    assert gap > 5 * bounds.std().item() / math.sqrt(10)


def test_exact_upper_level_gives_evidence_of_codes(shifted: Any) -> None:
    model, (mean, covariance), _ = linear(shifted)
    precision = np.exp(-model.top.s_log_var_MP.detach().numpy()[:, 0])
    A = jacobian(lambda u: model.top.down(u)[0][:, 0], torch.zeros(1).double())[:, 0].numpy()
    posterior = 1 / (1 + (A**2 * precision).sum())
    with torch.no_grad():
        for i, net in enumerate(model.top.messages):
            gain = M * posterior * A[i] * precision[i]  # messages are averaged
            net.weight.copy_(torch.tensor([[gain], [0.0]], dtype=torch.float64))
            net.bias.copy_(torch.tensor([-gain * mean[i], 0.0], dtype=torch.float64))
        first, last = model.top.node[0], model.top.node[2]
        first.weight.copy_(torch.eye(2))
        first.bias.zero_()
        last.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        last.bias.copy_(torch.tensor([0.0, math.log(posterior)], dtype=torch.float64))
        x = torch.randn(4, 9).double()
        code, log_q = model.sample_posterior(x, 50)
        mu, log_var = model.experts(x)
        z = code[..., 1:]
        weights = model.log_prior(code) - (log_q - normal(mu[..., 0], log_var[..., 0]).log_prob(z))
    evidence = stats.multivariate_normal(mean, covariance).logpdf(z.numpy())
    np.testing.assert_allclose(weights.numpy(), evidence, rtol=1e-9)


def test_invalid_code_sizes_are_refused() -> None:
    model = Nexus((6,), latent_dim=3, part_dim=2)
    assert model.code_shape == (7,) and model.hparams["latent_dim"] == 3 and not hasattr(model, "capacity")
    for name in ("latent_dim", "part_dim", "level_dim"):
        with pytest.raises(AezooError, match=f"{name} must be at least 1"):
            Nexus((6,), **{name: 0})
    with pytest.raises(AezooError, match="dropout must be from 0 to 1, got"):
        Nexus((6,), dropout=1.5)
    with pytest.raises(AezooError, match="top_beta must be at least 0"):
        Nexus((6,), top_beta=-1.0)


def test_nexus_draws_use_prior_for_missing_modalities(shifted: Any) -> None:
    model, x, seen = small_missing_modality(Nexus, shifted), images_missing_modality(2), (0, 2)
    other = smaller(model, seen)
    z, log_q = model.sample_posterior(without(x, seen), 4000)
    u, own = z[..., :MISSING_MODALITY_CODE], z[..., MISSING_MODALITY_CODE:].unflatten(2, (3, -1))
    mu, log_var = other.experts(of_parts(x, seen))
    below = D.Normal(mu, (0.5 * log_var).exp()).log_prob(own[:, :, [*seen]]).sum((2, 3))
    u_mu, u_log_var = other.top.up(own[:, :, [*seen]], range(2))
    m, log_s2 = (values[:, :, 1] for values in model.top.down(u))
    prior = D.Normal(m, (0.5 * log_s2).exp())
    expected = below + D.Normal(u_mu, (0.5 * u_log_var).exp()).log_prob(u).sum(2) + prior.log_prob(own[:, :, 1]).sum(2)
    torch.testing.assert_close(log_q, expected)
    assert stats.kstest(prior.cdf(own[:, :, 1]).flatten().detach(), "uniform").pvalue > 1e-4


def test_dropout_selects_among_present_modalities() -> None:
    top, seen = Nexus((5,), parts=(1,) * 5, dropout=1.0, hidden_dims=()).top, torch.tensor([1, 0, 1, 1, 0]).bool()
    sent = top.senders(seen.expand(3000, 5))
    assert not sent[:, ~seen].any() and sent.sum(1).unique().tolist() == [1, 2]
    one = torch.tensor([0, 0, 0, 1, 0]).bool().expand(9, 5)
    assert torch.equal(top.senders(one), one)
