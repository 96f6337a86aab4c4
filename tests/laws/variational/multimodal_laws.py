"""Laws of the multimodal VAEs: mixtures of experts, codes and samples from some parts, exact evidence."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from scipy import stats
from scipy.integrate import quad
from torch import Tensor, nn

import aezoo
from aezoo import AezooError
from aezoo.distributions import gaussians
from aezoo.models.variational.cmvae import CMVAE
from aezoo.models.variational.crmvae import CRMVAE
from aezoo.models.variational.dmvae import DMVAE
from aezoo.models.variational.jmvae import JMVAE
from aezoo.models.variational.jnf import JNF
from aezoo.models.variational.mmvae import MMVAE
from aezoo.models.variational.mmvae_plus import MMVAEPlus
from aezoo.models.variational.mopoe_vae import MoPoEVAE
from aezoo.models.variational.mvae import MVAE
from aezoo.models.variational.mvtcae import MVTCAE
from aezoo.models.variational.nexus import Nexus
from aezoo.models.variational.telbo import TELBO
from aezoo.models.variational.vae import VAE

SHAPE, PARTS, CODE = (6, 2, 3), (1, 2, 3), 4


MIXTURES: list[Any] = [MMVAE, MoPoEVAE]


ALL: list[Any] = [MVAE, *MIXTURES, JMVAE, MVTCAE, CRMVAE, TELBO]


EVERY: list[Any] = [*ALL, JNF, MMVAEPlus, DMVAE, CMVAE, Nexus]


def small(make: Any, shifted: Any, **settings: Any) -> Any:
    settings = {"parts": PARTS, "latent_dim": CODE, "hidden_dims": (8,), **settings}
    return shifted(make(SHAPE, **settings).double())


def images(n: int = 5) -> Tensor:
    return torch.rand(n, *SHAPE, dtype=torch.float64)


def experts(*batch: int) -> tuple[Tensor, Tensor]:
    """Random means and log-variances."""
    mu = 2 * torch.randn(*batch, CODE, dtype=torch.float64) + 0.5
    return mu, torch.randn(*batch, CODE, dtype=torch.float64) - 0.5


def normal(mu: Tensor, log_var: Tensor) -> D.Independent:
    return D.Independent(D.Normal(mu, (0.5 * log_var).exp()), 1)


def mixture(mu_BSD: Tensor, log_var_BSD: Tensor) -> D.MixtureSameFamily:
    return D.MixtureSameFamily(D.Categorical(torch.ones_like(mu_BSD[..., 0])), normal(mu_BSD, log_var_BSD))


PRIOR = D.Independent(D.Normal(torch.zeros(CODE).double(), torch.ones(CODE).double()), 1)


def given_noise(patch: pytest.MonkeyPatch, eps: Tensor | None = None) -> None:
    """Make torch.randn_like return this noise, or zeros."""
    patch.setattr(torch, "randn_like", lambda like: torch.zeros_like(like) if eps is None else eps)


def encoded(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and log-variances of the encoders: (B, M, D) each."""
    of_parts = [net(part).chunk(2, 1) for net, part in zip(model.encoder, x.split(model.sizes, 1), strict=True)]
    mu, log_var = (torch.stack(values, 1) for values in zip(*of_parts, strict=True))
    return mu, log_var


def assert_same_terms(
    model: Any, terms: dict[str, Tensor], expected: dict[str, Tensor], unused: tuple[str, ...] = ()
) -> None:
    """Compare values of all terms, and their gradients by every parameter, 0 where a term does not depend on it.

    Gradients are compared for the loss, which reaches all parameters but those whose names start with one of `unused`,
    and for a sum of all terms with random weights.
    """
    assert terms.keys() == expected.keys()
    for term, value in expected.items():
        torch.testing.assert_close(terms[term], value)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    share = torch.randn(len(expected)).double()
    sums = [(each["loss"], share @ torch.stack([each[term] for term in expected])) for each in (terms, expected)]
    for which, *both in zip(("the loss", "all terms"), *sums, strict=True):
        pairs = [
            torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for each in both
        ]
        for name, a, b in zip(names, *pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, w=which, n=name: f"{w} by {n}: {m}")
            assert which != "the loss" or bool(b.any()) != name.startswith(unused), name


# ---- sizes of the parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
def test_inconsistent_part_sizes_are_refused(make: Any) -> None:
    for parts in ((3, 2), (6, 1), (7, -1), (6, 0)):
        with pytest.raises(AezooError, match="parts must be sizes of at least 1 that add up to 6, dimension 0"):
            make(SHAPE, parts=parts)


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_each_modality_has_its_own_decoder(make: Any, net: str, shifted: Any) -> None:
    model, z = small(make, shifted, net=net), torch.randn(3, CODE, dtype=torch.float64)
    expected = torch.empty(3, *SHAPE, dtype=torch.float64)
    expected[:, :1], expected[:, 1:3], expected[:, 3:] = (model.decoder[i](z) for i in range(3))
    assert torch.equal(model.decode(z), expected.sigmoid())


# ---- one part --------------------------------------------------------------------------------------------------------


def one_part_model_and_vae(make: Any, shifted: Any, **settings: Any) -> tuple[Any, Any]:
    """A model of one part and a VAE with the same weights."""
    vae = small_vae(shifted, **settings)
    model = small(make, shifted, parts=(6,), **settings)
    own = {name.replace("coder.", "coder.0.", 1): value for name, value in vae.state_dict().items()}
    model.load_state_dict(own)
    return model, vae


def small_vae(shifted: Any, **settings: Any) -> Any:
    return shifted(VAE(SHAPE, latent_dim=CODE, hidden_dims=(8,), **settings).double())


def assert_equals_vae(model: Any, vae: Any, training: bool, **close: float) -> None:
    found, x = [], images()
    for each in (model, vae):
        torch.manual_seed(3)
        found.append(each.train(training).loss(x))
        found[-1]["loss"].backward()
    for term in ("loss", "nll", "kl", "elbo"):
        torch.testing.assert_close(found[0][term], found[1][term], **close)
    for p, q in zip(model.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    for call in ("encode", "forward", "score"):
        torch.testing.assert_close(getattr(model.eval(), call)(x), getattr(vae.eval(), call)(x), **close)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("beta", [1.0, 3.0])
@pytest.mark.parametrize("make", MIXTURES)
def test_one_part_mixture_equals_vae_exactly(make: Any, beta: float, training: bool, shifted: Any) -> None:
    assert_equals_vae(*one_part_model_and_vae(make, shifted, beta=beta), training, rtol=0, atol=0)


# ---- mixtures: Shi et al. 2019, Sutter et al. 2021 -------------------------------------------------------------------


@pytest.mark.parametrize("make", MIXTURES)
def test_loss_is_component_mean_by_torch_distributions(make: Any, shifted: Any) -> None:
    model, x = small(make, shifted, beta=3.0), images()
    mu, log_var = encoded(model, x)
    if make is MoPoEVAE:
        mu, log_var = gaussians.product(mu[:, None], log_var[:, None], model.subsets(3, x.device))
    eps = torch.randn_like(mu)
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch, eps)
        terms = model.loss(x)
    q, nll, kl = mixture(mu, log_var), [], []
    for s in range(mu.shape[1]):
        q_s = normal(mu[:, s], log_var[:, s])
        z = mu[:, s] + (0.5 * log_var[:, s]).exp() * eps[:, s]
        log_p = D.Bernoulli(probs=model.decode(z), validate_args=False).log_prob(x)
        nll.append(-log_p.flatten(1).sum(1))
        kl.append(D.kl_divergence(q_s, PRIOR) - q_s.log_prob(z) + q.log_prob(z))
    mean_nll, mean_kl = torch.stack(nll).mean(), torch.stack(kl).mean()
    expected = {"loss": mean_nll + 3.0 * mean_kl, "nll": mean_nll, "kl": mean_kl, "elbo": -(mean_nll + mean_kl)}
    assert_same_terms(model, terms, expected)


@pytest.mark.slow
@pytest.mark.parametrize("make", MIXTURES)
@pytest.mark.parametrize("distance", [0.0, 1.0, 6.0])
def test_mixture_kl_matches_quadrature_and_its_bounds(make: Any, distance: float, shifted: Any) -> None:
    """Experts that agree, overlap, and are far apart; the batch repeats one sample, so its mean is over draws."""
    n, sigma = 40_000, torch.tensor([0.5, 0.8, 0.4]).double()
    mu = distance * torch.tensor([-1.0, 0.2, 1.0]).double() + 0.3
    model = shifted(make((3,), parts=(1, 1, 1), latent_dim=1, hidden_dims=()).double())
    own = (mu[None, :, None].expand(n, -1, -1), 2 * sigma.log()[None, :, None].expand(n, -1, -1))
    model.experts = lambda x, parts=None: own
    _, kl_BS = model.bound(torch.rand(n, 3).double())
    mus, variances = (values[0, :, 0].detach().numpy() for values in model.components(torch.rand(n, 3).double()))
    scales = np.exp(0.5 * variances)

    def integrand(z: float) -> float:
        q = stats.norm(mus, scales).pdf(z).mean()
        return float(q * (np.log(q) - stats.norm.logpdf(z))) if q > 1e-300 else 0.0

    exact = quad(integrand, -20, 20, points=sorted({*mus.tolist()}), limit=400)[0]
    per_draw = kl_BS.mean(1)
    error = float(per_draw.std()) / math.sqrt(n)
    assert float(per_draw.mean()) == pytest.approx(exact, abs=5 * error + 1e-4)
    bound = float(np.mean(0.5 * (mus**2 + scales**2 - 1 - np.log(scales**2))))
    assert bound - math.log(len(mus)) - 1e-9 <= exact <= bound + 1e-9
    if make is MMVAE and distance == 6.0:
        assert exact == pytest.approx(bound - math.log(3), abs=1e-3)  # components do not overlap


@pytest.mark.parametrize("make", MIXTURES)
def test_posterior_moments_match_mixture(make: Any, shifted: Any) -> None:
    model, x = small(make, shifted).eval(), images()
    q = mixture(*model.components(x))
    mean, log_var = model.posterior(x)
    torch.testing.assert_close(mean, q.mean)
    torch.testing.assert_close(log_var.exp(), q.variance)
    assert torch.equal(model.encode(x), mean)


@pytest.mark.parametrize("make", MIXTURES)
def test_posterior_draws_follow_the_mixture_density(make: Any, shifted: Any) -> None:
    model, x = small(make, shifted), images(2)
    z, log_q = model.sample_posterior(x, 20_000)
    q = mixture(*model.components(x))
    assert z.shape == (20_000, 2, CODE)
    torch.testing.assert_close(log_q, q.log_prob(z))
    for b, d in itertools.product(range(2), range(CODE)):
        mu, log_var = (values[b, :, d].detach().numpy() for values in model.components(x))

        def cdf(values: Any, mu: Any = mu, log_var: Any = log_var) -> Any:
            return stats.norm(mu, np.exp(0.5 * log_var)).cdf(np.asarray(values)[:, None]).mean(1)

        assert stats.kstest(z[:, b, d].detach().numpy(), cdf).pvalue > 1e-4


@pytest.mark.parametrize("make", EVERY)
def test_score_is_noise_free_bound_of_all_parts(make: Any, shifted: Any) -> None:
    model, x = small(make, shifted, beta=3.0).eval(), images()
    with pytest.MonkeyPatch.context() as patch:
        given_noise(patch)
        alone = torch.stack([-model.loss(x[b : b + 1])["elbo"] for b in range(5)])
    torch.testing.assert_close(model.score(x), alone)


# ---- codes and samples from some parts -------------------------------------------------------------------------------


SUBSETS = [chosen for n in (1, 2, 3) for chosen in itertools.combinations(range(3), n)]


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
@pytest.mark.parametrize("make", EVERY)
def test_partial_reconstruction_ignores_other_modalities(make: Any, chosen: tuple[int, ...], shifted: Any) -> None:
    model, x = small(make, shifted).eval(), images()
    other = torch.full_like(x, torch.nan)
    for i in chosen:
        model.split(other)[i].copy_(model.split(x)[i])
    found = model.reconstruct_from(other, chosen)
    assert torch.equal(found, model.reconstruct_from(x, chosen)) and found.isfinite().all()
    torch.testing.assert_close(found, model.reconstruct_from(x, chosen[::-1]))
    for i in chosen:
        changed = x.clone()
        model.split(changed)[i].mul_(0.5)
        assert (model.reconstruct_from(changed, chosen) - found).abs().max() > 1e-6
    if len(chosen) == 3:
        assert torch.equal(found, model(x))


@pytest.mark.parametrize("make", EVERY)
def test_other_experts_get_no_reconstruction_gradient(make: Any, shifted: Any) -> None:
    model = small(make, shifted)
    model.reconstruct_from(images(), (2,)).sum().backward()
    for i, net in enumerate(model.encoder):
        assert all((p.grad is not None) == (i == 2) for p in net.parameters())


@pytest.mark.parametrize("make", EVERY)
@pytest.mark.parametrize("parts", [(), (3,), (-1,), (0, 0), (0, 1, 2, 3)])
def test_unknown_parts_are_refused(make: Any, parts: tuple[int, ...], shifted: Any) -> None:
    with pytest.raises(AezooError, match="parts must be some of 0 to 2, each once, got"):
        small(make, shifted).reconstruct_from(images(), parts)


# ---- exact evidence --------------------------------------------------------------------------------------------------


SCALE, SIZES, K = 0.6, (3, 4, 2), 2


class Exact:
    """Parts x_i = W_i z + m_i + noise, with orthogonal columns of each W_i, in numpy; `chosen` parts are observed."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.w = [np.linalg.qr(rng.normal(size=(n, K)))[0] * rng.uniform(0.5, 1.5, K) for n in SIZES]
        self.m = [rng.normal(size=n) for n in SIZES]

    def stacked(self, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.concatenate([self.w[i] for i in chosen]), np.concatenate([self.m[i] for i in chosen])

    def evidence(self, x: Any, chosen: Any) -> np.ndarray:
        w, m = self.stacked(chosen)
        x_S = np.concatenate([np.split(x, np.cumsum(SIZES)[:-1], 1)[i] for i in chosen], 1)
        law = stats.multivariate_normal(m, w @ w.T + SCALE**2 * np.eye(len(m)))
        return np.atleast_1d(law.logpdf(x_S))

    def posterior(self, x: Any, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
        w, m = self.stacked(chosen)
        x_S = np.concatenate([np.split(x, np.cumsum(SIZES)[:-1], 1)[i] for i in chosen], 1)
        covariance = np.linalg.inv(np.eye(K) + w.T @ w / SCALE**2)
        return (x_S - m) @ w @ covariance / SCALE**2, covariance

    def copy_into(self, model: Any) -> Any:
        """Set the decoders, and as experts p(x_i|z) as functions of z, which are Gaussian."""
        with torch.no_grad():
            for w, m, down, up in zip(self.w, self.m, model.encoder, model.decoder, strict=True):
                (to_code,), (to_x,) = ([m for m in net.modules() if isinstance(m, nn.Linear)] for net in (down, up))
                precision = (w**2).sum(0)
                to_x.weight.copy_(torch.from_numpy(w))
                to_x.bias.copy_(torch.from_numpy(m))
                to_code.weight.zero_()
                to_code.weight[:K].copy_(torch.from_numpy(w.T / precision[:, None]))
                bias = [-(m @ w) / precision, np.log(SCALE**2 / precision)]
                to_code.bias.copy_(torch.from_numpy(np.concatenate(bias)))
        return model


def exact_model(make: Any, **settings: Any) -> tuple[Exact, Any, Tensor]:
    exact = Exact()
    plain = {"parts": SIZES, "latent_dim": K, "hidden_dims": (), "likelihood": f"gaussian:{SCALE}"}
    model = exact.copy_into(make((sum(SIZES),), **plain, **settings).double())
    rng = np.random.default_rng(1)
    w, m = exact.stacked(range(3))
    x = rng.normal(size=(4, K)) @ w.T + m + SCALE * rng.normal(size=(4, len(m)))
    return exact, model.eval(), torch.from_numpy(x)


@pytest.mark.slow
@pytest.mark.parametrize("make", ALL)
def test_no_bound_is_above_the_evidence(make: Any, shifted: Any) -> None:
    """With the experts of `Exact` and with others, over 5,000 draws for each sample."""
    for start in (True, False):
        exact, model, x = exact_model(make, **({"n_subsets": 1} if make is MVAE else {}))
        if not start:
            shifted(model.encoder)
        with torch.no_grad():
            found = torch.stack([model.loss(x.repeat(500, 1))["elbo"] for _ in range(10)])
        gap = exact.evidence(x.numpy(), range(3)).mean() - float(found.mean())
        error = float(found.std()) / math.sqrt(10)
        assert gap > 5 * error if not (make is MVAE and start) else abs(gap) < 5 * error


@pytest.mark.parametrize("make", ALL)
def test_importance_sampling_estimates_evidence(make: Any, shifted: Any) -> None:
    """With experts that are wrong and wider than the true posterior, so that no few draws dominate the estimate."""
    exact, model, x = exact_model(make)
    shifted(model.encoder)
    with torch.no_grad():
        for name, p in model.encoder.named_parameters():
            if name.endswith("bias"):
                p[K:] += 1.0
    found = model.log_likelihood(x, 20_000).numpy()
    np.testing.assert_allclose(found, exact.evidence(x.numpy(), range(3)), atol=0.1)


# ---- registry --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", EVERY)
def test_part_sizes_may_be_list_and_capacity_is_refused(make: Any) -> None:
    model = aezoo.create_model(aezoo.registry.name_of(make), SHAPE, parts=[2, 4])
    assert model.sizes == (2, 4) and not hasattr(model, "capacity") and model.beta == 1.0
