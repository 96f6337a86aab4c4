"""Laws of CMVAE, the clustering multimodal VAE (Palumbo et al. 2024)."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from missing_modality_laws import images as images_missing_modality
from missing_modality_laws import (  # noqa: F401
    of_parts,
    smaller,
    test_loss_matches_models_of_present_modalities,
    test_missing_modality_gets_no_gradient,
    test_outputs_equal_model_of_present_modalities,
    test_partly_missing_modalities_are_refused,
    test_posterior_draws_use_present_components,
    without,
)
from missing_modality_laws import small as small_missing_modality
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
    SHAPE,
    assert_same_terms,
    images,
    mixture,
    normal,
    test_inconsistent_part_sizes_are_refused,
    test_other_experts_get_no_reconstruction_gradient,
    test_part_sizes_may_be_list_and_capacity_is_refused,
    test_partial_reconstruction_ignores_other_modalities,
    test_score_is_noise_free_bound_of_all_parts,
    test_unknown_parts_are_refused,
)
from scipy import stats
from scipy.integrate import quad
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from aezoo import AezooError
from aezoo.models.variational.cmvae import CMVAE
from aezoo.models.variational.mixture_vae import MixtureVAE
from aezoo.models.variational.mmvae_plus import MMVAEPlus

K = 4


def small(shifted: Any, **settings: Any) -> Any:
    sizes = {"latent_dim": CODE, "private_dim": P, "n_components": K, "hidden_dims": (8,)}
    return shifted(CMVAE(SHAPE, **{"parts": PARTS, **sizes, **settings}).double())


def clusters(model: Any) -> tuple[D.Categorical, D.Independent]:
    """The prior's p(c) and p(u|c), by torch.distributions."""
    return D.Categorical(logits=model.weight_K), normal(model.mean_KD, model.log_var_KD)


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_matches_paper_with_cluster_mean(shifted: Any) -> None:
    """The sampled terms of the paper, plus a closed-form KL minus its estimate from the draw."""
    model, x, draws = small(shifted, beta=3.0), images(), noise()
    terms = with_draws(model, x, *draws)
    own = [net(part).chunk(2, 1) for net, part in zip(model.encoder, x.split(PARTS, 1), strict=True)]
    q_u = mixture(*(torch.stack([split_parts(expert[k])[0] for expert in own], 1) for k in (0, 1)))
    p_c, p_u_c = clusters(model)
    standard = [D.Independent(D.Normal(torch.zeros(n).double(), torch.ones(n).double()), 1) for n in (CODE, P)]
    nll, kl = [], []
    for i, (mu, log_var) in enumerate(own):
        u, w = split_parts(mu + (0.5 * log_var).exp() * draws[0][:, i])
        z = [w if j == i else draws[1][:, i, j] * (0.5 * model.r_log_var_MP[j]).exp() for j in range(M)]
        log_p = D.Bernoulli(probs=model.decode(torch.cat([u, *z], 1)), validate_args=False).log_prob(x)
        nll.append(-log_p.flatten(1).sum(1))
        log_joint = p_c.logits + p_u_c.log_prob(u[:, None])
        q_c = D.Categorical(logits=log_joint)
        given_c = (q_c.probs * (log_joint - q_c.probs.log())).sum(1)
        q_u_i, q_w_i = (normal(*pair) for pair in zip(split_parts(mu), split_parts(log_var), strict=True))
        off = D.kl_divergence(q_u_i, standard[0]) - (q_u_i.log_prob(u) - standard[0].log_prob(u))
        kl.append(q_u.log_prob(u) - given_c + D.kl_divergence(q_w_i, standard[1]) + off)
    mean_nll, mean_kl = torch.stack(nll).mean(), torch.stack(kl).mean()
    expected = {"loss": mean_nll + 3.0 * mean_kl, "nll": mean_nll, "kl": mean_kl, "elbo": -(mean_nll + mean_kl)}
    assert_same_terms(model, terms, expected)


@pytest.mark.parametrize("training", [True, False])
def test_one_standard_cluster_equals_mmvae_plus(training: bool, shifted: Any) -> None:
    model, x, found = small(shifted, n_components=1, beta=3.0), images(), []
    with torch.no_grad():
        model.mean_KD.zero_()
        model.log_var_KD.zero_()
    other = MMVAEPlus(SHAPE, parts=PARTS, latent_dim=CODE, private_dim=P, hidden_dims=(8,), beta=3.0).double()
    of_prior = ("weight_K", "mean_KD", "log_var_KD")
    other.load_state_dict({name: value for name, value in model.state_dict().items() if name not in of_prior})
    for each in (model, other):
        torch.manual_seed(3)
        terms = each.train(training).loss(x)
        own = [p for name, p in each.named_parameters() if name not in of_prior]
        called = [getattr(each.eval(), call)(x) for call in ("encode", "forward", "score")]
        z, log_q = each.sample_posterior(x, 3)
        found.append([*terms.values(), *torch.autograd.grad(terms["loss"], own), *called, z, log_q, each.log_prior(z)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_modality_equals_mixture_vae(shifted: Any) -> None:
    model, x = small(shifted, parts=(6,), private_dim=0, beta=3.0), images()
    other = MixtureVAE(SHAPE, latent_dim=CODE, n_components=K, hidden_dims=(8,), beta=3.0).double()
    own = {name.replace("coder.0.", "coder.", 1): value for name, value in model.state_dict().items()}
    other.load_state_dict({name: value for name, value in own.items() if name != "r_log_var_MP"})
    eps = torch.randn(5, CODE, dtype=torch.float64)
    mine = with_draws(model, x, eps[:, None], torch.zeros(5, 1, 1, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *size, **_: eps[None])
        theirs = other.loss(x)
    mu, log_var = other.posterior(x)
    q, u = normal(mu, log_var), mu + (0.5 * log_var).exp() * eps
    standard = normal(torch.zeros_like(mu), torch.zeros_like(mu))
    off = (D.kl_divergence(q, standard) - q.log_prob(u) + standard.log_prob(u)).mean()
    torch.testing.assert_close(mine["nll"], theirs["nll"])
    torch.testing.assert_close(mine["kl"], theirs["kl"] + off)
    for call in ("encode", "forward"):
        torch.testing.assert_close(getattr(model.eval(), call)(x), getattr(other.eval(), call)(x))


@pytest.mark.parametrize("distance", [0.0, 1.0, 4.0])
def test_mixture_kl_matches_numerical_integration(distance: float, shifted: Any) -> None:
    """The batch repeats one sample, so its mean is over draws."""
    n, sigma = 20_000, torch.tensor([0.5, 0.8]).double()
    mu = distance * torch.tensor([-1.0, 0.7]).double() + 0.3
    model = shifted(CMVAE((2,), latent_dim=1, private_dim=0, n_components=3, hidden_dims=()).double())
    own = (mu[None, :, None].expand(n, -1, -1), 2 * sigma.log()[None, :, None].expand(n, -1, -1))
    model.experts = lambda x, parts=None: own
    with torch.no_grad():
        per_draw = model.bound(torch.rand(n, 2).double())[1].mean(1)
    q = stats.norm(mu.numpy(), sigma.numpy())
    weights = model.weight_K.detach().softmax(0).numpy()
    p = stats.norm(model.mean_KD.detach()[:, 0].numpy(), (0.5 * model.log_var_KD.detach()[:, 0]).exp().numpy())

    def integrand(u: float) -> float:
        density = q.pdf(u).mean()
        return float(density * np.log(density / (weights * p.pdf(u)).sum())) if density > 1e-300 else 0.0

    exact = quad(integrand, -9, 9, points=[*mu.numpy()], limit=200)[0]
    assert per_draw.mean().item() == pytest.approx(exact, abs=5 * per_draw.std().item() / math.sqrt(n))


def test_the_prior_learns_only_from_the_kl(shifted: Any) -> None:
    model = small(shifted)
    terms, prior = model.loss(images()), [model.weight_K, model.mean_KD, model.log_var_KD]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(terms["kl"], prior, retain_graph=True))
    assert all(g is None for g in torch.autograd.grad(terms["nll"], prior, allow_unused=True))


# ---- the prior -------------------------------------------------------------------------------------------------------


def test_prior_is_clusters_for_shared_normal_for_private(shifted: Any) -> None:
    model = small(shifted)
    p_c, p_u_c = clusters(model)
    p_u = D.MixtureSameFamily(p_c, p_u_c)
    z = 2 * torch.randn(6, 5, CODE + M * P, dtype=torch.float64)
    rest = D.Normal(0.0, 1.0).log_prob(z[..., CODE:]).sum(2)
    torch.testing.assert_close(model.log_prior(z), p_u.log_prob(z[..., :CODE]) + rest)
    drawn = model.sample_prior(40_000)
    expected = [torch.cat([a, b.expand(M * P)]) for a, b in ((p_u.mean, torch.zeros(1)), (p_u.stddev, torch.ones(1)))]
    for found, value in zip((drawn.mean(0), drawn.std(0)), expected, strict=True):
        assert ((found - value) / expected[1]).abs().max() < 0.03
    assert drawn[:, :CODE].T.corrcoef().fill_diagonal_(0).abs().max() > 0.05  # the clusters correlate dimensions
    assert model.sample(3).shape == (3, *SHAPE)


SIZES, SCALE = (3, 4, 2), 1.0


def linear() -> tuple[Any, Tensor, np.ndarray]:
    """A model x_i = U_i u + W_i w_i + m_i + noise with two clusters of u, samples, and their log-evidence by scipy."""
    rng = np.random.default_rng(0)
    sizes: dict[str, Any] = {"latent_dim": 2, "private_dim": 1, "n_components": 2, "hidden_dims": ()}
    model: Any = CMVAE((9,), parts=SIZES, likelihood=f"gaussian:{SCALE}", **sizes).double()
    mean, shared, private = rng.normal(size=9), 0.7 * rng.normal(size=(9, 2)), np.zeros((9, 3))
    for i, (rows, net) in enumerate(zip(np.split(np.arange(9), np.cumsum(SIZES)[:-1]), model.decoder, strict=True)):
        private[rows, i] = 0.7 * rng.normal(size=len(rows))
        (layer,) = (m for m in net.modules() if isinstance(m, nn.Linear))
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.column_stack([shared[rows], private[rows, i]])))
            layer.bias.copy_(torch.from_numpy(mean[rows]))
    weights, centres, scales = np.array([0.3, 0.7]), np.array([[2.0, 0.0], [-1.0, 1.0]]), np.array([[0.5, 1], [1, 0.7]])
    with torch.no_grad():
        model.weight_K.copy_(torch.from_numpy(np.log(weights) + 5))
        model.mean_KD.copy_(torch.from_numpy(centres))
        model.log_var_KD.copy_(torch.from_numpy(2 * np.log(scales)))
    rest = private @ private.T + SCALE**2 * np.eye(9)
    laws = [
        stats.multivariate_normal(shared @ centre + mean, shared @ np.diag(scale**2) @ shared.T + rest)
        for centre, scale in zip(centres, scales, strict=True)
    ]
    x = np.stack([laws[c].rvs(random_state=rng) for c in (0, 0, 1, 1)])
    return model.eval(), torch.from_numpy(x), np.log(sum(w * law.pdf(x) for w, law in zip(weights, laws, strict=True)))


@pytest.mark.slow
def test_importance_samples_find_evidence_above_the_bound() -> None:
    """With encoders that depend little on x and are about as wide as the prior."""
    model, x, evidence = linear()
    with torch.no_grad():
        for p in model.encoder.parameters():
            p *= 0.1
        for net in model.encoder:
            next(m for m in net.modules() if isinstance(m, nn.Linear)).bias[3:5] += 1.0
        np.testing.assert_allclose(model.log_likelihood(x, 40_000).numpy(), evidence, atol=0.15)
        found = torch.stack([model.loss(x.repeat(500, 1))["elbo"] for _ in range(10)])
    assert evidence.mean() - found.mean().item() > 5 * found.std().item() / math.sqrt(10)


# ---- clusters --------------------------------------------------------------------------------------------------------


def test_cluster_posterior_follows_code_distance(shifted: Any) -> None:
    """E_q[log p(c) p(u|c)] is log p(c) - KL(q || p(u|c)) up to a constant, which is the same for all clusters."""
    model, x = small(shifted).eval(), images()
    p_c, p_u_c = clusters(model)
    each = []
    for mu, log_var in zip(*(values.unbind(1) for values in model.components(x)), strict=True):
        q = normal(mu[:, None], log_var[:, None])
        each.append((p_c.logits - D.kl_divergence(q, p_u_c.expand((1, K)))).softmax(1))
    torch.testing.assert_close(model.clusters(x), torch.stack(each).mean(0))
    for chosen in ((0,), (2, 0), (1, 2)):
        other = torch.full_like(x, torch.nan)
        for i in chosen:
            model.split(other)[i].copy_(model.split(x)[i])
        torch.testing.assert_close(model.clusters(other, chosen), torch.stack([each[i] for i in chosen]).mean(0))
    assert not model.clusters(x).requires_grad


def clustered_model(n_components: int, n: int = 60) -> tuple[Any, Tensor, Tensor]:
    """A model with codes in three clusters, and others far away in the prior; samples, their clusters."""
    torch.manual_seed(1)
    model: Any = CMVAE((4,), latent_dim=2, private_dim=1, n_components=n_components, hidden_dims=()).double()
    centres = torch.tensor([[3.0, 0.0], [-3.0, 1.0], [0.0, -3.0]]).double()
    of = torch.arange(n) % 3
    with torch.no_grad():
        model.log_var_KD.fill_(2 * math.log(0.4))
        model.mean_KD[3:] = 8 + torch.arange(n_components - 3)[:, None]
        model.mean_KD[:3] = centres
    mu = centres[of][:, None] + 0.3 * torch.randn(n, 2, 2, dtype=torch.float64)
    mu, log_var = (nn.functional.pad(v, (0, 1)) for v in (mu, torch.full_like(mu, -4.0)))

    def experts(x: Tensor, parts: Any = None) -> tuple[Tensor, Tensor]:
        return mu[: len(x), list(range(2) if parts is None else parts)], log_var[: len(x)]

    model.experts = experts
    return model.eval(), torch.rand(n, 4, dtype=torch.float64), of


def test_samples_are_assigned_to_nearest_cluster() -> None:
    model, x, of = clustered_model(6)
    assert torch.equal(model.clusters(x).argmax(1), of)
    torch.testing.assert_close(model.clusters(x).sum(1), torch.ones(60).double())


@pytest.mark.parametrize("n_components", [3, 5, 7])
def test_pruned_clusters_are_never_drawn(n_components: int) -> None:
    model, x, of = clustered_model(n_components)
    entropies = model.prune(x)
    assert [*entropies] == [*range(n_components, 1, -1)] and min(entropies, key=lambda k: entropies[k]) == 3
    share = model.weight_K.softmax(0)
    torch.testing.assert_close(share[:3], torch.full((3,), 1 / 3).double())
    assert (share[3:] == 0).all() and model.weight_K.isfinite().all()
    assert torch.equal(model.clusters(x).argmax(1), of) and (model.clusters(x)[:, 3:] == 0).all()
    assert model.sample_mixture(500).abs().max() < 6
    terms = model.loss(x)
    terms["loss"].backward()
    assert model.weight_K.grad.isfinite().all() and (model.weight_K.grad[3:] == 0).all()
    assert (model.mean_KD.grad[3:] == 0).all() and model.mean_KD.grad[:3].abs().max() > 0
    assert [*model.prune(x)] == [3, 2]  # pruned clusters are not counted again


@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_entropies_match_scipy_and_least_cluster_is_pruned(beta: float, shifted: Any) -> None:
    model, x = small(shifted, beta=beta, n_components=3).eval(), images(20)
    p_c, p_u_c = clusters(model)
    joint, kept, expected = np.zeros((20, M, 3)), [0, 1, 2], {}
    for i, (mu, log_var) in enumerate(zip(*(values.unbind(1) for values in model.components(x)), strict=True)):
        q = normal(mu, log_var)
        kl_c = D.kl_divergence(normal(mu[:, None], log_var[:, None]), p_u_c.expand((1, 3)))
        joint[:, i] = (p_c.logits - kl_c - q.entropy()[:, None]).detach().numpy()
    while len(kept) > 1:
        weighed = np.exp(joint[..., kept]) / p_c.probs[kept].sum().item()
        q_c = weighed / weighed.sum(2, keepdims=True)
        entropy = stats.entropy(q_c, axis=2) / math.log(len(kept))
        expected[len(kept)] = float((beta * entropy - np.log(weighed.sum(2)) / CODE).mean())
        kept.pop(int(q_c.mean((0, 1)).argmin()))
    assert model.prune(x) == pytest.approx(expected)
    left = 3 if expected[3] < expected[2] else 2
    assert (model.weight_K.softmax(0) > 0).sum() == left


@pytest.mark.slow
def test_training_finds_clusters_and_pruning_their_number() -> None:
    """Data of three noisy patterns, a prior of six clusters."""
    torch.manual_seed(0)
    of = torch.arange(300) % 3
    patterns = torch.tensor([[1, 1, 0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 0, 0, 1], [1, 0, 1, 0, 1, 1, 0, 0]])
    x = patterns[of] + 0.15 * torch.randn(300, 8)
    sizes: dict[str, Any] = {"latent_dim": 2, "private_dim": 1, "n_components": 6, "hidden_dims": (16,)}
    model = CMVAE((8,), likelihood="gaussian:0.3", **sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        model.loss(x)["loss"].backward()
        optimizer.step()
    entropies = model.prune(x)
    assert min(entropies, key=lambda k: entropies[k]) == 3
    for parts in ((0,), (1,), (0, 1)):
        assert adjusted_rand_score(of, model.clusters(x, parts).argmax(1)) > 0.9


def test_invalid_cluster_counts_are_refused() -> None:
    with pytest.raises(AezooError, match="prune needs at least 2 clusters, but there is only one"):
        CMVAE((4,), n_components=1).prune(torch.rand(3, 4))
    with pytest.raises(AezooError, match="n_components must be at least 1, got 0"):
        CMVAE((4,), n_components=0)


def test_clusters_use_present_modalities(shifted: Any) -> None:
    model, x, seen = small_missing_modality(CMVAE, shifted), images_missing_modality(), (0, 2)
    other, given = smaller(model, seen), without(x, seen)
    torch.testing.assert_close(model.clusters(given), other.clusters(of_parts(x, seen)))
    assert copy.deepcopy(model).prune(given) == pytest.approx(other.prune(of_parts(x, seen)))
