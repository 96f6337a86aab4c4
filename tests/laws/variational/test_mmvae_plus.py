"""Laws of MMVAE+, with a private code for each part as well (Palumbo et al. 2023)."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from missing_modality_laws import (  # noqa: F401
    test_loss_matches_models_of_present_modalities,
    test_missing_modality_gets_no_gradient,
    test_outputs_equal_model_of_present_modalities,
    test_partly_missing_modalities_are_refused,
    test_posterior_draws_use_present_components,
)
from mmvae_plus_helpers import (
    M,
    P,
    noise,
    split_parts,
    with_draws,
)
from multimodal_laws import (  # noqa: F401
    CODE,
    PARTS,
    PRIOR,
    SHAPE,
    assert_same_terms,
    images,
    mixture,
    normal,
    small_vae,
    test_inconsistent_part_sizes_are_refused,
    test_other_experts_get_no_reconstruction_gradient,
    test_part_sizes_may_be_list_and_capacity_is_refused,
    test_partial_reconstruction_ignores_other_modalities,
    test_score_is_noise_free_bound_of_all_parts,
    test_unknown_parts_are_refused,
)
from scipy import stats
from torch import Tensor, nn

from aezoo import AezooError
from aezoo.models.variational.mmvae import MMVAE
from aezoo.models.variational.mmvae_plus import MMVAEPlus


def small(shifted: Any, **settings: Any) -> Any:
    given = {"parts": PARTS, "latent_dim": CODE, "private_dim": P, "hidden_dims": (8,), **settings}
    return shifted(MMVAEPlus(SHAPE, **given).double())


def test_loss_matches_torch_distributions_with_r_draws(shifted: Any) -> None:
    model, x, draws = small(shifted, beta=3.0), images(), noise()
    terms = with_draws(model, x, *draws)
    own = [net(part).chunk(2, 1) for net, part in zip(model.encoder, x.split(PARTS, 1), strict=True)]
    q_u = mixture(*(torch.stack([split_parts(expert[k])[0] for expert in own], 1) for k in (0, 1)))
    private = D.Independent(D.Normal(torch.zeros(P).double(), torch.ones(P).double()), 1)
    nll, kl = [], []
    for i, (mu, log_var) in enumerate(own):
        u, w = split_parts(mu + (0.5 * log_var).exp() * draws[0][:, i])
        z = [w if j == i else draws[1][:, i, j] * (0.5 * model.r_log_var_MP[j]).exp() for j in range(M)]
        log_p = D.Bernoulli(probs=model.decode(torch.cat([u, *z], 1)), validate_args=False).log_prob(x)
        nll.append(-log_p.flatten(1).sum(1))
        q_u_i, q_w_i = (normal(*pair) for pair in zip(split_parts(mu), split_parts(log_var), strict=True))
        of_u = D.kl_divergence(q_u_i, PRIOR) - q_u_i.log_prob(u) + q_u.log_prob(u)
        kl.append(of_u + D.kl_divergence(q_w_i, private))
    mean_nll, mean_kl = torch.stack(nll).mean(), torch.stack(kl).mean()
    expected = {"loss": mean_nll + 3.0 * mean_kl, "nll": mean_nll, "kl": mean_kl, "elbo": -(mean_nll + mean_kl)}
    assert_same_terms(model, terms, expected)


@pytest.mark.parametrize("training", [True, False])
def test_without_private_codes_equals_mmvae_exactly(training: bool, shifted: Any) -> None:
    model, x, found = small(shifted, private_dim=0, beta=3.0), images(), []
    other = MMVAE(SHAPE, parts=PARTS, latent_dim=CODE, hidden_dims=(8,), beta=3.0).double()
    other.load_state_dict({name: value for name, value in model.state_dict().items() if name != "r_log_var_MP"})
    for each in (model, other):
        torch.manual_seed(3)
        terms = each.train(training).loss(x)
        nets = [*each.encoder.parameters(), *each.decoder.parameters()]
        called = [getattr(each.eval(), call)(x) for call in ("encode", "forward", "score")]
        found.append([*terms.values(), *torch.autograd.grad(terms["loss"], nets), *called, *each.posterior(x)])
        found[-1] += [each.reconstruct_from(x, (2, 0)), *each.sample_posterior(x, 3)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_one_part_equals_vae_of_joined_code_exactly(training: bool, shifted: Any) -> None:
    vae = small_vae(shifted, beta=3.0)
    model = small(shifted, parts=(6,), latent_dim=CODE - 1, private_dim=1, beta=3.0)
    own = {name.replace("coder.", "coder.0.", 1): value for name, value in vae.state_dict().items()}
    model.load_state_dict({**own, "r_log_var_MP": model.r_log_var_MP.detach()})
    x, found = images(), []
    for each in (model, vae):
        torch.manual_seed(3)
        terms = each.train(training).loss(x)
        nets = [*each.encoder.parameters(), *each.decoder.parameters()]
        called = [getattr(each.eval(), call)(x) for call in ("encode", "forward", "score")]
        found.append([terms[term] for term in ("loss", "nll", "kl", "elbo")] + called)
        found[-1] += [*torch.autograd.grad(terms["loss"], nets)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_private_codes_do_not_affect_other_parts(shifted: Any) -> None:
    """Gradients of each part's likelihood by the three posteriors, and by r if u is from another part."""
    model, x = small(shifted), images()
    values = [v.detach().requires_grad_() for v in model.experts(x)]
    model.experts = lambda x, parts=None: tuple(values)
    whole, only = model.nll_of_part, 0
    model.nll_of_part = lambda i, z, x_i: whole(i, z, x_i) * (i == only)
    for only in range(M):
        draws = [d.requires_grad_() for d in noise()]
        nll = with_draws(model, x, *draws)["nll"]
        own, of_r, of_draws = torch.autograd.grad(nll, [values[0], model.r_log_var_MP, draws[1]])
        assert [(g.abs().max() > 0).item() for g in split_parts(own)[1].unbind(1)] == [i == only for i in range(M)]
        assert all(g.abs().max() > 0 for g in split_parts(own)[0].unbind(1))
        assert [(g.abs().max() > 0).item() for g in of_r] == [i == only for i in range(M)]
        for i, j in itertools.product(range(M), range(M)):
            assert (of_draws[:, i, j].abs().max() > 0) == (j == only != i)


def test_learned_scale_affects_r_but_not_the_score(shifted: Any) -> None:
    model, x = small(shifted).eval(), images()
    with torch.no_grad():
        terms = with_draws(model, x, *map(torch.zeros_like, noise()))
        torch.testing.assert_close(model.score(x).mean(), -terms["elbo"])
        before = model.score(x)
        model.r_log_var_MP += 5.0
        assert torch.equal(model.score(x), before)
        draws = noise()
        twice = with_draws(model, x, draws[0], draws[1] * math.exp(2.5))
        model.r_log_var_MP += 5.0
        torch.testing.assert_close(with_draws(model, x, *draws)["nll"], twice["nll"])


def test_codes_are_shared_mean_and_private_or_prior(shifted: Any) -> None:
    model, x = small(shifted).eval(), images()
    mu, log_var = model.experts(x)
    for chosen in ((0,), (2, 0), (1, 2), (0, 1, 2), (2, 1, 0)):
        q_u = mixture(*(split_parts(values[:, [*chosen]])[0] for values in (mu, log_var)))
        mean, log_variance = model.infer(x, chosen)
        torch.testing.assert_close(mean[:, :CODE], q_u.mean)
        torch.testing.assert_close(log_variance[:, :CODE].exp(), q_u.variance)
        for values, own in ((mean, mu), (log_variance, log_var)):
            for i, w in enumerate(values[:, CODE:].split(P, 1)):
                assert torch.equal(w, split_parts(own)[1][:, i] if i in chosen else torch.zeros_like(w))
    assert model.encode(x).shape == (5, CODE + M * P) == (5, *model.code_shape)


def test_parts_are_decoded_from_shared_and_own_code(shifted: Any) -> None:
    model, z = small(shifted), torch.randn(4, CODE + M * P, dtype=torch.float64)
    before = model.decode(z).split(PARTS, 1)
    for j in range(M):
        changed = z.clone()
        changed[:, CODE + j * P : CODE + (j + 1) * P] += 1.0
        after = model.decode(changed).split(PARTS, 1)
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != j for i in range(M)]
    z[:, :CODE] += 1.0
    assert all((a != b).any() for a, b in zip(before, model.decode(z).split(PARTS, 1), strict=True))


def test_posterior_draw_densities_match(shifted: Any) -> None:
    model, x = small(shifted), images(2)
    z, log_q = model.sample_posterior(x, 20_000)
    mu, log_var = model.experts(x)
    q_u = mixture(*(split_parts(values)[0] for values in (mu, log_var)))
    q_w = normal(*(split_parts(values)[1].flatten(1) for values in (mu, log_var)))
    torch.testing.assert_close(log_q, q_u.log_prob(z[..., :CODE]) + q_w.log_prob(z[..., CODE:]))
    for b in range(2):
        for d in range(M * P):
            law = stats.norm(*(float(v[b, d].detach()) for v in (q_w.mean, q_w.stddev)))
            assert stats.kstest(z[:, b, CODE + d].detach().numpy(), law.cdf).pvalue > 1e-4


# ---- exact evidence --------------------------------------------------------------------------------------------------


SIZES, SCALE = (3, 4, 2), 1.0


def linear(r_log_var: float) -> tuple[Any, Tensor, np.ndarray]:
    """x_i = U_i u + W_i w_i + m_i + noise: a model, samples of it, and their log-evidence by scipy."""
    rng = np.random.default_rng(0)
    model: Any = MMVAEPlus(
        (9,), parts=SIZES, latent_dim=2, private_dim=1, hidden_dims=(), likelihood=f"gaussian:{SCALE}"
    ).double()
    covariance, mean, row = SCALE**2 * np.eye(9), rng.normal(size=9), 0
    loads = rng.normal(size=(9, 5)) * 0.7
    for i, (size, net) in enumerate(zip(SIZES, model.decoder, strict=True)):
        rows = slice(row, row + size)
        (layer,) = (m for m in net.modules() if isinstance(m, nn.Linear))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(loads[rows][:, [0, 1, 2 + i]]))
            layer.bias.copy_(torch.from_numpy(mean[rows]))
        loads[rows, [2 + j for j in range(3) if j != i]] = 0
        row += size
    covariance += loads @ loads.T
    model.r_log_var_MP.data.fill_(r_log_var)
    x = rng.multivariate_normal(mean, covariance, size=4)
    return model.eval(), torch.from_numpy(x), stats.multivariate_normal(mean, covariance).logpdf(x)


def test_importance_samples_find_the_evidence() -> None:
    """With encoders that depend little on x and are about as wide as the prior."""
    model, x, evidence = linear(-3.0)
    with torch.no_grad():
        for p in model.encoder.parameters():
            p *= 0.1
    np.testing.assert_allclose(model.log_likelihood(x, 40_000).numpy(), evidence, atol=0.15)


@pytest.mark.slow
def test_prior_for_r_gives_bound_that_training_tightens() -> None:
    """A gap remains, because with u from another part the posterior of a private code is its prior."""
    model, x, evidence = linear(0.0)
    model.r_log_var_MP.requires_grad_(False)
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.05)
    gaps = []
    for step in range(151):
        loss = model.loss(x.repeat(50, 1))["loss"]
        if step in (0, 150):
            with torch.no_grad():
                found = torch.stack([model.loss(x.repeat(500, 1))["elbo"] for _ in range(10)])
            gaps.append(evidence.mean() - found.mean().item())
            assert gaps[-1] > 5 * found.std().item() / math.sqrt(10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert gaps[1] < 0.5 * gaps[0]


def test_invalid_code_sizes_are_refused() -> None:
    model = MMVAEPlus((6,), latent_dim=3, private_dim=2)
    assert model.code_shape == (7,) and model.hparams["latent_dim"] == 3 and not hasattr(model, "capacity")
    # r is not used for one part or without private codes
    for settings in ({}, {"parts": (6,)}, {"private_dim": 0}):
        assert MMVAEPlus((6,), **settings).r_log_var_MP.requires_grad == (not settings)
    with pytest.raises(AezooError, match="latent_dim must be at least 1"):
        MMVAEPlus((6,), latent_dim=0)
    with pytest.raises(AezooError, match="private_dim must be at least 0"):
        MMVAEPlus((6,), private_dim=-1)
