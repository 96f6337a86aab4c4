"""Laws of MHVAE: products with the prior at each level, bounds on log p of all parts from each subset of parts."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributions as D
from gradient_laws import test_gradients_are_derivatives_of_the_terms  # noqa: F401
from hierarchy_laws import (
    set_linear,
)
from multimodal_laws import (
    PARTS,
    SHAPE,
    SUBSETS,
    Exact,
    assert_same_terms,
    images,
)
from multimodal_laws import small as small_of
from torch import Tensor, nn

from aezoo import AezooError
from aezoo.models.variational.mhvae import MHVAE
from aezoo.models.variational.mvae import MVAE
from aezoo.tasks.compress import compress
from aezoo.tasks.decompress import decompress

DIMS = (5, 4, 3)


def small(shifted: Any, **settings: Any) -> Any:
    given = {"parts": PARTS, "latent_dims": DIMS, "level_dim": 7, "hidden_dims": (8,), **settings}
    return shifted(MHVAE(SHAPE, **given).double())


def normal(values: Tensor) -> D.Normal:
    mu, log_var = values.chunk(2, -1)
    return D.Normal(mu, (0.5 * log_var).exp())


def run(net: Any, *given: Tensor) -> Tensor:
    """A net of one hidden layer and ReLU."""
    return net[2](net[0](torch.cat(given, -1)).relu())


def conditional(model: Any, x: Tensor, chosen: Any, above: list[Tensor]) -> tuple[D.Normal, D.Normal]:
    """q(z_l | x_S, z_{l+1}), by completing the square, and p(z_l | z_{l+1}), given the levels above, top first."""
    level = len(model.latent_dims) - 1 - len(above)
    h = {i: model.encoder[i](x.split(model.sizes, 1)[i]) for i in chosen}
    h = {i: values.split([2 * d for d in model.latent_dims], 1)[level] for i, values in h.items()}
    if above:
        p = normal(run(model.priors[level], above[-1]))
        own = [normal(run(model.posteriors[level], h[i], above[-1])) for i in chosen]
    else:
        own = [normal(h[i]) for i in chosen]
        p = D.Normal(torch.zeros_like(own[0].loc), torch.ones_like(own[0].loc))
    precision = p.scale**-2 + sum(q.scale**-2 for q in own)
    mean = (p.loc * p.scale**-2 + sum(q.loc * q.scale**-2 for q in own)) / precision
    return D.Normal(mean, precision**-0.5), p


def nll(model: Any, z_1: Tensor, x: Tensor) -> Tensor:
    """-log p(x|z_1) of all parts."""
    nets = [getattr(net, "net", net) for net in model.decoder]
    logits = torch.cat([net(z_1) for net in nets], 1)
    return -D.Bernoulli(logits=logits, validate_args=False).log_prob(x).flatten(1).sum(1)


def bound(model: Any, x: Tensor, chosen: Any, draw: bool = True) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """-log p(x|z_1), and KLs and codes of all levels from the bottom up, for a subset of parts."""
    z: list[Tensor] = []
    kl: list[Tensor] = []
    for d in reversed(model.latent_dims):
        q, p = conditional(model, x, chosen, z)
        z.append(q.loc + q.scale * torch.randn(len(x), d, dtype=x.dtype) if draw else q.loc)
        kl.append(D.kl_divergence(q, p).sum(1))
    return nll(model, z[-1], x), kl[::-1], z[::-1]


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [DIMS, (4,)])
def test_loss_is_mean_of_subset_bounds(dims: Any, shifted: Any) -> None:
    model, x = small(shifted, latent_dims=dims, beta=3.0), images()
    torch.manual_seed(1)
    terms = model.loss(x)
    torch.manual_seed(1)
    found = [bound(model, x, chosen)[:2] for chosen in sorted(SUBSETS, key=lambda chosen: (-len(chosen), chosen))]
    each = torch.stack([(fit + 3.0 * sum(kl)).mean() for fit, kl in found])
    fit, kl = found[0][0].mean(), [values.mean() for values in found[0][1]]
    expected = {
        "loss": each.mean(),
        "nll": fit,
        "kl": sum(kl),
        "elbo": -fit - sum(kl),
        "subset_nelbo": each[1:].sum() / 7,
    }
    expected |= {f"kl_{i}": values for i, values in enumerate(kl, 1)}
    assert set(terms) == set(expected)
    for term, value in expected.items():
        torch.testing.assert_close(terms[term], value, rtol=1e-9, atol=1e-9)
    assert_same_terms(model, terms, expected)


def test_subsets_are_all_nonempty_with_full_first() -> None:
    model = MHVAE(SHAPE, parts=PARTS, hidden_dims=())
    assert model.subsets()[0] == (0, 1, 2) and sorted(model.subsets()) == sorted(SUBSETS)
    assert MHVAE((3,), parts=(3,), hidden_dims=()).subsets() == [(0,)]
    assert len(MHVAE((6,), parts=(1,) * 6, hidden_dims=()).subsets()) == 63
    with pytest.raises(AezooError, match="at most 6, got 7: use mvae or mmvae"):
        MHVAE((7,), parts=(1,) * 7)


def test_every_decoder_learns_from_every_subset(shifted: Any) -> None:
    model, x = small(shifted), images()
    model.subsets = lambda: [(1,)]
    model.loss(x)["loss"].backward()
    assert all(p.grad.any() for p in model.decoder.parameters())
    for i, net in enumerate(model.encoder):
        assert all((p.grad is not None and bool(p.grad.any())) == (i == 1) for p in net.parameters())
    assert not hasattr(model, "capacity")


def test_kl_gradients_stay_at_their_levels(shifted: Any) -> None:
    model = small(shifted)
    terms = model.loss(images())
    reached = {}
    for term in ("nll", "kl_1", "kl_2", "kl_3"):
        nets = {"decoder": model.decoder, "low": model.posteriors[0], "middle": model.posteriors[1]}
        nets |= {"prior": model.priors[0], "upper prior": model.priors[1]}
        reached[term] = {
            name
            for name, net in nets.items()
            if any(
                g is not None and g.any()
                for g in torch.autograd.grad(terms[term], [*net.parameters()], retain_graph=True, allow_unused=True)
            )
        }
    of_z = {"low", "middle", "prior", "upper prior"}
    assert reached == {"nll": {"decoder", *of_z}, "kl_1": of_z, "kl_2": {"middle", "upper prior"}, "kl_3": set()}


# ---- neutral limits --------------------------------------------------------------------------------------------------


def zero_noise(patch: pytest.MonkeyPatch) -> None:
    """Replace all noise with zeros."""
    patch.setattr(torch, "randn_like", torch.zeros_like)
    patch.setattr(torch, "randn", lambda *shape, **kwargs: torch.zeros(*shape, **kwargs))


@pytest.mark.parametrize("parts", [PARTS, (6,)])
def test_one_level_equals_mvae_that_decodes_all_parts(parts: Any, shifted: Any) -> None:
    model, x = small(shifted, latent_dims=(4,), parts=parts, beta=3.0), images()
    other = small_of(MVAE, shifted, parts=parts, beta=3.0)
    other.load_state_dict(model.state_dict())
    for chosen in SUBSETS if len(parts) > 1 else [(0,)]:
        for a, b in zip(model.infer(x, chosen), other.infer(x, chosen), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        zero_noise(patch)
        mine, theirs = model.loss(x), other.loss(x)
    for term in ("nll", "kl", "elbo"):
        torch.testing.assert_close(mine[term], theirs[term], rtol=1e-12, atol=1e-12)
    for call in ("encode", "forward", "score"):
        torch.testing.assert_close(getattr(model.eval(), call)(x), getattr(other.eval(), call)(x))
    if len(parts) == 1:
        assert mine["subset_nelbo"] == 0
        torch.testing.assert_close(mine["loss"], theirs["loss"], rtol=1e-12, atol=1e-12)
        pairs = [torch.autograd.grad(e["loss"], [*m.parameters()]) for e, m in ((mine, model), (theirs, other))]
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_uninformative_experts_give_prior_with_zero_kl(shifted: Any) -> None:
    model, x = small(shifted), images()
    assert all(model.loss(x)[f"kl_{i}"] > 0.01 for i in (1, 2, 3))
    with torch.no_grad():
        for net in model.posteriors:
            net[2].bias[len(net[2].bias) // 2 :] = 1000.0
        for net in model.encoder:
            (last,) = (m for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == 2 * sum(DIMS))
            last.bias[-DIMS[-1] :] = 1000.0
    terms = model.loss(x)
    for i in (1, 2, 3):
        assert terms[f"kl_{i}"].abs() < 1e-6
    torch.testing.assert_close(model.infer(x)[0][:, -3:], torch.zeros(5, 3).double(), rtol=0, atol=1e-6)


# ---- codes, draws, samples from some parts ---------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
def test_partial_codes_are_top_down_means(chosen: tuple[int, ...], shifted: Any) -> None:
    model, x = small(shifted).eval(), images()
    other = torch.full_like(x, torch.nan)
    for i in chosen:
        model.split(other)[i].copy_(model.split(x)[i])
    fit, kl, z = bound(model, x, chosen, draw=False)
    for order in (chosen, chosen[::-1]):
        mu, log_var = model.infer(other, order)
        torch.testing.assert_close(mu, torch.cat(z, 1))
        for level, value in enumerate(log_var.split(DIMS, 1)):
            torch.testing.assert_close(value, 2 * conditional(model, x, chosen, z[:level:-1])[0].scale.log())
    torch.testing.assert_close(model.reconstruct_from(other, chosen), model.decode(torch.cat(z, 1)))
    if len(chosen) == 3:
        assert torch.equal(model.reconstruct_from(x, chosen), model(x))
        torch.testing.assert_close(model.score(x), fit + sum(kl))
        torch.testing.assert_close(model.encode(x), torch.cat(z, 1))
    own = [normal(model.encoder[i](x.split(PARTS, 1)[i])[:, -6:]) for i in chosen]
    for found, expected in zip(zip(*(v.unbind(1) for v in model.experts(x, chosen)), strict=True), own, strict=True):
        torch.testing.assert_close(found[0], expected.loc)
        torch.testing.assert_close(found[1], 2 * expected.scale.log())


@pytest.mark.parametrize("parts", [(), (3,), (-1,), (0, 0), (0, 1, 2, 3)])
def test_unknown_parts_are_refused(parts: tuple[int, ...], shifted: Any) -> None:
    with pytest.raises(AezooError, match="parts must be some of 0 to 2, each once, got"):
        small(shifted).reconstruct_from(images(), parts)


def test_output_depends_on_bottom_code_and_own_decoder(shifted: Any) -> None:
    model, z = small(shifted), torch.randn(3, 12, dtype=torch.float64)
    other = torch.cat([z[:, :5], torch.randn(3, 7, dtype=torch.float64)], 1)
    assert torch.equal(model.decode(z), model.decode(other)) and not torch.equal(model.decode(z), model.decode(-z))
    expected = torch.cat([net.net(z[:, :5]) for net in model.decoder], 1).sigmoid()
    assert torch.equal(model.decode(z), expected)


def test_densities_and_samples_match_conditionals(shifted: Any) -> None:
    model, x, n = small(shifted), images(3), 2000
    with torch.no_grad():
        z_KBD, log_q_KB = model.sample_posterior(x, n)
        z, above, noise = z_KBD.flatten(0, 1).split(DIMS, 1), [], []
        log_q, log_p = torch.zeros(3 * n).double(), torch.zeros(3 * n).double()
        for part in z[::-1]:
            q, p = conditional(model, x.repeat(n, 1, 1, 1), (0, 1, 2), above)
            log_q, log_p = log_q + q.log_prob(part).sum(1), log_p + p.log_prob(part).sum(1)
            noise.append((part - q.loc) / q.scale)
            above.append(part)
    torch.testing.assert_close(log_q_KB.flatten(), log_q)
    torch.testing.assert_close(model.log_prior(z_KBD).flatten(), log_p)
    eps = torch.cat(noise, 1)
    torch.testing.assert_close(eps.mean(0), torch.zeros(12).double(), rtol=0, atol=5 / math.sqrt(3 * n))
    torch.testing.assert_close(eps.T.cov(), torch.eye(12).double(), rtol=0, atol=7 / math.sqrt(3 * n))


def test_samples_compress_losslessly_by_joint_posterior(shifted: Any, tmp_path: Path) -> None:
    model = shifted(MHVAE((1, 4, 4), parts=(3, 1), latent_dims=(3, 2), hidden_dims=(8,))).eval()
    x = (torch.rand(6, 1, 4, 4) > 0.5).float()
    compress(model, x, mode="lossless", compare=False, out=str(tmp_path))
    assert np.array_equal(decompress(model, str(tmp_path / "samples.aez")).x, (255 * x).byte().numpy())


# ---- a linear hierarchy with exact evidence and posteriors -----------------------------------------------------------


SCALE, SIZES, K = 0.6, (3, 4, 2), 2


A, SHIFT = np.array([1.1, -0.7]), np.array([0.3, -0.6])


class Linear(Exact):
    """x_i = W_i z_1 + m_i + noise, z_1 = A z_2 + a + noise of variance s2; in numpy.

    Args:
        s2: the variance of each value of z_1 given z_2.
    """

    def __init__(self, s2: float) -> None:
        super().__init__()
        self.s2 = s2

    def evidence(self, x: Any, chosen: Any = range(3)) -> np.ndarray:
        w, m = self.stacked(chosen)
        centre, spread = w @ SHIFT + m, w @ np.diag(A**2 + self.s2) @ w.T + SCALE**2 * np.eye(len(m))
        return np.atleast_1d(D.MultivariateNormal(*map(torch.from_numpy, (centre, spread))).log_prob(x).numpy())

    def joint(self, x: Tensor, chosen: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of p(z_1, z_2 | x_S), by conditioning the joint Gaussian of z and x."""
        w, m = self.stacked(chosen)
        x_S = np.concatenate([np.split(x.numpy(), np.cumsum(SIZES)[:-1], 1)[i] for i in chosen], 1)
        own, to_x = np.diag(A**2 + self.s2), np.concatenate([w, np.zeros_like(w)], 1)
        z = np.block([[own, np.diag(A)], [np.diag(A), np.eye(K)]])
        gain = z @ to_x.T @ np.linalg.inv(to_x @ z @ to_x.T + SCALE**2 * np.eye(len(m)))
        centre = np.concatenate([SHIFT, np.zeros(K)])
        return centre + (x_S - w @ SHIFT - m) @ gain.T, z - gain @ to_x @ z

    def model(self, parts: tuple[int, ...] = SIZES) -> Any:
        """An MHVAE with q_i at p(x_i|z_1), independently of z_2, and at p(x_i|z_2), as functions of z."""
        plain = {"latent_dims": (K, K), "level_dim": 8, "hidden_dims": (), "activation": "identity"}
        made: Any = MHVAE((9,), parts=parts, likelihood=f"gaussian:{SCALE}", **plain).double().eval()
        whole = [self.stacked(range(3))] if len(parts) == 1 else [*zip(self.w, self.m, strict=True)]
        scale = torch.from_numpy(A)
        with torch.no_grad():
            prior = torch.cat([scale.diag(), torch.zeros(K, K)])
            set_linear(made.priors[0], prior, torch.tensor([*SHIFT, *[math.log(self.s2)] * K], dtype=torch.float64))
            set_linear(made.posteriors[0], torch.eye(2 * K, 3 * K).double(), torch.zeros(2 * K).double())
            for (w, m), down, up in zip(whole, made.encoder, made.decoder, strict=True):
                (to_code,), (to_x,) = ([m for m in net.modules() if isinstance(m, nn.Linear)] for net in (down, up))
                to_x.weight.copy_(torch.from_numpy(w))
                to_x.bias.copy_(torch.from_numpy(m))
                precision = (w**2).sum(0)
                gain, r = w.T / precision[:, None], SCALE**2 / precision  # gain (x - m) = z_1 + noise of variance r
                zero = np.zeros_like(gain)
                to_code.weight.copy_(torch.from_numpy(np.concatenate([gain, zero, gain / A[:, None], zero])))
                top = (-gain @ m - SHIFT) / A
                bias = [-gain @ m, np.log(r), top, np.log((self.s2 + r) / A**2)]
                to_code.bias.copy_(torch.from_numpy(np.concatenate(bias)))
        return made

    def samples(self, n: int) -> Tensor:
        rng = np.random.default_rng(1)
        w, m = self.stacked(range(3))
        z_1 = A * rng.normal(size=(n, K)) + SHIFT + math.sqrt(self.s2) * rng.normal(size=(n, K))
        return torch.from_numpy(z_1 @ w.T + m + SCALE * rng.normal(size=(n, 9)))


def test_one_modality_product_is_exact_posterior() -> None:
    exact = Linear(0.5)
    model, x = exact.model((9,)), exact.samples(20)
    for n in (1, 3):
        np.testing.assert_allclose(model.log_likelihood(x, n).numpy(), exact.evidence(x), rtol=1e-7)
    many = model.loss(x.repeat(1000, 1))["elbo"].item()
    assert many == pytest.approx(exact.evidence(x).mean(), abs=0.05)


@pytest.mark.parametrize("chosen", SUBSETS, ids=str)
def test_bottom_product_is_posterior_of_any_modalities(chosen: tuple[int, ...]) -> None:
    exact = Linear(0.5)
    model, x = exact.model(), exact.samples(4)
    mean, covariance = exact.joint(x, chosen)
    mu, log_var = (values.detach().numpy() for values in model.infer(x, chosen))
    of_top = covariance[K:, K:]
    # z_1 given the z_2 of the code, by conditioning the joint posterior
    gain = covariance[:K, K:] @ np.linalg.inv(of_top)
    np.testing.assert_allclose(mu[:, :K], mean[:, :K] + (mu[:, K:] - mean[:, K:]) @ gain.T, rtol=1e-9)
    bottom = np.diag(covariance[:K, :K] - gain @ covariance[K:, :K])
    np.testing.assert_allclose(np.exp(log_var[:, :K]), bottom[None].repeat(4, 0), rtol=1e-9)
    if len(chosen) == 1:
        np.testing.assert_allclose(mu[:, K:], mean[:, K:], rtol=1e-9)
        np.testing.assert_allclose(np.exp(log_var[:, K:]), np.diag(of_top)[None].repeat(4, 0), rtol=1e-9)
    else:
        assert (np.exp(log_var[:, K:]) < 0.95 * np.diag(of_top)).all()


def test_equal_levels_make_top_product_exact() -> None:
    exact = Linear(1e-9)
    model, x = exact.model(), exact.samples(20)
    np.testing.assert_allclose(model.log_likelihood(x, 1).numpy(), exact.evidence(x), rtol=1e-5)


@pytest.mark.slow
def test_bounds_are_below_importance_sampled_evidence() -> None:
    exact = Linear(0.5)
    model, x = exact.model(), exact.samples(4)
    with torch.no_grad():
        found = [model.loss(x.repeat(500, 1)) for _ in range(10)]
    evidence = exact.evidence(x)
    for bounds in ([t["elbo"] for t in found], [-t["subset_nelbo"] * 7 / 6 for t in found]):
        values = torch.stack(bounds)
        error = values.std().item() / math.sqrt(10)
        assert evidence.mean() - values.mean().item() > 5 * error
    np.testing.assert_allclose(model.log_likelihood(x, 20_000).numpy(), evidence, atol=0.1)


def test_more_modalities_reduce_top_level_variance(shifted: Any) -> None:
    model, x = small(shifted), images()
    top = {chosen: model.infer(x, chosen)[1][:, -3:] for chosen in SUBSETS}
    for a, b in itertools.permutations(SUBSETS, 2):
        if {*a} < {*b}:
            assert (top[b] < top[a]).all() and (top[a] < 0).all()
